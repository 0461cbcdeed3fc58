"""Promises about the graphs of two papers:

- the Base-(k+1) graph averages exactly, for any number of workers, in as few steps as its authors' code;
- EquiTopo graphs are the paper's matrices and contract as its theorems say;
- names tell every setting that is not the default, and wrong settings are refused.
"""

import itertools
import math

import numpy as np
import pytest

from fused_dlam import Topology, topology
from fused_dlam.topology import base_k, d_equistatic, od_equidyn, ou_equidyn, u_equistatic

# Steps that the authors' code takes (yukiTakezawa/BaseGraph, base_graph.py), by the number of workers.
PUBLISHED = {
    1: {5: 5, 6: 4, 8: 3, 12: 5, 24: 6, 25: 9, 31: 9, 32: 5, 48: 7, 64: 6},
    2: {5: 3, 6: 2, 12: 3, 24: 4, 25: 6, 31: 7, 48: 5},
    3: {8: 2, 12: 2, 24: 3, 25: 5, 32: 3, 64: 3},
}


def over_a_period(top):
    product = np.eye(top.n)
    for step in range(top.period):
        product = top.weights(step) @ product
    return product


# -- the Base-(k+1) graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_base_graph_averages_exactly_for_every_n(k):
    """J over a period to 1e-12; at most k neighbors; symmetric and doubly stochastic; 2 log_(k+1) n + 2 steps at most,
    as the paper's theorem has it."""
    for n in range(1, 65):
        top = base_k(n, k)
        np.testing.assert_allclose(over_a_period(top), 1 / n, rtol=0, atol=1e-12, err_msg=str(n))
        assert max(top.degree(t) for t in range(top.period)) <= k and top.rho == 0.0, n
        assert top.is_symmetric and top.is_doubly_stochastic, n
        assert top.period <= max(1, 2 * math.log(n, k + 1) + 2), n


@pytest.mark.parametrize(("k", "n", "steps"), [(k, *row) for k in PUBLISHED for row in PUBLISHED[k].items()])
def test_the_base_graph_is_as_short_as_published(k, n, steps):
    assert base_k(n, k).period <= steps


def test_the_base_graph_of_five_workers():
    """By hand. 5 = 4 + 1: {0, 1, 2, 3} average as a hypercube. Then workers 4 and 0 exchange with weight 4/5. Worker 4
    and the mean of {0, 1, 2, 3} are then everybody's mean, and {0, 1, 2, 3} average again."""
    pairs = [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(4, 0), (1, 2)], [(0, 1), (2, 3)], [(0, 2), (1, 3)]]
    top = base_k(5)
    assert top.period == 5
    for step, both in enumerate(pairs):
        W = np.eye(5)
        for i, j in both:
            weight = 4 / 5 if (i, j) == (4, 0) else 1 / 2
            W[i, i] = W[j, j] = 1 - weight
            W[i, j] = W[j, i] = weight
        np.testing.assert_allclose(top.weights(step), W, rtol=0, atol=1e-15)


def test_a_smooth_number_of_workers_is_a_hyper_hypercube():
    """12 = 2 * 2 * 3 by as few factors as k allows: in each step the workers whose other digits are equal average."""
    for k, digits in ((2, (2, 2, 3)), (3, (3, 4)), (5, (2, 6)), (11, (12,))):
        top, strides = base_k(12, k), np.cumprod((1, *digits))
        assert top.period == len(digits)
        for step, (stride, f) in enumerate(zip(strides, digits, strict=False)):
            place = np.arange(12) // stride % f * stride
            rest = np.arange(12) - place  # what the other digits say
            np.testing.assert_allclose(top.weights(step), (rest[:, None] == rest) / f, rtol=0, atol=1e-15)


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_wrong_numbers_of_neighbors_are_refused(k):
    with pytest.raises(ValueError, match="number of neighbors k must be an integer >= 1"):
        base_k(6, k)


def test_names_tell_what_is_not_as_by_default():
    """Ranks compare names: another seed, number of neighbors or share must not go unnoticed."""
    assert [base_k(6).name, base_k(6, 2).name] == ["base-k", "base-k, k = 2"]
    assert ou_equidyn(6, seed=3).name == "ou-equidyn, seed = 3" and od_equidyn(6, 0.25).name == "od-equidyn, eta = 0.25"
    assert [d_equistatic(6, 2, 7).name, u_equistatic(6).name] == ["d-equistatic, M = 2, seed = 7", "u-equistatic"]
    assert topology.exponential(9, base=3).name == "exponential, base = 3"
    assert topology.inner_outer_exponential(8, machine_size=8).name == "inner-outer-exponential, machine_size = 8"
    assert topology.random_match(8, seed=5).name == "random-match, seed = 5"


# -- EquiTopo ----------------------------------------------------------------------------------------------------------


def rotated(n, a):
    """A_a: worker i hears from i + a with weight (n-1)/n."""
    W = np.eye(n) / n
    for i in range(n):
        W[i, (i + a) % n] += (n - 1) / n
    return W


def paired(n, a, s):
    """The paper's walk, word for word: from worker s round, whoever is free and whose i + a is free."""
    free, W = set(range(n)), np.eye(n)
    for i in itertools.chain(range(s, n), range(s)):
        j = (i + a) % n
        if i in free and j in free:
            free -= {i, j}
            W[[i, j]] = 0
            W[i, j] = W[j, i] = (n - 1) / n
            W[i, i] = W[j, j] = 1 / n
    return W


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
@pytest.mark.parametrize("eta", [0.25, 0.5, 1.0])
def test_equidyn_matrices_are_the_papers(n, eta):
    """(1 - eta) I + eta A with one of the paper's matrices A, all of which are drawn in the long run."""
    rotations = [rotated(n, a) for a in range(1, n)]
    pairings = [paired(n, a, s) for a in range(1, n) for s in range(n)]
    for top, matrices in ((od_equidyn(n, eta), rotations), (ou_equidyn(n, eta), pairings)):
        different = np.unique(np.round((1 - eta) * np.eye(n) + eta * np.stack(matrices), 12), axis=0)
        drawn = np.unique(np.round([top.weights(t) for t in range(100 + 12 * len(matrices))], 12), axis=0)
        np.testing.assert_allclose(drawn, different, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [3, 4, 6, 9, 16, 25])
@pytest.mark.parametrize("eta", [0.25, 0.5])
def test_equidyn_contracts_as_promised(n, eta):
    """The mean square of the disagreement, over all matrices that can be drawn: at most 1 - 2 eta (1 - eta) per step of
    OD-EquiDyn (exactly that less 2 eta^2 / n), at most 1 - 2/3 eta of OU-EquiDyn. What a run contracts by, rho, is
    below the root of it."""
    rotations = [rotated(n, a) for a in range(1, n)]
    pairings = [paired(n, a, s) for a in range(1, n) for s in range(n)]
    bounds = 1 - 2 * eta * (1 - eta), 1 - 2 / 3 * eta
    tops = od_equidyn(n, eta), ou_equidyn(n, eta)
    for top, matrices, bound in zip(tops, (rotations, pairings), bounds, strict=True):
        Ws = (1 - eta) * np.eye(n) + eta * np.stack(matrices)
        square = np.linalg.norm((Ws.transpose(0, 2, 1) @ Ws).mean(axis=0) - 1 / n, 2)
        assert square <= bound + 1e-12
        if matrices is rotations:
            assert square == pytest.approx(bound - 2 * eta**2 / n, abs=1e-12)
        assert top.rho <= math.sqrt(square) + 3 * top.contraction.error


@pytest.mark.parametrize("build", [d_equistatic, u_equistatic])
@pytest.mark.parametrize(("n", "eps"), [(16, 0.5), (64, 0.5), (1000, 0.7)])
def test_equistatic_contracts_as_promised(build, n, eps):
    """M = 8 ln(2n/p) / (3 eps^2) offsets: |W - J| <= eps but for a share p of the draws."""
    p, seeds = 0.1, 40
    M = math.ceil(8 * math.log(2 * n / p) / (3 * eps**2))
    norms = [build(n, M, seed).rho for seed in range(seeds)]
    assert sum(norm > eps for norm in norms) <= p * seeds
    assert len(set(norms)) > seeds // 2  # seeds differ
    few = [build(n, max(1, M // 12), seed).rho for seed in range(seeds)]
    assert sum(norm > eps for norm in few) > p * seeds  # the control: with a twelfth of them it does not hold


def test_an_unconnected_draw_is_drawn_again():
    """Offset 2 of 4 workers joins nobody: the next seed's draw is taken, and so on."""
    first = [int(np.random.RandomState(np.random.Philox(key=(seed, 0))).randint(1, 4)) for seed in range(20)]
    assert 2 in first
    for seed, offset in enumerate(first[:-5]):
        expected = offset if offset != 2 else next(a for a in first[seed:] if a != 2)
        np.testing.assert_allclose(d_equistatic(4, 1, seed).weights(), rotated(4, expected), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (d_equistatic, {"offsets": 0}, "number of offsets must be an integer >= 1, not 0"),
        (u_equistatic, {"offsets": 1.5}, "number of offsets must be an integer >= 1"),
        (d_equistatic, {"seed": -1}, "seed must be an integer from 0"),
        (od_equidyn, {"eta": 0.0}, r"eta must be in \(0, 1\], not 0.0"),
        (ou_equidyn, {"eta": 1.1}, r"eta must be in \(0, 1\]"),
        (ou_equidyn, {"seed": 0.5}, "seed must be an integer from 0"),
        (topology.random_match, {"seed": 2**64}, "seed must be an integer from 0"),
        (topology.exponential, {"base": 1}, "base must be an integer >= 2, not 1"),
        (topology.inner_outer_exponential, {"machine_size": 2}, "a divisor of the 6 workers other than 2, not 2"),
        (topology.inner_outer_exponential, {"machine_size": 4}, "a divisor of the 6 workers other than 2, not 4"),
    ],
)
def test_wrong_settings_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(6, **arguments)


def test_exponential_graphs_of_another_base():
    assert topology.exponential(16, base=4).peers(0).sources == (12, 15)  # 0 - 4, 0 - 1
    assert Topology(topology.exponential(9, base=3).phases).rho == topology.exponential(9, base=3).rho < 1
