"""Gradients that are copied into a bucket together, as on a GPU, on CPU tensors with real numbers."""

import torch
from torch import nn

from fused_dlam import GossipSGD
from fused_dlam.engine import gathering

STEPS = 8
HABITS = ("plain", "freeze", "some to None", "first used later", "model.zero_grad", "a large one", "replaced")


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.s


def train(rank, habit, gathers, overlap, method):
    """The parameters after training with a habit that leaves some of a bucket's gradients without company."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    if habit == "a large one":  # of more bytes than may wait, which arrives before smaller ones of its bucket
        gathering.GATHER = 60
        model = nn.Sequential(Scale(), *model)
    optimizer = GossipSGD(model.parameters(), lr=0.1, overlap=overlap, method=method, timeout=60.0)
    for b in optimizer._engine.buckets:
        b.gathers = gathers
    torch.manual_seed(1 + rank)
    for step in range(STEPS):
        if habit == "freeze" and step == 3:
            model[0].requires_grad_(False)
        if habit == "some to None":
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.zero_()
            model[4].zero_grad()
        elif habit == "model.zero_grad":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=habit != "first used later")
        x = torch.randn(8, 6)
        if habit == "a large one":
            out = model(x)
        else:
            x = model[0](x)
            out = model[1:](x.detach() if habit == "first used later" and step < 3 else x)
        nn.functional.mse_loss(out, torch.randn(8, 3)).backward()
        if habit == "replaced" and step < 2:  # by a tensor of the same version
            model[0].weight.grad = model[0].weight.grad.detach().clone() * 2
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), optimizer._arrivals.sending


def train_each(rank, cases):
    kept, out = gathering.GATHER, []
    for case in cases:
        out.append(train(rank, *case))
        gathering.GATHER = kept
    return out
