"""Promises about the contraction rho of periodic graphs: it has independently known values, does not depend on how a
period is written, and bounds the distance from the mean, also where the mean is weighted."""

import math

import numpy as np
import pytest
from by_hand import DIRECTED, UNEVEN, quiet

from fused_dlam import Topology, topology
from fused_dlam.topology import circulant


@pytest.mark.parametrize(
    ("name", "rhos"),
    [
        ("full", (0, 0, 0, 0)),
        ("ring", (0.805, 0.949, 0.987, 0.997)),
        ("grid", (0.854, 0.869, 0.966, 0.968)),
        ("torus", (0.500, 0.600, 0.883, 0.883)),
        ("star", (7 / 8, 15 / 16, 31 / 32, 63 / 64)),
        ("exponential", (0.500, 0.600, 0.667, 0.714)),
        ("hypercube", (0.500, 0.600, 0.667, 0.714)),
        ("one-peer-exponential", (0, 0, 0, 0)),
        ("one-peer-hypercube", (0, 0, 0, 0)),
    ],
)
def test_rho_of_the_family(name, rhos):
    """n = 8, 16, 32, 64, to three digits; independent figures."""
    for n, rho in zip((8, 16, 32, 64), rhos, strict=True):
        assert topology.get(name, n).rho == pytest.approx(rho, abs=5.1e-4), n


def test_rho_of_one_way_rings_and_every_k():
    for n, rho in ((8, 0.924), (16, 0.981), (32, 0.995), (64, 0.999)):
        one_way = Topology(circulant(n, [1]))
        assert one_way.rho == pytest.approx(rho, abs=5.1e-4)
        assert one_way.every(5).rho == pytest.approx(math.cos(math.pi / n) ** (1 / 5), abs=1e-9)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64])
def test_one_peer_graphs_average_exactly_over_a_period(n):
    for top in (topology.one_peer_exponential(n), topology.one_peer_hypercube(n)):
        product = np.linalg.multi_dot([top.weights(t) for t in range(top.period)] + [np.eye(n)])
        np.testing.assert_allclose(product, 1 / n, rtol=0, atol=1e-15)
        assert top.rho == 0.0


@pytest.mark.parametrize(("n", "norm"), [(6, 0.2165), (12, 0.209), (24, 0.207)])
def test_one_peer_exponential_elsewhere_averages_nearly(n, norm):
    top = topology.one_peer_exponential(n)
    assert top.rho**top.period == pytest.approx(norm, abs=5.1e-4)


def test_rho_does_not_depend_on_how_often_a_period_is_written_out():
    """Random sequences have long periods: 2,000 steps contract to less than the smallest float, yet each contracts
    only a little."""
    once = circulant(16, [1])
    assert Topology([once] * 2000).rho == pytest.approx(Topology(once).rho, abs=1e-6)
    assert Topology([once.dense()] * 2000).rho == pytest.approx(Topology(once).rho, abs=1e-6)
    second_eigenvalue = sorted(abs(np.linalg.eigvals(UNEVEN)))[-2]  # what a power contracts by in the long run
    assert second_eigenvalue <= quiet([UNEVEN] * 300).rho < second_eigenvalue + 0.02


@pytest.mark.parametrize("phases", [[UNEVEN], [UNEVEN, DIRECTED], [DIRECTED, UNEVEN]])
def test_rho_where_the_mean_is_weighted(phases):
    """rho^(k steps) bounds the distance from the weighted mean after whole periods."""
    top = quiet(phases)
    distance = np.linalg.multi_dot([*phases[::-1], np.eye(3)]) - top.limit_weights
    assert 0 < top.rho < 1
    assert np.linalg.norm(distance, 2) <= top.rho**top.period * (1 + 1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_a_contraction_is_rho_and_slowest_rho(n):
    """Without an error, for there is a period. slowest_rho is at least 0.22^(1/T): after T steps disagreement has
    fallen to 0.22 of what it was, or less, for the first time. T is counted here by dense products."""
    for top in (topology.ring(n), topology.one_peer_exponential(n), topology.base_k(n), topology.star(n).every(3)):
        assert top.contraction == (top.rho, 0.0, top.slowest_rho)
        assert top.slowest_rho == pytest.approx(max(top.rho, floor(top)), abs=1e-12)


def floor(top):
    product = np.eye(top.n) - 1 / top.n
    for t in range(top.period):
        product = top.weights(t) @ product
        if np.linalg.norm(product, 2) <= 0.22 and top.n > 1:
            return 0.22 ** (1 / (t + 1))
    return 0.0


@pytest.mark.parametrize("n", [16, 64, 1024])
def test_an_average_that_is_almost_exact_has_the_floor_too(n):
    """One-peer exponential graphs of n and n - 1 workers average exactly, and almost: their slowest_rho are alike."""
    exact, almost = topology.one_peer_exponential(n), topology.one_peer_exponential(n - 1)
    assert almost.rho < almost.slowest_rho and exact.rho < exact.slowest_rho
    assert exact.slowest_rho == pytest.approx(almost.slowest_rho, abs=0.03)


def test_modes_are_shared_eigenvalues():
    """The disagreement of circulants, of one matrix and of commuting symmetric ones; nothing is shared otherwise."""
    for top in (topology.exponential(5), topology.star(4), topology.one_peer_hypercube(8)):
        assert top.modes.shape == (top.period, top.n - 1)
        for t, values in enumerate(top.modes):
            expected = np.linalg.eigvals(top.weights(t)).tolist()
            expected.remove(min(expected, key=lambda value: abs(value - 1)))
            for value in values:
                nearest = min(expected, key=lambda other, value=value: abs(other - value))
                assert abs(nearest - value) < 1e-9
                expected.remove(nearest)
    for top in (Topology([np.eye(3), DIRECTED]), topology.one_peer_ring(6), topology.random_match(4)):
        assert top.modes is None, top
