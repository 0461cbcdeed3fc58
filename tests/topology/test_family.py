"""Promises about the family of graphs: every member is its definition, entry by entry and in the right direction
(`W[i, j]` weighs j's message at i), with the flags, the degrees and the contraction that the definition has; a name, a
`Topology` and a function of n are understood, and anything else is refused by name."""

from functools import partial

import numpy as np
import pytest
from by_hand import DIRECTED, RANDOM, SIZES, definition, family

from fused_dlam import Topology, topology
from fused_dlam.topology import circulant


def contraction(matrices):
    """The norm of (product over a period - J), per step: the definition of rho, for doubly stochastic matrices."""
    product = np.eye(len(matrices[0]))
    for W in matrices:
        product = W @ product
    norm = np.linalg.norm(product - np.full_like(product, 1 / len(product)), 2)
    return 0.0 if norm < 1e-13 else norm ** (1 / len(matrices))


DEFINED = [(name, n) for name, n in family(SIZES) if name not in (*RANDOM, "base-k")]  # those are further down


@pytest.mark.parametrize(("name", "n"), DEFINED)
def test_the_family_is_its_definition(name, n):
    top, expected = topology.get(name, n), definition(name, n)
    assert (top.name, top.n, top.period) == (name, n, len(expected))
    for step in range(2 * top.period + 1):
        W = top.weights(step)
        assert W.dtype == np.float64 and W.shape == (n, n)
        np.testing.assert_allclose(W, expected[step % top.period], rtol=0, atol=1e-15)
    assert top.is_doubly_stochastic and np.allclose(top.limit_weights, 1 / n, rtol=0, atol=1e-15)
    assert top.is_symmetric == all(np.allclose(W, W.T, rtol=0, atol=1e-12) for W in expected)
    assert top.rho == pytest.approx(contraction(expected), abs=1e-9)
    assert [top.averages_exactly(t) for t in range(top.period)] == [np.allclose(W, 1 / n) for W in expected]


def test_the_family_is_complete():
    assert set(topology.FAMILY) >= {
        *("full", "ring", "grid", "torus", "star", "hypercube", "exponential", "symmetric-exponential"),
        *("one-peer-exponential", "one-peer-hypercube", "one-peer-ring", "one-way-ring", "inner-outer-exponential"),
        "inner-outer-ring",
        *("base-k", "d-equistatic", "u-equistatic", *RANDOM),
    }


def test_directions():
    """By hand, on directed graphs: who hears whom."""
    assert topology.exponential(5).peers(0).sources == (1, 3, 4)  # 0 - 4, 0 - 2, 0 - 1
    assert topology.exponential(5).peers(0).destinations == (1, 2, 4)
    assert topology.one_peer_exponential(5).peers(3, step=4).sources == (1,)  # step 4 is phase 1: 3 - 2
    assert topology.one_peer_exponential(5).peers(3, step=4).destinations == (0,)
    custom = Topology(DIRECTED)
    assert custom.peers(0).sources == (1,) and custom.peers(0).destinations == (2,)
    assert custom.peers(0).weights == (0.5,)
    assert Topology(circulant(3, {0: 0.75, 1: 0.25})).weights()[1].tolist() == [0.25, 0.75, 0.0]


def test_degrees_are_the_designs():
    for name, degree in {"full": 15, "ring": 2, "torus": 4, "star": 15, "hypercube": 4, "exponential": 4}.items():
        assert topology.get(name, 16).degree() == degree, name
    assert topology.symmetric_exponential(16).degree() == 7  # +-1, +-2, +-4 and 8, which is its own mirror image
    for name in ("one-peer-exponential", "one-peer-hypercube"):
        assert [topology.get(name, 16).degree(t) for t in range(5)] == [1] * 5
    assert topology.ring(8).every(2).degree(0) == 0


# -- which topology is meant -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "4"])
@pytest.mark.parametrize("name", topology.FAMILY)
def test_wrong_numbers_of_workers_are_refused(name, n):
    with pytest.raises(ValueError, match="number of workers must be an integer >= 1"):
        topology.get(name, n)


def test_names_are_checked():
    with pytest.raises(ValueError, match="unknown topology 'circle'; known: full, ring, .*one-peer-hypercube"):
        topology.get("circle", 4)
    with pytest.raises(ValueError, match="'ring' is for 4 workers, but there are 5"):
        topology.get(topology.ring(4), 5)
    with pytest.raises(TypeError, match="a name or a Topology, not ndarray"):
        topology.get(np.eye(2), 2)
    top = topology.ring(4)
    assert topology.get(top, 4) is top
    for name in ("hypercube", "one-peer-hypercube"):
        with pytest.raises(ValueError, match="needs a power of two, not 6 workers"):
            topology.get(name, 6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_a_function_of_n_is_a_topology(n):
    """A member of the family, a derived graph, one that never repeats, a `partial`: all by the number of workers."""
    assert topology.get(topology.ring, n).fingerprint == topology.ring(n).fingerprint
    seldom = topology.get(lambda n: topology.one_peer_exponential(n).every(4), n)
    assert (seldom.n, seldom.name) == (n, "one-peer-exponential, every 4")
    assert topology.get(lambda n: topology.random_match(n).with_global_average(8), n).averages_exactly(7)
    same = topology.get(partial(topology.random_match, seed=3), n)
    assert np.array_equal(same.weights(5), topology.random_match(n, seed=3).weights(5))
    for name, build in topology.FAMILY.items():
        if "hypercube" not in name or n & (n - 1) == 0:
            assert topology.get(build, n).fingerprint == topology.get(name, n).fingerprint


def test_a_function_must_return_a_topology_for_n_workers():
    with pytest.raises(ValueError, match="'ring' is for 4 workers, but there are 5"):
        topology.get(lambda n: topology.ring(4), 5)
    for wrong, kind in ((np.eye(3), "ndarray"), (None, "NoneType"), ("ring", "str"), (topology.ring, "function")):
        with pytest.raises(TypeError, match=f"topology=<lambda> must return a Topology for 3 workers, not {kind}"):
            topology.get(lambda n, wrong=wrong: wrong, 3)
    for nothing in (None, 3, [[0.5, 0.5], [0.5, 0.5]]):
        with pytest.raises(TypeError, match="must be a function of n, a name or a Topology, not"):
            topology.get(nothing, 2)


def test_a_function_that_raises_keeps_its_own_error():
    def needs_machines(n):
        raise LookupError(f"no machines for {n}")

    with pytest.raises(LookupError, match="no machines for 6"):
        topology.get(needs_machines, 6)
    with pytest.raises(ValueError, match="hypercube needs a power of two, not 6 workers"):
        topology.get(lambda n: topology.hypercube(n).lazy(), 6)
    with pytest.raises(TypeError, match="positional argument"):
        topology.get(lambda: topology.ring(6), 6)


def test_a_refusal_suggests_what_the_option_takes():
    """The suggestion is a name of the family, and builds."""
    for name in ("hypercube", "one-peer-hypercube"):
        with pytest.raises(ValueError, match=f"{name} needs.*'one-peer-exponential' takes any number"):
            topology.get(name, 6)
    assert topology.get("one-peer-exponential", 6).n == 6
