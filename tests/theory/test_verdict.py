"""Promises about `verdict`, the certificate under schemes, without gradients:

- without schemes it is `consensus_growth`;
- under a delay it is the spectral radius of a dense map over a period, formed column by column from plain loops, to
  1e-6; for DSGD on a symmetric graph it is known by hand: stable where 1 - lambda < 2 sin(pi/(4d + 2)) for all
  eigenvalues lambda of W;
- under lost messages and absence it is what plain loops measure over a longer path and other chances, within the two
  errors and a hundredth; a delay that all share comes out the same when it is followed as when it is solved for;
- on its side of one workers agree or part, with data.
"""

import lossy_loops as loops
import networkx as nx
import numpy as np
import oracle
import pytest
from test_schemes import unlike

from fused_dlam import Topology, consensus_growth, simulate, topology, verdict
from fused_dlam.theory import stability
from fused_dlam.theory.verdict import Verdict


def period_map(method, top, beta, d):
    """By loops: what one period makes of the disagreement, the messages under way included, from unit vectors.

    A start is made by an impulse: gradients of the first steps that are unit vectors, and zero from there on. What is
    seen of x over a period and over the next is related by a linear map, whose spectral radius is the growth.
    """
    n, T = top.n, top.period
    kicked, seen = 4 + d, T * (1 + (4 + d) // T) + 4 + 3 * d
    columns = 8 * n
    kicks = np.random.default_rng(0).standard_normal((kicked, n, columns))
    start = T * (1 + kicked // T)
    x = loops.simulate(
        method, top, lambda k, x: kicks[k] if k < kicked else 0.0 * x, kicks[0], start + T + seen, 1.0, beta, delay=d
    )
    x = x - x.mean(axis=1, keepdims=True)
    before, after = (x[at : at + seen].reshape(-1, columns) for at in (start, start + T))
    scale = abs(before).max()
    U, sizes, V = np.linalg.svd(before / scale, full_matrices=False)
    rank = int((sizes > 1e-9).sum())
    return abs(np.linalg.eigvals(U[:, :rank].T @ (after / scale) @ V[:rank].T / sizes[:rank])).max() ** (1 / T)


def test_without_schemes_it_is_the_certificate():
    for method in ("dsgd", "mi-dmsgd", "k-gt", "da-dmsgd", "pmsgd"):
        for top in (topology.ring(8), topology.one_peer_exponential(6), topology.ring(1)):
            for hyper in ({}, {"schedule": "atc"}):
                got = verdict(method, top, 0.8, **hyper)
                assert got == (consensus_growth(method, top, 0.8, **hyper), 0.0)
    drawn = topology.random_match(6)
    assert verdict("dmsgd", drawn) == stability.growth("dmsgd", drawn)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("top", [topology.ring(5).lazy(), topology.exponential(5), topology.one_peer_exponential(5),
                                 topology.star(3).every(2)], ids=repr)  # fmt: skip
def test_a_delay_is_exact(top, d):
    """Without gradients y of gradient tracking goes the way of DmSGD's x, so it grows as that does."""
    for method in ("dmsgd", "exact-diffusion"):
        growth = verdict(method, top, 0.5, delay=d)
        assert growth.error == 0
        assert growth.growth == pytest.approx(period_map(method, top, 0.5, d), abs=1e-6), method
    tracking = verdict("gradient-tracking", top, 0.5, delay=d).growth
    assert tracking == pytest.approx(verdict("dmsgd", top, 0.5, delay=d).growth, abs=1e-5)


@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_the_delay_that_dsgd_bears_is_known_by_hand(d):
    """x' = x + (W - I) x_d: z^(d + 1) - z^d + mu = 0 on the eigenvalue 1 - mu, stable below 2 sin(pi/(4d + 2))."""
    edge = 2 * np.sin(np.pi / (4 * d + 2))
    for mu, stable in ((0.98 * edge, True), (1.02 * edge, False)):
        W = np.array([[1 - mu / 2, mu / 2], [mu / 2, 1 - mu / 2]])
        assert verdict("dsgd", Topology(W), 0.0, delay=d).is_stable is stable, mu


@pytest.mark.parametrize("method", ["dmsgd", "gradient-tracking"])
def test_a_delay_that_is_followed(method):
    """A function that is constant is followed, and a number solved for: to 0.002 and two errors."""
    for top in (topology.ring(5).lazy(), topology.one_peer_exponential(5)):
        exact, followed = verdict(method, top, 0.5, delay=1), verdict(method, top, 0.5, delay=lambda j, i: 1)
        assert abs(exact.growth - followed.growth) < 0.002 + 2 * followed.error


def measured(method, top, beta, runs=24, **schemes):
    """exp(Lyapunov exponent) by plain loops: the mean over runs of the slope from step 25 to 75, and its error.

    Later the disagreement is lost in the rounding of the mean.
    """
    rates = []
    for run in range(runs):
        x = np.random.default_rng(run).standard_normal((top.n, 4))
        path = loops.simulate(method, top, lambda k, x: 0.0 * x, x, 75, 1.0, beta, seed=1000 + run, **schemes)
        size = np.linalg.norm(path - path.mean(axis=1, keepdims=True), axis=(1, 2))
        rates.append((np.log(size[75]) - np.log(size[25])) / 50)
    return np.exp(np.mean(rates)), np.std(rates, ddof=1) / np.sqrt(runs)


SCHEMES = {
    "loss": ({"loss": 0.3}, {"loss": 0.3}),
    "pairs": ({"loss": 0.3, "loss_of": "pairs"}, {"loss": 0.3, "pairs": True}),
    "participation": ({"participation": 0.6}, {"participation": 0.6}),
    "loss, late": ({"loss": 0.3, "delay": 1}, {"loss": 0.3, "delay": 1}),
    "unlike delays": ({"delay": unlike}, {"delay": unlike}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_what_plain_loops_measure(scheme):
    ours, theirs = SCHEMES[scheme]
    top = topology.ring(5).lazy()
    for method, beta in (("dmsgd", 0.3), ("exact-diffusion", 0.3)):
        got = verdict(method, top, beta, **ours)
        rate, error = measured(method, top, beta, order=loops.in_offsets, **theirs)
        assert abs(got.growth - rate) < 0.01 + 2 * (got.error + error), method


def test_a_correction_whose_sum_is_lost_is_at_one():
    """Where workers are absent: with single losses, or on a directed graph; pairs on a symmetric one keep the sum."""
    for graph, options, kept in (
        (topology.ring(5), {"loss": 0.1, "loss_of": "pairs"}, True),
        (topology.ring(5), {"loss": 0.1}, False),
        (topology.exponential(5), {}, False),
    ):
        growth = verdict("gradient-tracking", graph, 0.5, participation=0.8, **options).growth
        assert growth < 0.8 if kept else growth == pytest.approx(1, abs=1e-3)


def test_with_data_workers_agree_or_part():
    """One step late, gradient tracking on a ring of 8 parts; on a W with more weight at home it ends at the optimum."""
    grad, ring = oracle.LeastSquares(8), topology.ring(8)
    for graph, stable in ((ring, False), (ring.lazy(), True)):
        assert verdict("gradient-tracking", graph, 0.0, delay=1).is_stable is stable
        x = simulate("gradient-tracking", graph, grad, np.zeros(3), 3000, 0.02, 0.0, delay=1)
        distance = abs(x[-1] - grad.optimum).max()
        assert distance < 1e-9 if stable else distance > 1e3 or np.isnan(distance)
    x = simulate("exact-diffusion", ring, grad, np.zeros(3), 3000, 0.03, 0.0, loss=0.2, loss_of="pairs")
    assert verdict("exact-diffusion", ring, 0.0, loss=0.2, loss_of="pairs").is_stable
    assert abs(x[-1] - grad.optimum).max() < 1e-9  # pairs keep every sum, and with it exactness


def test_what_is_refused():
    ring = topology.ring(4)
    with pytest.raises(ValueError, match="'pmsgd' averages gradients by all-reduce"):
        verdict("pmsgd", ring, loss=0.1)
    with pytest.raises(ValueError, match="loss must be a probability"):
        verdict("dsgd", ring, loss=2)
    with pytest.raises(TypeError, match="verdict needs a Topology"):
        verdict("dsgd", "ring")
    with pytest.raises(TypeError, match="no hyper-parameter 'los'"):
        verdict("dsgd", ring, los=0.1)
    assert Verdict(0.9, 0.02).is_stable and not Verdict(0.99, 0.01).is_stable


@pytest.mark.parametrize("make", [topology.push, topology.one_peer])
@pytest.mark.parametrize("method", ["push-sum", "push-diging", "push-pull"])
def test_masses(method, make):
    """Without schemes it is `consensus_growth`, also where columns alone sum to one: without momentum that is rho."""
    graph = make(nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 2), (1, 4)]))
    assert verdict(method, graph, 0.0) == (pytest.approx(consensus_growth(method, graph, 0.0), abs=1e-12), 0.0)
    with pytest.raises(ValueError, match="takes mass with it"):
        verdict(method, graph, 0.0, loss=0.1)
