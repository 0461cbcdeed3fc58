"""What the two worker processes of test_api_ranks.py run: API calls that are drawn from a seed, alike on both ranks."""

import random
import time
import warnings

import torch
import torch.distributed as dist

import fused_dlam
from fused_dlam.layers import SlowMo

TIMEOUT = 4.0
CHOICES = {
    "lr": [0.1, 0.05], "momentum": [0.9, 0.5], "weight_decay": [0.0, 0.1], "maximize": [False, True],
    "method": ["mi-dmsgd", "dmsgd", "pc-dmsgd", "pmsgd", "adamw"],
    "topology": ["one-peer-exponential", "ring", "full", "random-match"], "schedule": ["auto", "atc"],
    "overlap": ["auto", True, False], "max_grad_norm": [None, 1.0], "clip": [None, "spikes"],
    "comm_dtype": [None, torch.bfloat16], "bucket_mb": [None, 1e-5, 1], "nonfinite": ["skip", "raise"],
    "layers": [(), [SlowMo(2)], [SlowMo(3)]],
    "shape": [(3, 2), (2, 3), (7,), ()], "dtype": [torch.float32, torch.float64], "frozen": [False, True],
    "count": [1, 2], "kind": ["GossipSGD", "Gossip"],
}  # fmt: skip
BAD = {"lr": -1.0, "momentum": "x", "method": "sgd", "topology": "hypercub", "nonfinite": 3, "layers": "slow"}
CALLS = ("step", "step", "distance", "consensus_state", "averaged", "load", "add group", "add another", "load another")


def drawn(seed):
    """The options of both ranks, what they differ in, what is bad on one rank, and the calls afterwards."""
    rng = random.Random(seed)
    ours = {name: rng.choice(CHOICES[name]) for name in rng.sample(sorted(CHOICES), rng.randint(0, 3))}
    if ours.get("clip") and ours.get("max_grad_norm"):
        del ours["clip"]
    options, differ, bad = [ours, dict(ours)], "", ""
    kind = rng.choice(["differ", "differ", "differ", "alike", "alike", "bad" if seed % 10 == 0 else "alike"])
    if kind == "differ":
        differ = rng.choice(sorted(set(CHOICES) - {"clip", "max_grad_norm"}))
        options[0][differ], options[1][differ] = rng.sample(CHOICES[differ], 2)
    elif kind == "bad":
        bad = rng.choice(sorted(BAD))
        options[rng.randint(0, 1)][bad] = BAD[bad]
    return options, differ, bad, [rng.choice(CALLS) for _ in range(4)]


def build(options):
    options = dict(options)
    shape, dtype = options.pop("shape", (3, 2)), options.pop("dtype", torch.float32)
    frozen, count, kind = options.pop("frozen", False), options.pop("count", 1), options.pop("kind", "GossipSGD")
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for _ in range(count)]
    params.append(torch.nn.Parameter(torch.ones(3), requires_grad=not frozen))
    if kind == "GossipSGD":
        return params, fused_dlam.GossipSGD(params, timeout=TIMEOUT, **options)
    inner = torch.optim.SGD(
        params,
        lr=options.pop("lr", 0.1),
        momentum=options.pop("momentum", 0.9),
        weight_decay=options.pop("weight_decay", 0.0),
        maximize=options.pop("maximize", False),
    )
    taken = {k: v for k, v in options.items() if k in ("topology", "comm_dtype", "bucket_mb")}
    return params, fused_dlam.Gossip(inner, timeout=TIMEOUT, **taken)


def call(name, rank, params, optimizer):
    if name == "step":
        optimizer.zero_grad()
        trainable = [p for p in params if p.requires_grad]
        sum((p * (1 + rank)).sum() for p in trainable).backward()
        optimizer.step()
    elif name == "distance":
        optimizer.consensus_distance()
    elif name == "consensus_state":
        optimizer.consensus_state_dict()
    elif name == "averaged":
        model = torch.nn.ParameterList(params)
        with optimizer.averaged(model):
            pass
    elif name.startswith("load"):
        saved = optimizer.state_dict()
        if name == "load another" and rank:
            saved["param_groups"][0]["lr"] = -1.0
        optimizer.load_state_dict(saved)
    else:
        size = 3 + rank if name == "add another" else 3
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(size))], "lr": 0.1})


def attempt(what):
    """("" or the error's kind, its text, seconds)."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def run_drawn(rank, seeds):
    """For every seed what the constructor and each call said."""
    out = {}
    for seed in seeds:
        options, _, _, calls = drawn(seed)
        made = []
        said = [("constructor", *attempt(lambda: made.append(build(options[rank]))))]  # noqa: B023
        dist.barrier()
        if made:
            params, optimizer = made[0]
            for name in calls:
                said.append((name, *attempt(lambda: call(name, rank, params, optimizer))))  # noqa: B023
            said.append(("finite", "", str(all(bool(torch.isfinite(p).all()) for p in params)), 0.0))
            optimizer.close()
        out[seed] = said
    return out
