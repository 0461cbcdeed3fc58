"""Promises about `Topology`: wrong matrices are refused by name, a weighted mean is warned of at the caller's line, and
lazy, symmetrized, seldom and globally averaged topologies are what they say, for graphs that repeat and that do not."""

import math
import pickle
import warnings

import numpy as np
import pytest
from by_hand import DIRECTED, UNEVEN, family, quiet, steps

from fused_dlam import Topology, topology
from fused_dlam.topology import base_k, circulant, od_equidyn, ou_equidyn, random_match

# -- wrong matrices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[0.5, 0.5], [0.5, 0.6]], "every row must sum to one; row 1 sums to 1.1"),
        ([DIRECTED, DIRECTED * 0.9], "phase 1: every row must sum to one; row 0 sums to 0.9"),
        ([[1.5, -0.5], [0.5, 0.5]], "must not be negative, found -0.5"),
        ([[float("nan"), 1.0], [0.5, 0.5]], "must be finite"),
        ([[float("inf"), 0.0], [0.5, 0.5]], "must be finite"),
        ([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], "must be square"),
        ([1.0], r"one \[n, n\] matrix or a sequence of them"),
        ([], r"one \[n, n\] matrix or a sequence of them"),
        (np.ones((1, 1, 1, 1)), r"one \[n, n\] matrix or a sequence of them"),
        ([np.eye(2), DIRECTED], "3 workers, but phase 0 has 2"),
        ([circulant(3, [1]), circulant(4, [1])], "phase 1: 4 workers, but phase 0 has 3"),
        (circulant(3, {0: 0.5, 1: 0.4}), "every row must sum to one; row 0 sums to 0.9"),
        (circulant(3, {0: 1.5, 1: -0.5}), "must not be negative"),
        (circulant(3, {0: float("nan"), 1: 0.5}), "must be finite"),
        (np.eye(2), "not connected"),
        ([[1.0, 0.0], [0.5, 0.5]], r"not connected.*\[0\] and \[1\]"),  # 1 hears 0, 0 hears nobody
        (np.kron(np.eye(2), DIRECTED), r"not connected.*\[0, 1, 2\] and \[3, 4, 5\].*2 parts"),
        (circulant(6, [2, 4]), "not connected: it falls into 2 parts"),
        (circulant(3, {0: 1.0, 1: 0.0}), "not connected: it falls into 3 parts"),
    ],
)
def test_wrong_matrices_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Topology(weights)


def test_connection_over_a_period_is_enough():
    assert Topology([circulant(6, [2]), circulant(6, [3])]).period == 2
    swap, rest = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1.0]]), np.array([[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    assert Topology([swap, rest]).is_doubly_stochastic


@pytest.mark.parametrize("phases", [[UNEVEN], [UNEVEN, DIRECTED], [DIRECTED, UNEVEN, UNEVEN]])
def test_a_weighted_mean_is_warned_of(phases):
    """The weights in the warning are those of the workers in what everybody ends at: a row of W^infinity."""
    with pytest.warns(UserWarning, match="not doubly stochastic") as caught:
        top = Topology(phases)
    limit = np.linalg.matrix_power(np.linalg.multi_dot([*phases[::-1], np.eye(3)]), 500)
    np.testing.assert_allclose(limit, np.tile(limit[0], (3, 1)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(top.limit_weights, limit[0], rtol=0, atol=1e-12)
    assert np.array2string(limit[0], precision=4) in str(caught[0].message)
    assert caught[0].filename == __file__  # points at the caller, not into the package
    assert not top.is_doubly_stochastic


def test_doubly_stochastic_matrices_are_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Topology(DIRECTED)
        for name, n in family([1, 2, 7, 8]):
            topology.get(name, n)


# -- new topologies from old -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "top",
    [
        topology.one_peer_exponential(6),
        topology.star(5),
        Topology([DIRECTED] * 2),
        base_k(6),
        ou_equidyn(5),
        od_equidyn(5),
    ],
    ids=repr,
)
def test_lazy_and_symmetrize(top):
    lazy, symmetric = top.lazy(), top.symmetrize()
    assert symmetric.is_symmetric and symmetric.is_doubly_stochastic and lazy.is_doubly_stochastic
    for step in steps(top, 0):
        W = top.weights(step)
        np.testing.assert_allclose(lazy.weights(step), (np.eye(top.n) + W) / 2, rtol=0, atol=1e-15)
        np.testing.assert_allclose(symmetric.weights(step), (W + W.T) / 2, rtol=0, atol=1e-15)


def test_lazy_and_symmetrize_where_the_mean_is_weighted():
    """Lazy keeps the weights of the mean. (W + W^T)/2 would not have rows that sum to one, and the refusal says so."""
    top = quiet(UNEVEN)
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        lazy = top.lazy()
    np.testing.assert_allclose(lazy.limit_weights, top.limit_weights, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="'custom' is not doubly stochastic"):
        top.symmetrize()


@pytest.mark.parametrize("top", [topology.one_peer_exponential(6), topology.star(5), ou_equidyn(5)], ids=repr)
def test_every_k(top):
    """k - 1 local steps, then the next exchange."""
    seldom = top.every(3)
    assert seldom.period == (top.period and 3 * top.period) and top.every(1) is top
    for step in range(2 * (seldom.period or 9)):
        expected = top.weights(step // 3) if step % 3 == 2 else np.eye(top.n)
        np.testing.assert_array_equal(seldom.weights(step), expected)
    for wrong in (0, 1.5, math.nan, True, "2", None):
        with pytest.raises(ValueError, match=f"every k >= 1 steps, not {wrong!r}"):
            top.every(wrong)
    with pytest.raises(ValueError, match="repeats after 1,048,576 steps at the latest"):
        top.every(10**400)
    assert top.every(np.int64(3)).name == seldom.name


@pytest.mark.parametrize("top", [topology.one_peer_exponential(6), topology.star(5), random_match(5)], ids=repr)
def test_global_averages(top):
    """Every fourth step J in place of the exchange; the phases go on underneath."""
    mixed = top.with_global_average(4)
    assert mixed.period == (top.period and math.lcm(4, top.period))
    for step in range(2 * (mixed.period or 8)):
        expected = np.full((top.n, top.n), 1 / top.n) if step % 4 == 3 else top.weights(step)
        np.testing.assert_allclose(mixed.weights(step), expected, rtol=0, atol=1e-15)
        assert mixed.averages_exactly(step) == (step % 4 == 3)
    assert mixed.rho == 0.0
    for wrong in (0, 1.5, math.nan, True, "2", None):
        with pytest.raises(ValueError, match=f"every H >= 1 steps, not {wrong!r}"):
            top.with_global_average(wrong)
    for long in (10**400, 10**5000):  # an int of more than 4,300 digits has no text
        with pytest.raises(ValueError, match="repeats after 1,048,576 steps at the latest"):
            top.with_global_average(long)


def test_what_is_derived_from_a_graph_that_never_repeats():
    """It never repeats either, it can be sent to processes, and its messages are counted over all that may come."""
    top = random_match(6)
    for derived, most in (
        (top.lazy(), 1), (top.every(3), 1), (top.symmetrize(), 1), (od_equidyn(7).symmetrize(), 2),
        (top.with_global_average(40), 1), (top.with_global_average(40).lazy(), 5),
        (top.every(3).with_global_average(4), 1),
    ):  # fmt: skip
        assert type(derived) is topology.RandomTopology and derived.period is None, derived
        assert derived.most_messages == most, derived
        again = pickle.loads(pickle.dumps(derived))
        assert all(np.array_equal(again.weights(t), derived.weights(t)) for t in range(85))
    assert type(topology.ring(6).every(2)) is Topology


def test_a_global_average_is_one_message():
    """By all-reduce, however many workers: memory is set aside for the exchanges alone."""
    assert topology.one_peer_exponential(8).with_global_average(3).most_messages == 1
    assert random_match(8).with_global_average(3).most_messages == 1
