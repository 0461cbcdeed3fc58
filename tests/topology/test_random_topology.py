"""Promises about graphs that are drawn anew at every step:

- every process draws the same; seeds differ; a step can be drawn without those before it; wrong draws are refused;
- the Lyapunov exponents that `rho` and `consensus_growth` estimate are the known ones, within three standard errors;
- the certificate refuses, says that it is an estimate, and is a number where averages are exact;
- training on them by real processes is the float64 simulation, within 1e-5.
"""

import math
import pickle
from functools import partial

import numpy as np
import oracle
import pytest
import random_workers
import torch
import workers
from everyday import everyday
from layers_of_users import spaced
from test_processes import STEPS, network_gradient

from fused_dlam import consensus_growth, topology
from fused_dlam.theory import stability
from fused_dlam.tools.launch import run_workers
from fused_dlam.topology import RandomTopology, circulant, od_equidyn, ou_equidyn, random_match, sparse

NAMES = ["random-match", "od-equidyn", "ou-equidyn"]
BUILD = [random_match, od_equidyn, ou_equidyn]

GRAPHS = [*NAMES, random_match(5, seed=3).every(2), ou_equidyn(5).with_global_average(4).lazy()]
TRAINED = {
    "ou-equidyn": {"schedule": "awc", "bucket_mb": 1e-4},  # posts the next step's receives early
    "random-match": {"topology": partial(spaced, every=2, exact=7, name="random-match")},
}


@pytest.fixture(scope="module")
def pairs():
    calls = {"draw": (random_workers.drawn, GRAPHS, 12), "other seeds": (random_workers.refused_seeds,)}
    return workers.run_together(2, calls)


@pytest.fixture(scope="module")
def fives():
    calls = {}
    for name, options in TRAINED.items():
        options = {"topology": name, **options}
        calls[name] = (workers.train, "pc-dmsgd", options.pop("topology"), options)
    return workers.run_together(5, calls)


# -- the draws ---------------------------------------------------------------------------------------------------------


def test_every_process_draws_the_same(pairs):
    here = random_workers.drawn(0, GRAPHS, 12)
    for there in pairs["draw"]:
        assert np.array_equal(here, there)


@pytest.mark.parametrize("build", BUILD)
def test_seeds_and_steps(build):
    """Other seeds draw otherwise; a step is the same whenever it is asked for, far out too."""
    one, again, other = build(9), build(9), build(9, seed=2**63)
    order = [3, 10**9, 0, 77, 3, *range(20), 10**9, 3]
    first = {t: one.weights(t) for t in range(200)} | {10**9: one.weights(10**9)}
    assert all(np.array_equal(again.weights(t), first[t]) for t in order)
    assert sum(np.array_equal(other.weights(t), first[t]) for t in range(200)) < 40  # of a few matrices some recur
    assert pickle.loads(pickle.dumps(one)).weights(77).tolist() == first[77].tolist()


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_random_matchings_are_uniform(n):
    """All perfect matchings, one worker left out if n is odd, each equally often: chi-squared at 1e-6, fixed draws."""
    steps = 3000
    top = random_match(n)
    hears = [[top.peers(i, t).sources for i in range(n)] for t in range(steps)]
    kinds = [tuple((i, j) for i, sources in enumerate(row) for j in sources if i < j) for row in hears]
    count = {kind: kinds.count(kind) for kind in set(kinds)}
    number = {2: 1, 3: 3, 4: 3, 5: 15}[n]
    assert len(count) == number and all(len(kind) == n // 2 for kind in count)
    chi2 = sum((c - steps / number) ** 2 / (steps / number) for c in count.values())
    assert chi2 < {1: 1, 3: 28, 15: 57}[number]


def bad_draw(W, step):
    return W if step == 40 else circulant(4, (1, 2))


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (circulant(5, (1,)), "step 40: 5 workers instead of 4"),
        (circulant(4, {0: 0.5, 1: 0.6}), "step 40: every row must sum to one"),
        (circulant(4, {0: 1.5, 1: -0.5}), "step 40: weights must not be negative"),
        (circulant(4, {0: float("nan"), 1: 1.0}), "step 40: weights must be finite"),
        (sparse(4, [0, 1, 2, 3], [1, 2, 1, 1], 0.5), "step 40: every column must sum to one"),
        (circulant(4, {0: 0.1, 1: 0.3, 2: 0.3, 3: 0.3}), "step 40: a worker hears from 3 others, more than 2"),
    ],
)
def test_a_wrong_draw_is_refused(W, message):
    top = RandomTopology(partial(bad_draw, W), 4, degree=2)
    top.phase(39)
    with pytest.raises(ValueError, match=message):
        top.phase(40)


def test_workers_that_never_meet_are_refused():
    with pytest.raises(ValueError, match="'split' is not connected: within 128 steps"):
        RandomTopology(lambda step: circulant(4, (2,)), 4, degree=1, name="split")
    one_way = RandomTopology(lambda step: circulant(6, (1 if step % 5 == 0 else 0,)), 6, degree=1)
    assert one_way.rho < 1


@pytest.mark.parametrize("build", BUILD)
def test_thousands_of_workers_stay_small(build):
    """4,096 workers: no matrix is formed, peers are consistent."""
    top = build(4096)
    i, j = top.phase(7).heard
    assert len(i) <= 4096
    for rank in (0, 1234, 4095):
        peers = top.peers(rank, 7)
        assert all(rank in top.peers(j, 7).destinations for j in peers.sources)
        assert all(rank in top.peers(i, 7).sources for i in peers.destinations)


# -- the exponents -----------------------------------------------------------------------------------------------------


def agrees(estimate, error, exact, floor=1e-9):
    assert abs(estimate - exact) <= 3 * error + floor, (estimate, error, exact)


@pytest.mark.parametrize("n", [3, 5, 6, 8])
def test_rho_of_commuting_circulants(n):
    """Random rotations act on a Fourier mode as numbers l_a: its exponent is the mean of log |l_a| over the offsets."""
    top = od_equidyn(n)
    l = np.array([circulant(n, {0: 1 - (n - 1) / n / 2, a: (n - 1) / n / 2}).symbol()[1:] for a in range(1, n)])
    agrees(top.rho, top.contraction.error, np.exp(np.log(abs(l)).mean(axis=0).max()))
    agrees(*stability.growth("dsgd", top), np.exp(np.log(abs(l)).mean(axis=0).max()))


def test_rho_of_three_workers_random_matchings():
    """A pair's average projects the plane of disagreement onto a line; two lines meet at 60 degrees. The next pair is
    another one with probability 2/3 and then halves what is left: 2^(-2/3) per step."""
    top = random_match(3)
    agrees(top.rho, top.contraction.error, 2 ** (-2 / 3))
    assert top.contraction.error < 0.02


@pytest.mark.parametrize(
    "top",
    [topology.one_peer_exponential(12), topology.ring(8), topology.exponential(6), topology.base_k(5).lazy()],
    ids=repr,
)
def test_a_periodic_graph_treated_as_if_it_were_random(top):
    """The estimate is the spectral radius, where disagreement grows too."""
    drawn = RandomTopology(top.phase, top.n, top.most_messages)
    agrees(drawn.rho, drawn.contraction.error, top.rho, 1e-3)
    for method in ("dsgd", "dmsgd", "da-dmsgd", "decentlam", "qg-dmsgd", "pc-dmsgd"):
        hyper = {"correction_rate": 0.01} if method == "pc-dmsgd" else {}
        for momentum in (0.5, 0.9):
            exact = consensus_growth(method, top, momentum, **hyper)
            agrees(*stability.growth(method, drawn, momentum, **hyper), exact, 1e-4)


def test_exact_averages_are_no_obstacle():
    """Two workers always average exactly; four do when two pairings in a row differ. All growths are numbers."""
    pair, full = random_match(2), topology.full(2)
    assert pair.rho == 0.0 and pair.slowest_rho == pytest.approx(full.slowest_rho)
    averaged = random_match(6).with_global_average(3)
    for method in ("dsgd", "dmsgd", "da-dmsgd", "decentlam", "qg-dmsgd", "pc-dmsgd"):
        agrees(*stability.growth(method, pair), consensus_growth(method, full), 1e-4)
        growth, error = stability.growth(method, averaged)
        assert 0 <= growth < 1.2 and 0 <= error < 0.01, method  # not so if there is a NaN
    assert stability.growth("pmsgd", pair) == stability.growth("dmsgd", random_match(1)) == (0.0, 0.0)
    assert random_match(4).rho == 0.0 and 0.3 < random_match(4).slowest_rho < 0.6


def test_local_steps_count():
    """One exchange in every k steps contracts by the k-th root per step; the exchanges are the same ones."""
    top = random_match(9)
    for k in (2, 5):
        seldom = top.every(k)
        agrees(seldom.rho, 0.0, top.rho ** (1 / k), 1e-3)
        assert seldom.slowest_rho == seldom.rho
    assert consensus_growth("pc-dmsgd", top.every(16), 0.9, correction_gain=math.inf) < 1


def test_estimates_are_the_same_every_time():
    assert random_match(8).contraction == random_match(8).contraction
    assert stability.growth("pc-dmsgd", od_equidyn(8)) == stability.growth("pc-dmsgd", od_equidyn(8))
    assert random_match(9).contraction != random_match(9, seed=1).contraction


# -- the certificate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", everyday([3, 8, 25], [8]))
@pytest.mark.parametrize("build", BUILD)
def test_pc_dmsgd_is_stable_on_random_graphs(build, n):
    top = build(n)
    for momentum, gain in ((0.5, math.inf), (0.9, 1.0), (0.9, math.inf), (0.99, math.inf)):
        assert stability.is_stable("pc-dmsgd", top, momentum, correction_gain=gain), (momentum, gain)


def test_a_refusal_says_that_it_is_an_estimate():
    """By real processes: DecentLaM on random matchings. What is recommended instead is accepted."""
    options = [{"method": "decentlam", "momentum": 0.95}, {"method": "mi-dmsgd", "momentum": 0.95}]
    for text, accepted in run_workers(random_workers.refused, 3, "ou-equidyn", options):
        assert "'decentlam' is unstable on 'ou-equidyn' with 3 workers" in text
        assert "an estimate, +- 0.0" in text and "method='mi-dmsgd'" in text
        assert accepted == "no error"


def test_a_growth_within_two_errors_of_one_is_refused(monkeypatch):
    monkeypatch.setattr(stability, "growth", lambda *args, **hyper: (0.9990, 0.0006))
    assert not stability.is_stable("dmsgd", random_match(4), 0.9)
    monkeypatch.setattr(stability, "growth", lambda *args, **hyper: (0.9990, 0.0004))
    assert stability.is_stable("dmsgd", random_match(4), 0.9)


def test_different_seeds_are_noticed(pairs):
    """Before anything is sent, on every rank."""
    for text in pairs["other seeds"]:
        assert "random-match, seed = 1" in text


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), TRAINED.items())
def test_training_is_the_simulation(name, options, fives):
    n = 5
    top = topology.get(name, n)
    if name == "random-match":
        top = top.every(2).with_global_average(7)
    model = workers.Tied(torch.float64)
    expected = oracle.run(
        "pc-dmsgd", top.weights, network_gradient(n), np.tile(workers.trained(model).numpy(), (n, 1)), workers.lr_at,
        0.9, 0.0, steps=STEPS, schedule=options.get("schedule", "auto"),
        correction_rate=oracle.auto_rate("pc-dmsgd", top, 0.9),
    )  # fmt: skip
    for rank, got in enumerate(fives[name]):
        error = abs(got["path"][-1].double().numpy() - expected[-1, rank]).max() / abs(expected[-1]).max()
        assert error < 1e-5, (rank, error)
