"""Promises of `PushSum` and `PairGossip`, with real processes over gloo:

- with nothing in flight between steps they are what the equations say, to the last digits, for 2, 3 and 5 workers;
- one worker alone takes the inner optimizer's steps, bit for bit;
- a network with frozen, tied and unused parameters learns, one worker being slower; masses sum to n; parameters
  without a gradient are averaged; schedulers work; `averaged` gives every worker the same and its own back;
- mixing moves the mean of all by roundings alone, in 16 bits too, and brings all together;
- what is saved within drained() is there after loading, and trains on; a NaN on one worker spreads to nobody;
- wrong uses are refused in words; after a loss the others go on, and `averaged` says that it cannot.
"""

import copy

import numpy as np
import pytest
import torch
import unsynchronized_workers as workers_here
from workers import Tied, data, run_together

from fused_dlam import PairGossip, PushSum
from fused_dlam.optim.push_sum import LEAST
from fused_dlam.topology import one_peer_exponential, ring

KINDS = ("PushSum", "PairGossip")
STEPS = 12


def calls_of(n):
    return {
        "push": (workers_here.lockstep, "PushSum", {}, STEPS),
        "by steps": (workers_here.lockstep, "PushSum", {"weigh": "steps", "topology": "ring"}, STEPS),
        "pairs": (workers_here.lockstep, "PairGossip", {}, STEPS),
    }


@pytest.fixture(scope="module")
def three():
    calls = calls_of(3)
    for kind in KINDS:
        calls[f"train {kind}"] = (workers_here.train, kind)
        calls[f"float64 {kind}"] = (workers_here.only_mixing, kind, torch.float64)
        calls[f"bfloat16 {kind}"] = (workers_here.only_mixing, kind, torch.bfloat16)
        calls[f"saved {kind}"] = (workers_here.saved_and_loaded, kind)
        calls[f"nan {kind}"] = (workers_here.not_finite, kind)
    calls |= {
        "starved": (workers_here.starved,),
        "refusals": (workers_here.refusals,),
        "left": (workers_here.left_alone,),
    }
    return run_together(3, calls, deadline=200.0)


def push_sum_oracle(n, destinations, by_mass):
    """[step][rank] -> (z, mass): plain loops over the equations, destinations[rank] in turn."""
    x = [np.linspace(-1, 1, 7) for _ in range(n)]
    p, m = [1.0] * n, [np.zeros(7) for _ in range(n)]
    path = []
    for step in range(STEPS):
        sent = []
        for i in range(n):
            m[i] = 0.9 * m[i] + workers_here.gradient(x[i] / p[i], i, step)
            x[i] = x[i] - 0.05 * m[i] * (p[i] if by_mass else 1.0)
            x[i], p[i] = x[i] / 2, p[i] / 2
            sent.append((destinations[i][step % len(destinations[i])], x[i].copy(), p[i]))
        for j, dx, dp in sent:
            x[j], p[j] = x[j] + dx, p[j] + dp
        path.append([(x[i] / p[i], p[i]) for i in range(n)])
    return path


def in_turn(graph, rank):
    """To whom a rank sends in a period, in the order in which they come up."""
    return list(dict.fromkeys(j for step in range(len(graph.phases)) for j in graph.peers(rank, step).destinations))


def check_lockstep(n, results):
    for name, graph, by_mass in (("push", one_peer_exponential(n), True), ("by steps", ring(n), False)):
        oracle = push_sum_oracle(n, [in_turn(graph, i) for i in range(n)], by_mass)
        for rank, (path, _) in enumerate(results[name]):
            for step, (z, mass) in enumerate(path):
                assert np.allclose(z, oracle[step][rank][0], rtol=0, atol=1e-12), (name, rank, step)
                assert abs(mass - oracle[step][rank][1]) < 1e-14
    x, m = [np.linspace(-1, 1, 7) for _ in range(n)], [np.zeros(7) for _ in range(n)]
    for step in range(STEPS):
        i = step % n
        j = results["pairs"][i][1][step // n]
        m[i] = 0.9 * m[i] + workers_here.gradient(x[i], i, step)
        x[i] = x[i] - 0.05 * m[i]
        x[i] = x[j] = (x[i] + x[j]) / 2
        for rank in range(n):
            assert np.allclose(results["pairs"][rank][0][step][0], x[rank], rtol=0, atol=1e-12), (rank, step)


def test_the_equations(three):
    check_lockstep(3, three)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 5])
def test_the_equations_for_other_numbers(n):
    check_lockstep(n, run_together(n, calls_of(n), deadline=200.0))


@pytest.mark.parametrize("kind", [PushSum, PairGossip])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam])
def test_one_worker_is_the_inner_optimizer(kind, inner):
    paths = []
    for wraps in (kind, lambda optimizer: optimizer):
        model = Tied()
        optimizer = wraps(inner(model.parameters(), lr=0.01))
        for _ in range(10):
            optimizer.zero_grad()
            optimizer.step(lambda model=model: backward(model))
        paths.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


def backward(model):
    loss = model.loss(data(0))
    loss.backward()
    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_learns(kind, three):
    results = three[f"train {kind}"]
    for rank, r in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(r["start"].values(), results[0]["start"].values(), strict=True))
        assert torch.equal(r["frozen"], results[0]["start"]["frozen"])
        assert abs(r["mass"] - 3) < 1e-12 and r["rate"] == pytest.approx(0.05 if rank == 1 else 0.005)
        assert r["back"] and "within averaged()" in r["told"]
        assert all(torch.equal(a, b) for a, b in zip(r["mean"], results[0]["mean"], strict=True))
        squared = sum(float((o - m).double().square().sum()) for s in results
                      for o, m in zip(s["own"], s["mean"], strict=True)) / 3  # fmt: skip
        assert r["distance"] == pytest.approx(squared**0.5, rel=1e-3)
    assert sum(r["last"] for r in results) < 0.9 * sum(r["first"] for r in results)
    names = list(results[0]["start"])
    unused = results[0]["mean"][names.index("unused")] - results[0]["start"]["unused"]
    expected = 1.0 if kind == "PairGossip" else None  # by mass a write counts as much as the mass at that time
    assert expected is None or torch.allclose(unused, torch.full((3,), expected), atol=1e-5)
    assert 0 < float(unused.min()) < 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_mixing_keeps_the_mean(kind, dtype, three):
    for mean, distance in three[f"{dtype} {kind}"]:
        if dtype == "float64":
            assert distance < 1e-3
            if kind == "PairGossip":
                assert torch.allclose(mean, torch.full_like(mean, 2.0), rtol=0, atol=1e-12)
        elif kind == "PairGossip":
            assert torch.equal(mean, torch.full_like(mean, 2.0))  # in float32, and rounded once


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, three):
    for rank, (apart, same, steps, mass, told) in enumerate(three[f"saved {kind}"]):
        assert apart == 0.0 and same and steps == (20 + 5 * rank, 20 + 5 * rank)
        assert abs(mass - 3) < 1e-12 and "one of another model" in told


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_spreads_to_nobody(kind, three):
    assert three[f"nan {kind}"] == [True] * 3


def test_a_worker_that_hears_of_nobody_keeps_some_mass(three):
    """Without a bound 200 halvings would leave none that float32 can hold."""
    for mass, right, total in three["starved"]:
        assert mass >= LEAST / 2 and right and abs(total - 3) < 1e-12
    assert three["starved"][0][0] <= LEAST


def test_refusals(three):
    words = ["wraps a torch.optim.Optimizer", "averages with others already", "do not agree on the parameters",
             "weigh must be", "one form for life", "is trainable, and was frozen", "was closed"]  # fmt: skip
    for told in three["refusals"]:
        assert [kind for kind, _ in told] == ["TypeError", "TypeError", "ValueError", "ValueError",
                                              "RuntimeError", "RuntimeError", "ClosedError"], told  # fmt: skip
        for (_, text), word in zip(told, words, strict=True):
            assert word in text


def test_others_go_on(three):
    for lost, told, finite in three["left"][:2]:
        assert lost == {2} and finite and "cannot be had after a loss (of [2])" in told


def test_no_copies():
    optimizer = PushSum(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)
