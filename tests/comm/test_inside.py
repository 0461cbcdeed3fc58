"""Promises about FSDP2 and DDP inside a machine, gossip between machines, with real processes over gloo:

- 2 x 2 and 2 x 3 (machines x ranks), uneven and empty shards, both schedules: within 1e-5 of the dense float64 oracle
  in which a machine is one worker with the mean gradient of its ranks; `Gossip(AdamW)` likewise;
- each rank sends its shard alone, once per neighboring machine; state is handed out as DTensors of the full shape;
- compressed shards, some of them empty: the machines' mean is the uncompressed one's, in float64 to 1e-13;
- what would average twice or exchange different shards is refused, with what to do instead.
"""

import inside_workers
import numpy as np
import oracle
import pytest
import torch
import workers
from everyday import everyday

from fused_dlam import topology

STEPS = 12
CODECS = ["int8", "int4", "topk"]
CASES = [
    ("pc-dmsgd", {}),
    ("pc-dmsgd", {"schedule": "awc", "bucket_mb": 1e-4}),
    ("dmsgd", {"by_group": True, "bucket_mb": 1e-4, "overlap": True}),
    ("dmsgd", {"max_grad_norm": 0.5}),
    ("gossip-adamw", {}),
    ("gossip-adamw", {"schedule": "awc", "bucket_mb": 1e-4}),
]


def machine_gradient(machines, size):
    """Of the float64 network at each machine's parameters, [machines, d]: the mean over its ranks."""
    model = inside_workers.Net(torch.float64)
    params = list(model.parameters())
    inputs = [workers.data(r, torch.float64) for r in range(machines * size)]

    def grad(step, X):
        out = []
        for m in range(machines):
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(torch.from_numpy(X[m]), params)
            loss = sum(model.loss(inputs[m * size + i]) for i in range(size)) / size
            out.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)]).numpy())
        return np.stack(out)

    return grad


def expected_path(machines, size, kind, schedule, clip=None):
    graph = topology.one_peer_exponential(machines)
    grad = machine_gradient(machines, size)
    x0 = inside_workers.flat(inside_workers.Net(torch.float64)).numpy()
    X = np.tile(x0, (machines, 1))
    if kind != "gossip-adamw":

        def clipped(step, X):
            g = grad(step, X)
            norm = np.linalg.norm(g, axis=1, keepdims=True)
            return g * np.minimum(1.0, clip / (norm + 1e-6)) if clip else g

        hyper = {"correction_rate": oracle.auto_rate(kind, graph, 0.9)} if kind in ("pc-dmsgd", "mi-dmsgd") else {}
        return oracle.run(
            kind, graph.weights, clipped, X, lambda step: 0.05, 0.9, 1e-2, steps=STEPS, schedule=schedule, **hyper
        )
    m, v, path = np.zeros_like(X), np.zeros_like(X), [X]
    for k in range(STEPS):  # AdamW, as Loshchilov and Hutter state it
        g = grad(k, X)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        d = -0.01 * (m / (1 - 0.9 ** (k + 1)) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8) + 0.1 * X)
        W = graph.weights(k)
        X = W @ X + d if schedule == "awc" else W @ (X + d)
        path.append(X)
    return np.stack(path)


@pytest.fixture(scope="module")
def fours():
    """What four ranks do; what is refused comes last, for it leaves models in wrappers behind."""
    calls = {"train": (inside_workers.train_each, 2, 2, CASES, STEPS)}
    calls |= {"compressed": (inside_workers.compressed, CODECS), "touched": (inside_workers.touched,)}
    calls |= {"refused": (inside_workers.refused,)}
    return workers.run_together(4, calls)


@pytest.fixture(scope="module")
def sixes():
    return workers.run_together(6, {"train": (inside_workers.train_each, 2, 3, CASES, STEPS)})


@pytest.mark.parametrize("size", everyday([2, 3], [2]))
def test_shards_follow_the_oracle(size, request):
    """Every step's parameters, gathered from the shards, and the consensus distance over all of them."""
    results = request.getfixturevalue({2: "fours", 3: "sixes"}[size])["train"]
    for c, (kind, options) in enumerate(CASES):
        expected = expected_path(2, size, kind, options.get("schedule", "auto"), options.get("max_grad_norm"))
        spread = np.sqrt(((expected[-1] - expected[-1].mean(0)) ** 2).sum(-1).mean())
        ahead = options.get("schedule") == "awc"
        for rank in range(2 * size):
            path, overlaps, (sent, messages), moved, distance, shapes = results[rank][c]
            error = abs(path.double().numpy() - expected[:, rank // size]).max()
            assert error < 1e-5, (kind, options, rank, error)
            assert distance == pytest.approx(spread, rel=1e-3, abs=1e-6)
            assert sent == (STEPS + ahead) * moved and messages % (STEPS + ahead) == 0
            assert shapes == {"DTensor(5, 7)"}
            if kind != "gossip-adamw":
                assert overlaps is (not ahead and "max_grad_norm" not in options)


@pytest.mark.parametrize("codec", CODECS)
def test_compressed_shards_keep_the_mean(fours, codec):
    machines = [fours["compressed"][rank][codec] for rank in (0, 2)]
    for step in zip(*(path for path, _ in machines), strict=True):
        before, g, after = (torch.stack(values).mean(0) for values in zip(*step, strict=True))
        assert (before - 0.05 * (g + 1e-2 * before) - after).abs().max() < 1e-13
    for rank in (1, 3):
        path, distance = fours["compressed"][rank][codec]
        assert torch.equal(path[-1][2], machines[rank // 2][0][-1][2]) and 0 < distance < 0.1


def test_what_the_user_writes_is_kept(fours):
    """Parameters set between steps, which all workers then have, bit for bit; accumulation, mixed precision."""
    for schedules in fours["touched"]:
        for x in schedules:
            assert torch.equal(x, torch.full_like(x, 0.25))


def test_what_averages_twice_is_refused(fours):
    """The same on every rank, before anything is sent, or in the first step if it was wrapped after that."""
    for errors in fours["refused"]:
        assert "fully_shard(model, mesh=mesh" in errors["hybrid"]
        assert "exchange their different shards" in errors["world"]
        assert "some parameters are sharded" in errors["partly"]
        assert "exchange their different shards" in errors["turned"]
        for name in ("ddp", "ddp of gossip", "ddp later"):
            assert "Pass the model unwrapped" in errors[name], errors
        assert "FSDP1" in errors["fsdp1"] and "FSDP shards them" in errors["lars"]
