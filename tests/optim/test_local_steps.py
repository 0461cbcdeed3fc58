"""Promises of `local_steps=True` and `optimizer.local_step()`, unlike numbers of steps between exchanges:

- with 2, 3 and 5 real processes, counts that are steady, and that are drawn anew for every exchange, every method that
  can do it follows its float64 statement below: within 1e-6 in float32, 1e-12 in float64;
- step() alone is today's step bit for bit, with as many messages;
- at rest all workers' data count alike, whatever the counts; MI-DmSGD has no bias of the local steps' own;
- with steady counts MI-DmSGD is stable up to min(c) / mean(c) of all-reduce's range;
- a checkpoint goes on bit for bit, and between local_step() and step() it is refused;
- within `join()` the mean is over the ranks that take steps;
- what cannot be is refused before anything is sent.
"""

import math

import local_steps_workers as local_workers
import numpy as np
import oracle
import pytest
import torch
import workers
from local_steps_workers import ROUNDS, counts, rests
from test_processes import network_gradient

from fused_dlam import Gossip, GossipSGD, topology
from fused_dlam.layers import SlowMo
from fused_dlam.optim.local_steps import unfit
from fused_dlam.rules import ALL

DECAY = {"weight_decay": 1e-2}
CASES = [
    ({**DECAY}, "drawn"),
    ({**DECAY}, "drawn", "float64"),
    ({**DECAY}, "steady", "float64"),
    ({**DECAY, "bucket_mb": 1e-4}, "steady"),
    ({"schedule": "atc"}, "drawn", "float64"),
    ({"topology": rests}, "drawn", "float64"),
    ({"topology": "full"}, "drawn", "float64"),
    ({"max_grad_norm": 0.2}, "drawn", "float64"),
    ({"method": "nesterov-mi-dmsgd"}, "drawn", "float64"),
    ({"method": "dmsgd", **DECAY}, "drawn", "float64"),
    ({"method": "dsgd", "schedule": "midpoint"}, "drawn", "float64"),
    ({**DECAY}, "drawn", "bfloat16"),
]
TOLERANCE = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 2e-2}
ALONE = [{}, {"method": "dmsgd", **DECAY}, {"topology": rests}, {"max_grad_norm": 0.2}]
BATCHES, LOCAL = (3, 1, 2), (2, 0, 1)


def named(options):
    """For a test's name, which must be the same in all processes."""
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()) or "default"


def follow(
    method, Ws, grad, x0, table, lrs, *, momentum=0.9, decay=0.0, theta=0.5, rate=0.0, gain=300.0, limit=None,
    weighed=True, state=None,
):  # fmt: skip
    """Every worker's parameters after each exchange, [rounds + 1, n, d], from the equations in dense float64.

    Ws(k) is the mixing matrix of exchange k, table[k] the steps that each worker takes up to it, its last one in
    step(). weighed=False: all at the full rate.
    """
    nesterov = method.startswith("nesterov-")
    x = np.array(x0, dtype=np.float64)
    n = len(x)
    m, p, s_last, lr_max = np.zeros_like(x), np.zeros_like(x), np.ones(n), 0.0
    if not method.endswith("mi-dmsgd"):
        rate = 0.0
    path = [x]
    for k, c in enumerate(table):
        W, lr, mean = Ws(k), lrs(k), np.mean(c)
        lr_max = max(lr_max, lr)
        rho = lr / lr_max if lr_max else 0.0
        s = mean / c if weighed else np.ones(n)
        x_0, x = x, x.copy()

        def momentum_step(i, g, x, lr=lr):
            """-d of a local step at the full rate, without p."""
            norm = np.linalg.norm(g)
            g = (g if limit is None else g * min(1.0, limit / (norm + 1e-6))) + decay * x[i]
            u = momentum * m[i] + g
            m[i] = u if method != "dsgd" else 0.0
            return lr * (g if method == "dsgd" else g + momentum * u if nesterov else u)

        for taken in range(int(max(c)) - 1):
            g = np.array(grad(k, x))
            for i in np.flatnonzero(np.asarray(c) - 1 > taken):
                x[i] = x[i] + s_last[i] * (rho * p[i] - momentum_step(i, g[i], x))
        g = np.array(grad(k, x))
        x = x_0 + (s / s_last)[:, None] * (x - x_0)
        d = s[:, None] * (rho * p - np.stack([momentum_step(i, g[i], x) for i in range(n)]))
        y = x + theta * d
        pull = W @ y - y
        x = x + d + pull
        p = (1 - rate * rho / gain) * p + rate / mean * pull
        s_last = s
        path.append(x)
    return np.stack(path)


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def trained(request):
    n = request.param
    return n, workers.run_together(n, {"all": (local_workers.train_each, CASES, n)})["all"]


@pytest.fixture(scope="module")
def threes():
    calls = {f"alone {k}": (local_workers.alone, options) for k, options in enumerate(ALONE)}
    calls |= {
        "saved": (local_workers.saved, 3),
        "joined": (local_workers.joined, BATCHES, (0, 0, 0)),
        "joined without": (local_workers.joined, BATCHES, (0, 0, 0), False),
        "joined unlike": (local_workers.joined, BATCHES, LOCAL),
        "none": (local_workers.without_gradients,),
        "misused": (local_workers.misused,),  # last, for it ends in errors
    }
    return workers.run_together(3, calls)


@pytest.mark.parametrize("c", range(len(CASES)), ids=[f"{named(o)}-{'-'.join(rest)}" for o, *rest in CASES])
def test_follows_the_equations(c, trained):
    n, results = trained
    (options, kind, *dtype), method = CASES[c], CASES[c][0].get("method", "mi-dmsgd")
    dtype = dtype[0] if dtype else "float32"
    graph = options.get("topology", "one-peer-exponential")
    graph = graph(n) if callable(graph) else topology.get(graph, n)
    start = np.tile(workers.trained(workers.Tied(torch.float64)).numpy(), (n, 1))
    theta = {"atc": 1.0, "midpoint": 0.5}[options.get("schedule", "midpoint" if "mi-" in method else "atc")]
    settings = dict(
        decay=options.get("weight_decay", 0.0), theta=theta, limit=options.get("max_grad_norm"),
        rate=oracle.auto_rate("mi-dmsgd", graph, 0.9),
    )  # fmt: skip
    run = (method, graph.weights, network_gradient(n), start, counts(n, kind), workers.lr_at)
    expected, unweighed = follow(*run, **settings), follow(*run, **settings, weighed=False)
    scale = abs(expected).max()
    for rank in range(n):
        got = results[rank][c][0].double().numpy()
        assert abs(got - expected[:, rank]).max() / scale < TOLERANCE[dtype], (CASES[c], rank)
    assert abs(expected[-1] - unweighed[-1]).max() / scale > 1e-3, "the weights must act, or nothing was tested"


def test_it_costs_two_numbers(trained):
    """Bytes do not depend on the counts; against step() alone they are an all-reduce of 16 bytes more."""
    n, results = trained
    first, second = results[0][1][1], results[0][2][1]
    assert first == second
    moved = results[0][0][1] - ROUNDS * 2 * (n - 1) / n * 16
    assert moved > 0 and round(moved) % (4 * ROUNDS) == 0


@pytest.mark.parametrize("k", range(len(ALONE)), ids=map(named, ALONE))
def test_step_alone_is_todays_step(k, threes):
    """Bit for bit, with as many messages, and nothing of it is kept."""
    for (on, messages, groups), (off, others, without) in threes[f"alone {k}"]:
        assert torch.equal(on, off)
        assert messages == others
        assert [g["memory"] for g in groups] == [g["memory"] for g in without]


def test_checkpoints(threes):
    """Within a round they are refused; after it training goes on bit for bit; a mean has no worker's weight."""
    for middle, first, second, mean in threes["saved"]:
        assert "state_dict() was called after 1 local steps, whose weight step() will know" in middle
        assert torch.equal(first, second)
        assert mean == threes["saved"][0][3]


def test_join(threes):
    """With equal counts as without the option; else all end after as many steps, near each other."""
    for (steps, with_it), (_, without) in zip(threes["joined"], threes["joined without"], strict=True):
        assert steps == max(BATCHES)
        assert torch.equal(with_it, without)
    assert {steps for steps, _ in threes["joined unlike"]} == {max(BATCHES) + 1}, "local steps at the end count"
    ends = torch.stack([x for _, x in threes["joined unlike"]])
    assert torch.isfinite(ends).all()


def test_without_gradients(threes):
    assert threes["none"] == [(True, True, 7, True)] * 3


def test_misuse_of_several_ranks(threes):
    for told in threes["misused"]:
        assert "local_step() needs local_steps=True in the constructor, on all ranks" in told["without the option"]
        assert "local_step() was called within averaged()" in told["averaged"]
        assert all("works without a GradScaler" in told[m] for m in told if "grad_scaler" in m or "mixed" in m)
        assert "Invalid lr: nan" in told["rate"]
        assert "this optimizer was closed" in told["closed"]
        assert "the workers do not agree on local_steps: rank 0 has True, rank 1 has False" in told["ranks differ"]
        assert len(told) == 7


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "pmsgd"}, "averages parameters, and method 'pmsgd' averages gradients"),
        ({"method": "pc-dmsgd"}, "'pc-dmsgd', whose momentum has the neighbors' pull in it: 'mi-dmsgd', 'dmsgd'"),
        ({"method": "exact-diffusion"}, "another share of the pull"),
        ({"method": "d2-dmsgd"}, "whose correction has a rate of its own"),
        ({"method": "adamw"}, "which counts steps"),
        ({"method": "da-dmsgd"}, "which averages its momentum too"),
        ({"schedule": "awc"}, "schedule='awc' sends meanwhile"),
        ({"overlap": True}, "overlap=True cannot be had"),
        ({"layers": [SlowMo(every=4)]}, "works without layers"),
        ({"nonfinite": "raise"}, "nonfinite='skip'"),
        ({"hierarchical": True}, "is for single ranks"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        GossipSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, local_steps=True, **options)


def test_other_misuse():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="local_steps must be True or False, not 4"):
        GossipSGD([p], lr=0.1, local_steps=4)
    with pytest.raises(RuntimeError, match="Gossip takes no local_step"):
        Gossip(torch.optim.SGD([p], lr=0.1)).local_step()


def test_which_methods_fit():
    """Those whose momentum is the worker's own, of gradients alone, and whose step is in proportion to the rate."""
    fit = {name for name, rule in ALL.items() if not unfit(rule)}
    own = {"dsgd", "dmsgd", "awc-dmsgd", "mi-dmsgd"}
    assert fit == own | {f"nesterov-{name}" for name in own - {"dsgd"}} | {"push-sum"}


def test_one_worker_is_torch_sgd():
    """local_step() and step() in any order: each is a step of momentum SGD."""
    ours, theirs = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    one = GossipSGD([ours], lr=0.1, weight_decay=0.1, local_steps=True)
    two = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1)
    for k in range(12):
        ours.grad, theirs.grad = (torch.arange(4.0) - k for _ in range(2))
        (one.step if k % 3 == 2 else one.local_step)()
        two.step()
        assert torch.allclose(ours, theirs, rtol=1e-6)


# -- where it rests, by the equations that the processes follow --------------------------------------------------------

COUNTS = np.array([5, 5, 5, 1])


def ring_of(n):
    graph = topology.one_peer_exponential(n)
    return graph, oracle.auto_rate("mi-dmsgd", graph, 0.9)


def end(problem, method="mi-dmsgd", lr=0.01, table=None, rounds=1500, **options):
    graph, rate = ring_of(4)
    table = np.tile(COUNTS, (rounds, 1)) if table is None else table
    return follow(method, graph.weights, problem, np.zeros((4, 3)), table, lambda k: lr, rate=rate, **options)[-1]


def test_all_data_count_alike():
    """At rest MI-DmSGD is at the optimum of the sum of losses, exactly without a leak. DmSGD's mean is near it, by a
    bias that falls with the rate, and unweighed near that of the sum of count times loss."""
    problem = oracle.LeastSquares(4)
    weighted = np.linalg.solve((COUNTS[:, None, None] * problem.H).sum(0), (COUNTS[:, None] * problem.c).sum(0))
    apart = np.linalg.norm(weighted - problem.optimum)
    assert apart > 0.05
    assert abs(end(problem, gain=math.inf) - problem.optimum).max() < 1e-9
    assert abs(end(problem) - problem.optimum).max() < 0.02 * apart
    unweighed = end(problem, "dmsgd", lr=1e-3, weighed=False).mean(0)
    assert np.linalg.norm(unweighed - weighted) < 0.1 * apart
    biases = [np.linalg.norm(end(problem, "dmsgd", lr).mean(0) - problem.optimum) for lr in (2e-3, 1e-3)]
    assert 1.7 < biases[0] / biases[1] < 2.3, "of first order"


def test_counts_that_change():
    """Drawn anew for every exchange: the last weights would be wrong for these, and are corrected."""
    problem = oracle.LeastSquares(4)
    table = np.random.default_rng(0).choice([1, 5], (1500, 4), p=[0.3, 0.7])
    table[:, 3] = 1
    far, near = (
        np.linalg.norm(end(problem, "dmsgd", 1e-3, table, weighed=weighed).mean(0) - problem.optimum)
        for weighed in (False, True)
    )
    assert near < 0.15 * far
    assert abs(end(problem, table=table) - problem.optimum).max() < 0.02 * far


def test_the_range_of_rates():
    """Equal curvature 1: stable at 0.95, unstable at 1.05 of 2 (1 + beta) min(c) / mean(c)."""

    def equal(_, x):
        return x - np.arange(12.0).reshape(4, 3)

    limit = 3.8 * COUNTS.min() / COUNTS.mean()
    assert abs(end(equal, lr=0.95 * limit) - np.arange(12.0).reshape(4, 3).mean(0)).max() < 3
    with np.errstate(all="ignore"):
        assert not abs(end(equal, lr=1.05 * limit)).max() < 1e6
