"""Promises about the figures that the documentation states, all without gradients: where DecentLaM diverges, up to
which momentum it does not, and how fast PC-DmSGD forgets; for up to 65,536 workers.
"""

import itertools
import math

import numpy as np
import pytest
from hard_graphs import GOSSIP, one_way_ring

from fused_dlam import Topology, consensus_growth, topology
from fused_dlam.topology import circulant


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("symmetric-exponential", (0.949, 0.949, 0.949, 0.949)),
        ("ring", (0.949, 0.949, 0.949, 0.949)),
        ("exponential", (1.155, 1.237, 1.252, 1.231)),
        ("one-peer-exponential", (1.080, 1.114, 1.196, 1.231)),
        ("one-peer-hypercube", (0.949, 1.052, 1.220, 1.238)),
    ],
)
def test_where_decentlam_diverges(name, figures):
    """beta = 0.9, n = 4, 8, 16, 64, to three digits."""
    for n, figure in zip((4, 8, 16, 64), figures, strict=True):
        assert consensus_growth("decentlam", topology.get(name, n)) == pytest.approx(figure, abs=5.1e-4), n


@pytest.mark.parametrize(
    ("name", "momentum", "figures"),
    [
        ("one-peer-exponential", 0.8, (0.8953, 0.9046, 0.9127, 0.9210, 0.9351, 0.9427, 0.9506, 0.9580)),
        ("one-peer-exponential", 0.9, (0.9488, 0.9535, 0.9569, 0.9615, 0.9674, 0.9716, 0.9759, 0.9798)),
        ("one-peer-exponential", 0.95, (0.9747, 0.9759, 0.9767, 0.9779, 0.9795, 0.9806, 0.9823, 0.9834)),
        ("one-peer-exponential", 0.99, (0.9950, 0.9950, 0.9951, 0.9951, 0.9952, 0.9952, 0.9953, 0.9953)),
        ("exponential", 0.9, (0.9491, 0.9538, 0.9576, 0.9621, 0.9673, 0.9714)),
    ],
)
def test_how_fast_pc_dmsgd_forgets(name, momentum, figures):
    """The automatic rate; n = 8, 64, 1024, 16384, each at gain 1 and infinity; to four digits."""
    cases = list(itertools.product((8, 64, 1024, 16384), (1.0, math.inf)))[: len(figures)]
    for (n, gain), figure in zip(cases, figures, strict=True):
        growth = consensus_growth("pc-dmsgd", topology.get(name, n), momentum, correction_gain=gain)
        assert growth == pytest.approx(figure, abs=5.1e-5), (n, gain)


def largest_stable_momentum(method, top):
    low, high = 0.0, 0.999
    if consensus_growth(method, top, high) < 1:
        return high
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if consensus_growth(method, top, middle) < 1 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("top", "beta"),
    [
        (topology.ring(16), 0.999),
        (topology.hypercube(8), 0.999),
        (topology.torus(8), 0.999),
        (topology.star(8), 0.999),
        (topology.exponential(8).symmetrize(), 0.999),
        (topology.exponential(4), 0.638),
        (topology.exponential(8), 0.520),
        (topology.exponential(64), 0.527),
        (topology.exponential(8).lazy(), 0.675),
        (Topology(circulant(16, [1, 4]), "exponential base 4"), 0.303),
        (topology.one_peer_exponential(8), 0.706),
        (topology.one_peer_exponential(64), 0.506),
        (topology.one_peer_exponential(8).lazy(), 0.764),
        (topology.one_peer_hypercube(4), 0.999),
        (topology.one_peer_hypercube(8), 0.707),
        (topology.one_peer_hypercube(16), 0.549),
        (topology.one_peer_hypercube(16).lazy(), 0.999),
        (one_way_ring(4), 0.355),
        (one_way_ring(32), 0.221),
    ],
    ids=repr,
)
def test_the_largest_stable_momentum_of_decentlam(top, beta):
    """By bisection, to 0.002: independent figures."""
    assert largest_stable_momentum("decentlam", top) == pytest.approx(beta, abs=2e-3)


def test_decentlam_by_schur_and_jury():
    """A static W is stable iff ((Re l + beta)/(1 + beta))^2 + (Im l/(1 - beta))^2 < 1 for all eigenvalues but 1."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, beta = int(rng.integers(3, 13)), float(rng.random())
        offsets, weights = rng.choice(np.arange(2, n), n // 3, replace=False), rng.dirichlet(np.ones(2 + n // 3))
        phase = circulant(n, dict(zip([0, 1, *offsets.tolist()], weights, strict=True)))
        l = np.linalg.eigvals(phase.dense())
        l = np.delete(l, np.argmin(abs(l - 1)))
        stable = (((l.real + beta) / (1 + beta)) ** 2 + (l.imag / (1 - beta)) ** 2 < 1).all()
        assert (consensus_growth("decentlam", Topology(phase), beta) < 1) == stable


def test_the_other_methods_are_stable_where_decentlam_is_not():
    for n, name in itertools.product((8, 16, 32), ("exponential", "one-peer-exponential", "one-peer-hypercube")):
        top = topology.get(name, n)
        for method in set(GOSSIP) - {"decentlam"}:
            assert consensus_growth(method, top, 0.9) < 1, (method, name, n)
        assert consensus_growth("decentlam", top, 0.9) > 1


def test_sixty_five_thousand_workers():
    top = topology.one_peer_exponential(65_536)
    assert consensus_growth("pc-dmsgd", top, 0.9) < 1 < consensus_growth("decentlam", top, 0.9)
