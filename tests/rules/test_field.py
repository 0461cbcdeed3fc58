"""Promises about NIDS, EXTRA, LED, ProxSkip and K-GT, in float64 in one process:

- without momentum they are their papers' own recursions (field_forms.py), to 1e-12, on symmetric static graphs of 1, 2,
  3, 5 and 8 workers, with one local step in a round and with several;
- they are exact: below 1e-12 of the distance to the optimum, and with momentum 0.9 where their certificate allows it;
- where two of them are one method, they are one to 1e-12;
- on directed graphs, and on those that change, what the certificate says is what a dense loop of the method does;
- real workers train as they are simulated, to 1e-5 in float32: the rounds are counted by all ranks alike.

What happens with weight decay, schedules of rates, layers and missing gradients is in the other files of this folder
and of tests/optim, which take every method.
"""

import functools
from itertools import islice

import field_forms as forms
import numpy as np
import oracle
import pytest
import workers
from everyday import everyday

from fused_dlam import Topology, consensus_growth, rate_limit, rules, simulate, topology
from fused_dlam.tools.launch import run_workers
from fused_dlam.topology.drawn import generator
from fused_dlam.topology.skipped import COIN

LR, P = 0.05, 0.4
GRAPHS = [("ring", n) for n in (1, 2, 3, 5, 8)] + [("star", 5), ("grid", 8), ("symmetric-exponential", 8)]


def coin(k):
    return generator(7, k, COIN).random_sample() < P


def sometimes(graph):
    return topology.sometimes(graph, P, seed=7)


CASES = {  # method and what it is simulated on, as a function of the graph; its hyper-parameters; the paper's form
    "nids": ("nids", lambda g: g, {}, forms.nids),
    "extra": ("extra", lambda g: g, {}, forms.extra),
    "led, 1": ("led", lambda g: g, {}, functools.partial(forms.led, K=1)),
    "led, 4": ("led", lambda g: g.every(4), {}, functools.partial(forms.led, K=4)),
    "proxskip, 1": ("proxskip", lambda g: g, {}, functools.partial(forms.proxskip, p=1, coin=lambda k: True)),
    "proxskip": ("proxskip", sometimes, {"probability": P}, functools.partial(forms.proxskip, p=P, coin=coin)),
    "k-gt, 1": ("k-gt", lambda g: g, {}, functools.partial(forms.k_gt, K=1)),
    "k-gt, 3": ("k-gt", lambda g: g.every(3), {}, functools.partial(forms.k_gt, K=3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name, n", GRAPHS)
def test_they_are_their_papers_recursions(name, n, case):
    """From unlike starts, for 60 steps, growing or not."""
    method, of, hyper, form = CASES[case]
    graph, grad = topology.get(name, n), oracle.LeastSquares(n, gradient_noise=0.3, seed=n)
    x0 = np.random.default_rng(n).standard_normal((n, 3))
    expected = np.stack([x0, *islice(form(graph.weights(), grad, x0, LR), 60)])
    ours = simulate(method, of(graph), grad, x0, 60, LR, 0.0, **hyper)
    scale = np.maximum.accumulate(abs(expected).max(axis=(1, 2)))
    assert (abs(ours - expected).max(axis=(1, 2)) <= 1e-12 * scale).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name, n", everyday([g for g in GRAPHS if g[1] > 1], [("ring", 5)]))
def test_they_are_exact(name, n, case, momentum):
    """An even ring has an eigenvalue of -1/3, at which LED ends: there on (I + W)/2."""
    method, of, hyper, _ = CASES[case]
    graph, grad = topology.get(name, n), oracle.LeastSquares(n, seed=n)
    graph = of(graph.lazy() if method == "led" else graph)
    assert consensus_growth(method, graph, momentum, **hyper) < 1
    x = simulate(method, graph, grad, np.zeros(3), 4000, LR if momentum == 0 else 0.004, momentum, **hyper)
    distance = abs(x[-1] - grad.optimum).max() / abs(grad.optimum).max()
    assert distance < 1e-12
    assert momentum or abs(x[1] - grad.optimum).max() > 0.1 * abs(grad.optimum).max()


def test_methods_that_are_one():
    graph, grad = topology.ring(5), oracle.LeastSquares(5, gradient_noise=0.3)
    x0 = np.random.default_rng(0).standard_normal((5, 3))

    def run(method, top, x0=x0, momentum=0.9, steps=100, **hyper):
        return simulate(method, top, grad, x0, steps, 0.02, momentum, 0.01, **hyper)

    def same(a, b):
        return abs(a - b).max() <= 1e-12 * abs(b).max()

    assert np.array_equal(run("led", graph), run("d2-dmsgd", graph))
    assert np.array_equal(run("proxskip", graph), run("exact-diffusion", graph))
    assert same(run("led", graph.lazy()), run("exact-diffusion", graph))
    assert same(run("led", graph.lazy().every(4)), run("proxskip", graph.every(4), probability=0.25))
    assert same(run("k-gt", graph, momentum=0.0), run("gradient-tracking", graph, momentum=0.0))
    plain = oracle.LeastSquares(5)  # of which every step has the same gradient
    ours = simulate("nids", graph, plain, x0, 100, 0.02, 0.0)
    theirs = simulate("exact-diffusion", graph, plain, x0 - 0.02 * plain(0, x0), 99, 0.02, 0.0)
    assert same(ours[1:], theirs) and not same(run("nids", graph), run("exact-diffusion", graph))


def dense_growth(form, top, hyper, rounds=400):
    """Of the disagreement per step, without gradients, followed in a dense loop whose matrices are those of `top`."""
    n, x = top.n, np.random.default_rng(3).standard_normal((top.n, 1))
    c, z, since, first, sizes = np.zeros_like(x), np.zeros_like(x), 0, True, []
    for k in range(rounds):
        W, since = top.weights(k), since + 1
        exchanges = (W != np.eye(n)).any()
        K, since = (since, 0) if exchanges else (since, since)
        half = (W + np.eye(n)) / 2
        if form == "extra":
            x, c = W @ x - c, c - (W - half) @ x
        elif form == "k-gt":
            z, x = z + c, x - c
            x = W @ x
            if exchanges:
                c, z = c + (W - np.eye(n)) @ z / K, 0 * z
        else:
            M = W if form == "led" else np.eye(n) if form == "nids" and first else half
            share = {"led": 1 / K, "nids": 1.0, "proxskip": hyper.get("probability", 1.0)}[form]
            phi = x - c
            x = M @ phi
            c = c + share * (phi - x)
        first = False
        x, c, z = (value - value.mean(axis=0) for value in (x, c, z))
        size = np.sqrt((x**2).sum() + (c**2).sum() + (z**2).sum())
        if size < 1e-300:
            return 0.0
        x, c, z = x / size, c / size, z / size
        sizes.append(size)
    return np.exp(np.log(sizes[rounds // 4 :]).mean())


DIRECTED = [
    topology.one_way_ring(5),
    topology.exponential(8),
    topology.one_peer_exponential(8),
    topology.base_k(5),
    topology.one_peer_exponential(5).every(3),
    topology.exponential(3).lazy().every(2),
    Topology([topology.ring(5).weights(), topology.one_way_ring(5).weights()], "a ring and a one-way ring"),
]


@pytest.mark.parametrize("top", DIRECTED, ids=repr)
@pytest.mark.parametrize("form", ["nids", "extra", "led", "proxskip", "k-gt"])
def test_directed_and_changing_graphs(form, top):
    """The certificate's growth at momentum 0 is what the loop measures, to 0.01, and on the right side of one."""
    hyper = {"probability": 0.5} if form == "proxskip" else {}
    growth = consensus_growth(form, top, 0.0, **hyper)
    measured = dense_growth(form, top, hyper, rounds=1200)
    assert measured == pytest.approx(growth, abs=0.01) or max(measured, growth) < 0.2  # a nilpotent map, but rounding
    assert abs(growth - 1) < 0.01 or (measured < 1) == (growth < 1)


def test_k_gt_is_stable_where_the_others_are_not():
    graph = topology.one_way_ring(8)
    assert {m: consensus_growth(m, graph, 0.0) < 1 for m in ("nids", "extra", "led", "proxskip", "k-gt")} == {
        "nids": False, "extra": False, "led": False, "proxskip": False, "k-gt": True,
    }  # fmt: skip


@pytest.mark.parametrize("name, n", [("ring", 8), ("ring", 5), ("star", 5), ("full", 5)])
def test_the_range_of_extra(name, n):
    """For equal curvature 1/2 + 3/4 (1 + lambda), the smallest eigenvalue of W: by hand, from z = -1."""
    smallest = np.linalg.eigvalsh(topology.get(name, n).weights()).min()
    assert rate_limit("extra", topology.get(name, n), 0.0) == pytest.approx(0.5 + 0.75 * (1 + smallest), rel=1e-3)
    assert rate_limit("exact-diffusion", topology.get(name, n), 0.0) == pytest.approx(2, rel=1e-3)


def test_led_wants_rounds_of_one_length():
    """By chance a round of one step undoes a long one's correction at full strength; ProxSkip does not."""
    graph = topology.sometimes(topology.ring(8), 0.3)
    assert consensus_growth("led", graph, 0.0) > 1 > consensus_growth("proxskip", graph, 0.0, probability=0.3)


# -- topology.sometimes ------------------------------------------------------------------------------------------------


def test_sometimes():
    """A coin a step, the same on every rank, of its seed; the rest is the graph's."""
    inner = topology.one_peer_exponential(5)
    once, again, other = (topology.sometimes(inner, 0.3, seed) for seed in (0, 0, 1))
    at = [topology.exchanges(once, k) for k in range(1000)]
    assert at == [topology.exchanges(again, k) for k in range(1000)] and once.name == again.name != other.name
    assert at != [topology.exchanges(other, k) for k in range(1000)]
    assert 250 < sum(at) < 350
    for k in range(50):
        assert np.array_equal(once.weights(k), inner.weights(k) if at[k] else np.eye(5))
    assert topology.sometimes(inner, 1) is inner and topology.exchanges(topology.ring(1), 0)
    assert once.period is None and once.rho == pytest.approx(inner.rho**0.3, abs=0.05) and once.is_doubly_stochastic


def test_what_sometimes_refuses():
    for p in (0, -0.1, 1.5, True, "0.3", None):
        with pytest.raises(ValueError, match=r"the probability of an exchange must be in \(0, 1\]"):
            topology.sometimes(topology.ring(4), p)
    with pytest.raises(ValueError, match="hardly ever meet"):
        topology.sometimes(topology.ring(4), 1e-6)
    with pytest.raises(ValueError, match="seed must be an integer"):
        topology.sometimes(topology.ring(4), 0.5, -1)
    with pytest.raises(TypeError, match=r"sometimes\(\) needs a Topology"):
        topology.sometimes("ring", 0.5)


def test_a_rule_without_rounds_is_told_of_none():
    """`exchanges` is no field of h, and reaches `derive` only where the rule asks for it."""
    assert "exchanges" not in rules.led.H._fields and "exchanges" not in rules.dmsgd.H._fields
    memory = {}
    lengths = [
        rules.k_gt.scalars(1.0, 0.0, 0.0, memory=memory, exchanges=k in (2, 3, 7)).inverse_round for k in range(9)
    ]
    assert [1 / v for v in lengths] == pytest.approx([1, 1, 3, 1, 1, 1, 1, 4, 4])


# -- real workers ------------------------------------------------------------------------------------------------------


def test_they_are_trained_as_they_are_simulated():
    """Three processes, float32, 50 steps, with rounds of 3 steps and by chance: within 1e-5 of float64."""
    from test_processes import network_gradient

    graphs = [topology.ring(3).lazy().every(3), sometimes(topology.ring(3).lazy())]
    cases = [("led", graphs[0], {}), ("k-gt", graphs[0], {}), ("k-gt", graphs[1], {"momentum": 0.5}),
             ("proxskip", graphs[1], {"probability": P, "schedule": "awc"}), ("nids", graphs[0], {"momentum": 0.5}),
             ("extra", topology.ring(3).lazy(), {})]  # fmt: skip
    results = run_workers(workers.train_each, 3, [(m, g, {**o, "allow_unstable": True}) for m, g, o in cases], 50)
    x0 = np.tile(workers.trained(workers.Tied()).double().numpy(), (3, 1))
    for c, (method, graph, options) in enumerate(cases):
        momentum = options.pop("momentum", 0.9)
        path = simulate(method, graph, network_gradient(3), x0, 50, workers.lr_at, momentum, **options)
        assert abs(path[-1] - path[0]).max() > 1e-2
        for rank in range(3):
            assert abs(results[rank][c]["path"][-1].double().numpy() - path[-1, rank]).max() < 1e-5, method
