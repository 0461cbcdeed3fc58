"""Promises about one step's matrix: circulants are merged, their symbol is their spectrum, every worker's view of its
peers is the matrix, and what is returned is a copy."""

import itertools
import math

import numpy as np
import pytest
from by_hand import DIRECTED, UNEVEN, family, quiet, steps

from fused_dlam import Topology, topology
from fused_dlam.topology import Circulant, base_k, circulant, od_equidyn, ou_equidyn, random_match


def test_circulants_are_taken_mod_n_and_merged():
    assert circulant(4, [1, 5, -3]) == Circulant(4, ((0, 0.5), (1, 0.5)))
    assert circulant(4, {0: 0.5, -1: 0.25, 3: 0.25}) == Circulant(4, ((0, 0.5), (3, 0.5)))


def test_the_symbol_is_the_spectrum():
    """On Fourier mode f, W acts as the number symbol[f]: checked on the modes themselves."""
    phase = circulant(7, {0: 0.5, 1: 0.3, 4: 0.2})
    for f, value in enumerate(phase.symbol()):
        mode = np.exp(2j * math.pi * f * np.arange(7) / 7)
        np.testing.assert_allclose(phase.dense() @ mode, value * mode, rtol=0, atol=1e-12)


def test_a_raw_circulant_is_as_good_as_a_normalized_one():
    raw = Topology(Circulant(4, ((5, 0.25), (1, 0.25), (0, 0.5))))
    np.testing.assert_allclose(raw.weights(), circulant(4, [1]).dense())
    assert raw.peers(0).sources == (3,) and raw.degree() == 1
    assert raw.rho == pytest.approx(math.sqrt(0.5))


def test_weights_are_copies():
    """Writing into what `weights` returns must not change the topology."""
    for top in (topology.star(3), topology.ring(3)):
        top.weights()[:] = 0
        assert top.weights().sum() == pytest.approx(3)
    mine = DIRECTED.copy()
    top = Topology(mine)
    mine[:] = 0
    np.testing.assert_array_equal(top.weights(), DIRECTED)


# -- peers -------------------------------------------------------------------------------------------------------------


RNG = np.random.default_rng(0)
SPARSE = RNG.random((3, 6, 6)) * (RNG.random((3, 6, 6)) < 0.4) + np.roll(np.eye(6), 1, axis=0)
CUSTOM = [
    Topology(DIRECTED),
    quiet(UNEVEN),
    quiet(SPARSE / SPARSE.sum(axis=2, keepdims=True), "sparse"),  # some workers do not listen to themselves
    topology.exponential(6).lazy(),
    topology.exponential(6).symmetrize(),
    topology.star(5).lazy(),
    topology.one_peer_exponential(6).every(3),
    topology.one_peer_exponential(6).with_global_average(4),
    Topology([DIRECTED, circulant(3, [1])], "mixed"),
    Topology(circulant(4, {0: 0.5, 1: 0.5, 2: 0.0}), "a zero weight"),
    base_k(7, 3),
    base_k(7).lazy(),
    topology.inner_outer_exponential(9).symmetrize(),
    random_match(7),
    random_match(6).with_global_average(3),
    random_match(5).every(2).with_global_average(4).lazy(),
    ou_equidyn(9).every(2),
    od_equidyn(6).symmetrize(),
]


@pytest.mark.parametrize(
    "top", [topology.get(name, n) for name, n in family([1, 2, 3, 6, 8])] + CUSTOM, ids=lambda top: repr(top)
)
def test_peers_degree_and_weights_agree(top):
    """For every rank and step: weights rebuilt from the peers are the matrix, sources and destinations are inverse."""
    for step in steps(top):
        W, rebuilt = top.weights(step), np.zeros((top.n, top.n))
        peers = [top.peers(rank, step) for rank in range(top.n)]
        for i, p in enumerate(peers):
            assert list(p.sources) == sorted(set(p.sources) - {i})
            assert list(p.destinations) == sorted(set(p.destinations) - {i})
            assert len(p.sources) == len(p.weights) and all(w > 0 for w in p.weights)
            assert all(type(j) is int for j in p.sources + p.destinations)
            rebuilt[i, list(p.sources)] = p.weights
        np.fill_diagonal(rebuilt, np.diag(W))
        assert np.array_equal(rebuilt, W)
        for i, j in itertools.product(range(top.n), repeat=2):
            assert (j in peers[i].sources) == (i in peers[j].destinations)
        assert top.degree(step) == max(len(p.sources) for p in peers)
        assert top.averages_exactly(step) or top.degree(step) <= top.most_messages
