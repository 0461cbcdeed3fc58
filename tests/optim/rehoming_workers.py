"""What worker processes run in test_rehoming.py."""

import logging

import torch
from torch import nn
from workers import data

from fused_dlam import Gossip, GossipSGD


class Net(nn.Module):
    """A weight that two layers share, a frozen layer, BatchNorm and a complex parameter."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.middle, self.last = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.last.weight = self.first.weight
        self.middle.requires_grad_(False)
        self.norm = nn.BatchNorm1d(7)
        self.to(dtype)
        if dtype == torch.float32:
            self.turn = nn.Parameter(torch.ones(7, dtype=torch.complex64))

    def forward(self, x):
        x = self.norm(torch.tanh(self.last(self.middle(torch.tanh(self.first(x))))))
        return x + (x * self.turn).real if hasattr(self, "turn") else x


KINDS = {
    "GossipSGD": (torch.float32, lambda p, **o: GossipSGD(p, lr=0.05, weight_decay=1e-2, **o), {}),
    "awc": (torch.float32, lambda p, **o: GossipSGD(p, lr=0.05, **o), {"schedule": "awc"}),
    "decentlam": (torch.float32, lambda p, **o: GossipSGD(p, lr=0.05, method="decentlam", **o), {"overlap": False}),
    "bfloat16": (torch.bfloat16, lambda p, **o: GossipSGD(p, lr=0.05, **o), {}),
    "bfloat16 awc": (torch.bfloat16, lambda p, **o: GossipSGD(p, lr=0.05, **o), {"schedule": "awc"}),
    "AdamW": (torch.float32, lambda p, **o: Gossip(torch.optim.AdamW(p, lr=1e-2), **o), {}),
    "AdamW awc": (torch.float32, lambda p, **o: Gossip(torch.optim.AdamW(p, lr=1e-2), **o), {"schedule": "awc"}),
    "AdamW bfloat16": (torch.bfloat16, lambda p, **o: Gossip(torch.optim.AdamW(p, lr=1e-2), **o), {}),
}


def train(rank, kind, when, keep_grads=False, thaw=None):
    """Seven steps, the model copied by `.to("cpu:0")` at the places named in `when`."""
    dtype, build, options = KINDS[kind]
    torch.manual_seed(rank)
    model = Net(dtype)
    optimizer = build(model.parameters(), bucket_mb=1e-4, **options)
    x = data(rank, dtype)

    def copied(place):
        if place in when:
            before = [p for p in model.parameters()]
            addresses = [p.data_ptr() for p in before]
            model.to("cpu:0")
            assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
            # Not all: a tied one is copied twice, and its second copy may lie where it was.
            assert any(p.data_ptr() != a for p, a in zip(before, addresses, strict=True))

    copied("built")
    losses = []
    for step in range(7):
        if step == thaw:
            model.middle.requires_grad_(True)
        copied("before")
        optimizer.zero_grad(set_to_none=not keep_grads)
        copied("zeroed")
        loss = model(x).square().mean() + model(x).mean()
        copied("forward")
        loss.backward()
        copied("backward")
        optimizer.step()
        copied("stepped")
        losses.append(loss.detach().clone())
        if step == 4:
            distance = optimizer.consensus_distance()
            with optimizer.averaged(model):
                mean = [p.detach().clone() for p in model.parameters()]
                copied("averaged")
    copied("end")
    saved = optimizer.state_dict()
    return {
        "losses": losses,
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "mean": mean,
        "distance": distance,
        "optimizer": {(k, n): v for k, s in saved["state"].items() for n, v in s.items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def written(rank, kind, how):
    """Other memory with another value, before a step whose gradient is zero; what it is afterwards, or the error."""
    dtype, build, options = KINDS[kind]
    model = nn.Linear(3, 3, bias=False).to(dtype)
    optimizer = build(model.parameters(), **options)
    for step in range(4):
        optimizer.zero_grad()
        (model.weight * 0).sum().backward()
        if step == 2 and how == "before the step":
            model.weight.data = torch.full((3, 3), 1.0 + rank, dtype=dtype)
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        if step == 1 and how == "after the step":
            model.weight.data = torch.full((3, 3), 1.0 + rank, dtype=dtype)
        if step == 1 and how == "synchronized":
            optimizer.synchronize()
            model.weight.data = torch.full((3, 3), 1.0 + rank, dtype=dtype)
        if step == 2:
            return model.weight.detach().float().mean().item()


def replaced(rank, how):
    """Parameters of a model become other objects: (the error of `averaged`, lines of the log)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    params = model.named_parameters() if how == "named" else model.parameters()
    optimizer = GossipSGD(params, lr=0.1)
    lines = []
    log = logging.getLogger("fused_dlam")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        if how == "seen":
            with optimizer.averaged(model):
                pass
        if how in ("seen", "unseen"):
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        elif how == "added":
            with optimizer.averaged(model):
                pass
            model[1] = nn.Linear(3, 2)
            optimizer.add_param_group({"params": model[1].parameters()})
        else:
            model[1] = nn.Linear(3, 2)
        model(torch.ones(2, 3)).sum().backward()
        try:
            with optimizer.averaged(model):
                return "", lines
        except ValueError as error:
            return str(error), lines
    finally:
        log.removeHandler(handler)
