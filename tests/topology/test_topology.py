"""Promises about topologies: every member of the family is its definition, entry by entry and in the right direction
(`W[i, j]` weighs j's message at i); every worker's view of its peers is the matrix; the flags and the contraction rho
say what the matrices do; wrong matrices are refused by name."""

import itertools
import math
import warnings

import networkx as nx
import numpy as np
import pytest

from fused_dlam import Topology, topology
from fused_dlam.topology import (
    Circulant,
    base_k,
    circulant,
    from_networkx,
    metropolis_hastings,
    od_equidyn,
    ou_equidyn,
    random_match,
)

RANDOM = ["random-match", "od-equidyn", "ou-equidyn"]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24]
DIRECTED = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])  # 0 hears 1, 1 hears 2, 2 hears 0
UNEVEN = np.array([[0.7, 0.3, 0.0], [0.0, 0.2, 0.8], [0.5, 0.4, 0.1]])  # rows sum to one, columns do not


def family(sizes):
    return [(name, n) for name in topology.FAMILY for n in sizes if "hypercube" not in name or n & (n - 1) == 0]


def steps(top, more=1):
    """All steps of a period and some more, or some of a graph that never repeats."""
    return range((top.period or 5) + more)


def quiet(weights, name="custom"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Topology(weights, name)


# -- the definitions, by plain loops -----------------------------------------------------------------------------------


def equal_weights(n, heard):
    """Worker i gives equal weights to itself and to heard(i)."""
    W = np.zeros((n, n))
    for i in range(n):
        sources = {i} | {j % n for j in heard(i)}
        for j in sources:
            W[i, j] = 1 / len(sources)
    return W


def metropolis(n, heard):
    neighbors = [{j for j in heard(i)} - {i} for i in range(n)]
    W = np.zeros((n, n))
    for i in range(n):
        for j in neighbors[i]:
            W[i, j] = 1 / (1 + max(len(neighbors[i]), len(neighbors[j])))
        W[i, i] = 1 - sum(W[i])
    return W


def lattice(n, wrap):
    """Neighbors on a grid with rows <= columns, as square as the divisors of n allow."""
    rows = max(r for r in range(1, n + 1) if n % r == 0 and r * r <= n)
    columns = n // rows

    def heard(i):
        r, c = i // columns, i % columns
        for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if wrap:
                yield (r + dr) % rows * columns + (c + dc) % columns
            elif 0 <= r + dr < rows and 0 <= c + dc < columns:
                yield (r + dr) * columns + c + dc

    return heard


def powers_of_two_below(n):
    return [2**t for t in range(n) if 2**t < n]


def equistatic(n, seed=0, mirror=False):
    """As the paper's code states it, workers numbered from 1: the mean of A_a over M offsets, or of A_a and A_a^T."""
    M = next(t for t in itertools.count(1) if 2**t >= n)
    offsets = np.random.RandomState(np.random.Philox(key=(seed, 0))).randint(1, n, size=M) if n > 1 else []
    if math.gcd(n, *(int(a) for a in offsets)) > 1 and n > 1:
        return equistatic(n, seed + 1, mirror)
    K = np.zeros((n, n)) if n > 1 else np.eye(1)
    for a in offsets:
        W = np.zeros((n, n))
        for i in range(1, n + 1):
            j = (i + a) % n or n
            W[i - 1, j - 1] = (n - 1) / n
            W[i - 1, i - 1] = 1 / n
        K += ((W + W.T) / 2 if mirror else W) / M
    return K


def one_peer(n, heard):
    """Worker i hears from heard(i), half and half."""
    W = np.zeros((n, n))
    for i in range(n):
        W[i, i] += 0.5
        W[i, heard(i) % n] += 0.5
    return W


def inner_outer(n):
    """As BlueFog's GetInnerOuterExpo2DynamicSendRecvRanks states it, rank by rank: whom a rank receives from. With
    machines of one worker, or one machine, there is nobody to skip."""
    m = {6: 3, 8: 4, 12: 3, 16: 4, 24: 4}.get(n, 1)
    if m == 1:
        return [one_peer(n, lambda i, p=p: i - p) for p in powers_of_two_below(n) or [0]]
    machines = n // m
    outer, inner = int(np.log2(machines - 1)) + 1, int(np.log2(m - 2)) + 1

    def receives_from(rank, index):
        machine, local, outside = rank // m, rank % m, index % m
        if local == outside:
            return (machine - 2 ** (index % outer)) % machines * m + local
        distance = 2 ** (index % inner)
        if distance >= (local - outside) % m:
            distance += 1
        return machine * m + (local - distance) % m

    return [one_peer(n, lambda i, t=t: receives_from(i, t)) for t in range(math.lcm(m, outer, inner))]


def alternating(n):
    """The pairs of a ring by turns; if n is odd the pairs (i, i+1) for i = t, t+2, ... leave worker t-1 out."""
    if n < 3:
        return [np.full((n, n), 1 / n)]

    def partner(i, t):
        place = (i - t) % n
        return i if place == n - 1 and n % 2 else i + (1 if place % 2 == 0 else -1)

    return [one_peer(n, lambda i, t=t: partner(i, t)) for t in range(n if n % 2 else 2)]


def definition(name, n):
    powers = powers_of_two_below(n)
    return {
        "full": lambda: [np.full((n, n), 1 / n)],
        "one-way-ring": lambda: [one_peer(n, lambda i: i - 1)],
        "d-equistatic": lambda: [equistatic(n)],
        "u-equistatic": lambda: [equistatic(n, mirror=True)],
        "one-peer-ring": lambda: alternating(n),
        "inner-outer-exponential": lambda: inner_outer(n),
        "ring": lambda: [equal_weights(n, lambda i: [i - 1, i + 1])],
        "grid": lambda: [metropolis(n, lattice(n, wrap=False))],
        "torus": lambda: [metropolis(n, lattice(n, wrap=True))],
        "star": lambda: [metropolis(n, lambda i: range(1, n) if i == 0 else [0])],
        "hypercube": lambda: [equal_weights(n, lambda i: [i ^ p for p in powers])],
        "exponential": lambda: [equal_weights(n, lambda i: [i - p for p in powers])],
        "symmetric-exponential": lambda: [equal_weights(n, lambda i: [i + s * p for p in powers for s in (1, -1)])],
        "one-peer-exponential": lambda: [equal_weights(n, lambda i, p=p: [i - p]) for p in powers or [0]],
        "one-peer-hypercube": lambda: [equal_weights(n, lambda i, p=p: [i ^ p]) for p in powers or [0]],
    }[name]()


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


def test_circulants_are_taken_mod_n_and_merged():
    assert circulant(4, [1, 5, -3]) == Circulant(4, ((0, 0.5), (1, 0.5)))
    assert circulant(4, {0: 0.5, -1: 0.25, 3: 0.25}) == Circulant(4, ((0, 0.5), (3, 0.5)))


def test_the_symbol_is_the_spectrum():
    """On Fourier mode f, W acts as the number symbol[f]: checked on the modes themselves."""
    phase = circulant(7, {0: 0.5, 1: 0.3, 4: 0.2})
    for f, value in enumerate(phase.symbol()):
        mode = np.exp(2j * math.pi * f * np.arange(7) / 7)
        np.testing.assert_allclose(phase.dense() @ mode, value * mode, rtol=0, atol=1e-12)


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


def test_degrees_are_the_designs():
    for name, degree in {"full": 15, "ring": 2, "torus": 4, "star": 15, "hypercube": 4, "exponential": 4}.items():
        assert topology.get(name, 16).degree() == degree, name
    assert topology.symmetric_exponential(16).degree() == 7  # +-1, +-2, +-4 and 8, which is its own mirror image
    for name in ("one-peer-exponential", "one-peer-hypercube"):
        assert [topology.get(name, 16).degree(t) for t in range(5)] == [1] * 5
    assert topology.ring(8).every(2).degree(0) == 0


# -- the contraction ---------------------------------------------------------------------------------------------------


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


def test_a_raw_circulant_is_as_good_as_a_normalized_one():
    raw = Topology(Circulant(4, ((5, 0.25), (1, 0.25), (0, 0.5))))
    np.testing.assert_allclose(raw.weights(), circulant(4, [1]).dense())
    assert raw.peers(0).sources == (3,) and raw.degree() == 1
    assert raw.rho == pytest.approx(math.sqrt(0.5))


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


# -- networkx ----------------------------------------------------------------------------------------------------------


def test_networkx_round_trip():
    """On a directed weighted graph: an edge j -> i carries j's message to i."""
    top = quiet(UNEVEN)
    graph = top.to_networkx()
    assert graph[2][1]["weight"] == 0.8 and graph[1][2]["weight"] == 0.4 and not graph.has_edge(2, 0)
    assert {(j, i): d["weight"] for j, i, d in graph.edges(data=True)} == {
        (j, i): UNEVEN[i, j] for i in range(3) for j in range(3) if UNEVEN[i, j]
    }
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        np.testing.assert_array_equal(from_networkx(graph).weights(), UNEVEN)
    for name, n in family([2, 3, 6, 8]):
        top = topology.get(name, n)
        for step in range(top.period if name.startswith("one-peer") else 1):
            if nx.is_strongly_connected(top.to_networkx(step)):
                again = from_networkx(top.to_networkx(step))
                np.testing.assert_allclose(again.weights(), top.weights(step), rtol=0, atol=1e-15)


def test_networkx_weights_are_completed_by_the_worker_itself():
    graph = nx.DiGraph()
    graph.add_nodes_from("abc")
    graph.add_weighted_edges_from([("b", "a", 0.5), ("c", "b", 0.25), ("a", "c", 1.0)])
    expected = np.array([[0.5, 0.5, 0.0], [0.0, 0.75, 0.25], [1.0, 0.0, 0.0]])
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        np.testing.assert_array_equal(from_networkx(graph).weights(), expected)


def test_networkx_without_weights():
    directed = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    expected = equal_weights(3, lambda i: {0: [2], 1: [0], 2: [1, 0]}[i])
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        np.testing.assert_allclose(from_networkx(directed).weights(), expected)
    path = nx.path_graph(4)
    np.testing.assert_allclose(from_networkx(path).weights(), metropolis(4, lambda i: list(path[i])))
    np.testing.assert_array_equal(
        from_networkx(nx.petersen_graph(), "mine").weights(), metropolis_hastings(nx.petersen_graph())
    )
    assert from_networkx(path, "mine").name == "mine"


def test_networkx_mistakes():
    half = nx.DiGraph([(0, 1), (1, 0)])
    half[0][1]["weight"] = 0.5
    with pytest.raises(ValueError, match="some edges have a 'weight' and some have none"):
        from_networkx(half)
    with pytest.raises(ValueError, match="no nodes"):
        from_networkx(nx.Graph())
    heavy = nx.DiGraph()
    heavy.add_weighted_edges_from([(0, 1, 1.5), (1, 0, 0.5)])
    with pytest.raises(ValueError, match="row 1 sums to 1.5"):
        from_networkx(heavy)


def test_metropolis_hastings():
    """Symmetric and doubly stochastic on any undirected graph; self-loops and the nodes' names do not matter."""
    graph = nx.Graph([("a", "b"), ("b", "c"), ("b", "d"), ("c", "d"), ("d", "d"), ("d", "e")])
    W = metropolis_hastings(graph)
    order = list(graph)
    expected = metropolis(5, lambda i: [order.index(b) for b in graph[order[i]]])
    np.testing.assert_allclose(W, expected, rtol=0, atol=1e-15)
    assert np.array_equal(W, W.T) and np.allclose(W.sum(axis=0), 1, rtol=0, atol=1e-15) and (W >= 0).all()


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
    with pytest.raises(ValueError, match="every k >= 1 steps, not 0"):
        top.every(0)


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
    with pytest.raises(ValueError, match="every H >= 1 steps, not 0"):
        top.with_global_average(0)


def test_weights_are_copies():
    """Writing into what `weights` returns must not change the topology."""
    for top in (topology.star(3), topology.ring(3)):
        top.weights()[:] = 0
        assert top.weights().sum() == pytest.approx(3)
    mine = DIRECTED.copy()
    top = Topology(mine)
    mine[:] = 0
    np.testing.assert_array_equal(top.weights(), DIRECTED)
