"""Promises about `consensus_growth`, without gradients:

- it is what a simulation of the disagreement measures, to 1e-5 per step;
- it is the same by whichever path it is computed: Fourier modes, eigenvalues or the dense map;
- long periods neither overflow nor vanish.
"""

import itertools
import math
import warnings

import numpy as np
import oracle
import pytest
from hard_graphs import GOSSIP, matchings, one_way_ring, row_stochastic

from fused_dlam import Topology, consensus_growth, topology
from fused_dlam.theory import stability

# -- it is what happens ------------------------------------------------------------------------------------------------


def measured_growth(method, top, momentum, schedule="atc", **hyper):
    """Growth per step of the disagreement, read off a run of the oracle that is kicked at random and then left alone.

    Many columns of kicks, over four steps or more, span all the disagreement that there can be. What is seen of it
    during one period and during the next is related by a linear map, found by least squares; its spectral radius is
    the growth.
    """
    Ws, T, columns = [top.weights(k) for k in range(top.period)], top.period, 5 * top.n
    kicked, seen = math.ceil(4 / T) * T, T + 4
    kicks = np.random.default_rng(0).standard_normal((kicked + 1, top.n, columns))
    if method in ("pc-dmsgd", "mi-dmsgd"):
        hyper.setdefault("correction_rate", oracle.auto_rate(method, top, momentum))
    x = oracle.run(
        method,
        lambda k: Ws[k % T],
        lambda k, x: kicks[k] if k < kicked else np.zeros_like(x),
        kicks[-1],
        lambda k: 1.0,
        momentum,
        0.0,
        steps=kicked + T + seen,
        schedule=schedule,
        **hyper,
    )
    x = x - x.mean(axis=1, keepdims=True)
    before, after = (x[start : start + seen].reshape(-1, columns) for start in (kicked, kicked + T))
    U, sizes, V = np.linalg.svd(before, full_matrices=False)
    rank = int((sizes > 1e-10).sum())
    if rank == 0:
        return 0.0
    return abs(np.linalg.eigvals(U[:, :rank].T @ after @ V[:rank].T / sizes[:rank])).max() ** (1 / T)


@pytest.mark.parametrize("momentum", [0.8, 0.9])
@pytest.mark.parametrize(
    "top",
    [
        topology.ring(8),
        topology.star(5),
        topology.exponential(8),
        one_way_ring(6),
        topology.one_peer_exponential(12),
        topology.one_peer_hypercube(8),
        topology.one_peer_exponential(8).every(3),
        topology.one_peer_exponential(6).with_global_average(5),
        matchings(8, 6),
        row_stochastic(5, 1),
        row_stochastic(5, 4),
    ],
    ids=repr,
)
def test_the_certificate_is_what_a_simulation_measures(top, momentum):
    """For every method and schedule, growing or shrinking, to 1e-5 per step."""
    for method in GOSSIP:
        for schedule in {"da-dmsgd": ("atc",), "awc-dmsgd": ("awc",)}.get(method, ("atc", "awc")):
            growth = consensus_growth(method, top, momentum, schedule=schedule)
            measured = measured_growth(method, top, momentum, schedule)
            if method == "qg-dmsgd":  # momentum on a mode that W kills is never seen in x; it decays by mu = beta
                measured = max(measured, momentum) if growth == pytest.approx(momentum, abs=1e-5) else measured
            if max(growth, measured) ** top.period > 1e-12:  # below, the root of a rounding error
                assert measured == pytest.approx(growth, abs=1e-5), (method, schedule)


def test_gain_and_rate_enter_the_certificate():
    top = topology.one_peer_exponential(12)
    for gain, rate in itertools.product((1.0, 4.0, math.inf), (0.002, 0.03, 0.2)):
        hyper = {"correction_gain": gain, "correction_rate": rate}
        growth = consensus_growth("pc-dmsgd", top, 0.9, **hyper)
        assert measured_growth("pc-dmsgd", top, 0.9, **hyper) == pytest.approx(growth, abs=1e-5), hyper
    for mu in (0.1, 0.97):
        growth = consensus_growth("qg-dmsgd", top, 0.9, mu=mu)
        assert measured_growth("qg-dmsgd", top, 0.9, mu=mu) == pytest.approx(growth, abs=1e-5), mu


# -- by whichever path -------------------------------------------------------------------------------------------------

# Graphs whose matrices at n = 8 have no eigenvectors in common.
WITHOUT_MODES = [
    "one-peer-ring",
    "inner-outer-exponential",
    "inner-outer-ring",
    "random-match",
    "od-equidyn",
    "ou-equidyn",
]


class WithoutModes(Topology):
    """The certificate must take the long way: the dense map of all workers."""

    modes = None


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize(
    "top",
    [
        *(topology.get(name, 8) for name in topology.FAMILY if name not in ("full", *WITHOUT_MODES)),
        topology.one_peer_exponential(12),
        topology.one_peer_exponential(5).every(3),
        Topology([topology.star(6).weights(), topology.full(6).weights(), topology.star(6).lazy().weights()], "stars"),
        row_stochastic(6, 1),
    ],
    ids=repr,
)
def test_modes_and_the_dense_map_agree(top, momentum):
    """Per step to 1e-8, wherever there are modes; over a period to 1e-13 where it averages exactly (the root of a
    rounding error is not small)."""
    assert top.modes is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = WithoutModes([top.weights(t) for t in range(top.period)])
    for method in GOSSIP:
        by_modes, by_map = consensus_growth(method, top, momentum), consensus_growth(method, dense, momentum)
        if min(by_modes, by_map) ** top.period < 1e-13:
            assert max(by_modes, by_map) ** top.period < 1e-13, method
        else:
            assert by_modes == pytest.approx(by_map, abs=1e-8), method


def test_a_circulant_is_the_same_written_as_a_matrix():
    for top in (topology.exponential(8), topology.one_peer_exponential(6)):
        dense = Topology([top.weights(t) for t in range(top.period)])
        for method in GOSSIP:
            assert consensus_growth(method, dense) == pytest.approx(consensus_growth(method, top), abs=1e-8), method


def test_exact_averages_have_nothing_to_disagree_on():
    for method in ("psgd", "pmsgd"):
        assert consensus_growth(method, topology.ring(8)) == 0.0
    assert all(consensus_growth(method, topology.ring(1)) == 0.0 for method in GOSSIP)
    assert consensus_growth("dsgd", topology.full(8)) == pytest.approx(0, abs=1e-12)


def test_workers_that_only_swap_never_agree():
    """W = [[0, 1], [1, 0]] is doubly stochastic and connected, but contracts nothing."""
    swap = Topology([[0.0, 1.0], [1.0, 0.0]])
    assert swap.rho == pytest.approx(1) and consensus_growth("dsgd", swap) == pytest.approx(1)


def test_long_periods_neither_overflow_nor_vanish():
    """However long a random sequence is, its growth is a number, and so is the rate chosen for it."""
    once = topology.one_peer_exponential(16)
    for k in (400, 1500):
        for phases in ([*once.phases] * k, [phase.dense() for phase in once.phases] * (k // 10)):
            growth = consensus_growth("decentlam", Topology(phases))
            assert growth == pytest.approx(consensus_growth("decentlam", once), abs=1e-6)
    once = one_way_ring(16)
    for k in (500, 3000):
        growth = consensus_growth("pc-dmsgd", Topology([*once.phases] * k))
        # Within the long period disagreement falls below 0.22, in the short one not: `slowest_rho` differs a little.
        assert growth == pytest.approx(consensus_growth("pc-dmsgd", once), abs=1e-4)


def test_the_error_is_that_of_an_estimate():
    """`growth` adds a standard error: zero where the matrices repeat, above zero on a random graph."""
    for top in (topology.one_peer_exponential(8), topology.ring(5)):
        assert stability.growth("dmsgd", top) == (consensus_growth("dmsgd", top), 0.0)
    factor, error = stability.growth("decentlam", topology.get("random-match", 8))
    assert factor > 1 and 0 < error < 0.01
