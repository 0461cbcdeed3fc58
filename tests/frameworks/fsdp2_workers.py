"""What test_fsdp2.py runs on its four ranks: two workers, each a transformer sharded over two ranks by FSDP2."""

import itertools
import re
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fused_dlam
from fused_dlam import topology

PAGE = Path(__file__).resolve().parents[2] / "fused_dlam" / "frameworks" / "torchtitan.md"
WORDS, LENGTH, CLIP = 11, 6, 0.5
STEPS, HALF = 5, 3  # workers differ at either, see `rests`
WAYS = [("adamw", "save_checkpoint"), ("mi-dmsgd", "worker_state"), ("adamw", "torch"), ("mi-dmsgd", "torch"),
        ("rounds", "save_checkpoint"), ("rounds", "torch")]  # fmt: skip
CASES = [("adamw", "atc"), ("adamw", "awc"), ("dmsgd", "atc"), ("rounds", "atc"), ("rounds", "awc")]
OUTER = {"outer": "dmsgd", "every": 2, "lr": 0.7, "momentum": 0.8}  # two rounds, and half of one


def rests(n):
    """With two workers an exchange is an exact average: they differ in every other step."""
    return topology.ring(n).every(2)


class Block(nn.Module):
    """Attention and a feed-forward layer, with odd sizes: shards are uneven."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width + 1), nn.GELU(), nn.Linear(2 * width + 1, width))

    def forward(self, h):
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in self.qkv(self.first(h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.feed(self.second(h))


class Transformer(nn.Module):
    def __init__(self, width=9, depth=1):
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(h.flatten(0, 1))


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())


def batches(rank, count=STEPS):
    """A rank's own data: each counts in steps of its own, so that their gradients are unlike."""
    for b in range(count):
        start = torch.arange(4).unsqueeze(1) + 3 * b
        yield (start + (rank + 1) * torch.arange(LENGTH)) % WORDS


def mesh_of_four():
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("gossip", "shard"))


def sharded(mesh, dtype=torch.float64):
    model = Transformer().to(dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    return fully_shard(model, mesh=mesh["shard"])


def build(kind, mesh, **options):
    """(model, optimizer, scheduler)"""
    model = sharded(mesh)
    options = {"topology": rests, "hierarchical": mesh, "timeout": 60.0, **options}
    if kind in ("adamw", "rounds"):
        options |= OUTER if kind == "rounds" else {}
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = fused_dlam.Gossip(inner, **options)
    else:
        optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.05, method=kind, overlap=False, **options)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def shards(model):
    """What this rank holds of the parameters."""
    return torch.cat([p.detach().to_local().reshape(-1) for p in model.parameters()])


def train(model, optimizer, scheduler, data):
    path = []
    for tokens in data:
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        path.append(shards(model))
    return path


def trained(rank):
    """What this rank holds of the parameters after every step, by kind and schedule."""
    mesh, out = mesh_of_four(), {}
    for kind, schedule in CASES:
        out[kind, schedule] = torch.stack(train(*build(kind, mesh, schedule=schedule), batches(rank)))
    return out


def of_torch(mesh, model, optimizer, scheduler):
    """What torchtitan saves, by torch's names of parameters, under a name of the worker's own."""
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    return {f"worker{mesh['gossip'].get_local_rank()}": {**state, "scheduler": scheduler.state_dict()}}


def saved(rank, folder):
    """By kind and way of saving: the last parameters of a run, and of one that was saved half-way and resumed."""
    mesh, out = mesh_of_four(), {}
    for kind, way in WAYS:
        path = f"{folder}/{kind}-{way}"
        model, optimizer, scheduler = build(kind, mesh)
        data = list(batches(rank))
        train(model, optimizer, scheduler, data[:HALF])
        if way == "save_checkpoint":
            fused_dlam.save_checkpoint(path, model, optimizer, scheduler=scheduler)
        elif way == "worker_state":
            dcp.async_save(fused_dlam.worker_state(model, optimizer, scheduler=scheduler), checkpoint_id=path).result()
        else:
            dcp.save(of_torch(mesh, model, optimizer, scheduler), checkpoint_id=path)
        last = train(model, optimizer, scheduler, data[HALF:])[-1]

        again = build(kind, mesh)
        model, optimizer, scheduler = again
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(9.0)
        if way == "torch":
            state = of_torch(mesh, *again)
            dcp.load(state, checkpoint_id=path)
            (mine,) = state.values()
            set_state_dict(model, optimizer, model_state_dict=mine["model"], optim_state_dict=mine["optimizer"])
            scheduler.load_state_dict(mine["scheduler"])
        else:
            fused_dlam.load_checkpoint(path, model, optimizer, scheduler=scheduler)
        steps = optimizer.steps_done
        resumed = train(model, optimizer, scheduler, data[HALF:])[-1]
        out[kind, way] = last, resumed, steps
    return out


def uneven(rank):
    """Workers with 3 and 5 batches, of which one rank has one more: how many steps each took, and the distance."""
    mesh = mesh_of_four()
    model, optimizer, scheduler = build("adamw", mesh)
    count = (3, 3, 5, 6)[rank]
    mine = torch.tensor(count)
    dist.all_reduce(mine, dist.ReduceOp.MIN, group=mesh["shard"].get_group())
    with optimizer.join():
        train(model, optimizer, scheduler, itertools.islice(batches(rank, count), int(mine)))
    return int(mine), optimizer.steps_done, optimizer.consensus_distance()


def refused(rank):
    """Errors of what would average twice, by name."""
    mesh, errors = mesh_of_four(), {}

    def note(name, make):
        try:
            make()
            errors[name] = "no error"
        except ValueError as error:
            errors[name] = str(error)

    def adamw(model):
        return torch.optim.AdamW(model.parameters())

    note("hsdp", lambda: fused_dlam.Gossip(adamw(fully_shard(Transformer(), mesh=mesh)), hierarchical=mesh))
    note("no mesh", lambda: fused_dlam.Gossip(adamw(sharded(mesh))))
    everywhere = fully_shard(Transformer(), mesh=dist.init_device_mesh("cpu", (4,)))
    note(
        "fsdp over all",
        lambda: fused_dlam.Gossip(adamw(everywhere), hierarchical=mesh),
    )
    wrapped = nn.parallel.DistributedDataParallel(Transformer())
    note("ddp", lambda: fused_dlam.Gossip(adamw(wrapped), hierarchical=mesh))
    return errors


def example():
    return re.findall(r"```python\n(# torchrun.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0]


def page(rank, folder):
    """Runs the page's example twice, the second time from the first one's checkpoint; what it leaves.

    On a graph on which its two workers differ at the end of the first.
    """
    code, out = example().replace("hierarchical=mesh", "hierarchical=mesh, topology=rests"), []
    for _ in range(2):
        space = {"Transformer": Transformer, "loss_of": loss_of, "path": folder, "batches": list(batches(rank)),
                 "validation": next(batches(rank, 1)), "rests": rests}  # fmt: skip
        exec(compile(code, "torchtitan.md", "exec"), space)
        dist.barrier()  # rank 0 has written it
        file = torch.load(f"{folder}/mean.pt")
        out.append({
            "steps": space["optimizer"].steps_done, "loss": float(space["loss"]), "own": shards(space["model"]),
            "mean": torch.cat([file[name].reshape(-1) for name, _ in space["model"].named_parameters()]),
        })  # fmt: skip
    return out


def all_of_it(rank, folder):
    """In one set of processes; what is refused comes last, for it leaves models in wrappers behind."""
    calls = {"trained": trained, "uneven": uneven}
    out = {name: call(rank) for name, call in calls.items()}
    out["saved"] = saved(rank, folder)
    out["page"] = page(rank, f"{folder}/page")
    out["refused"] = refused(rank)
    return out
