"""Promises about graphs whose columns sum to one:

- masses are the exact ones, found here in rational numbers, to 1e-12 of each, the tiniest too; R conserves them;
- spectra are those of `as_rows`; derived graphs keep their columns; a doubly stochastic graph has ones, exactly;
- `push` and `one_peer` are their definitions, BlueFog's by its loops; what cannot be had is refused by a sentence;
- push-sum on the one-peer mesh of 8 is exact, where pulling with equal weights ends 0.13 off (values 0 to 7).
"""

import math
import pickle
import warnings
from fractions import Fraction
from functools import partial

import networkx as nx
import numpy as np
import pytest
from by_hand import DIRECTED, UNEVEN, equal_weights, lattice, quiet

from fused_dlam import Topology, topology
from fused_dlam.tools.describe import describe

CHAIN = nx.DiGraph([(i, i + 1) for i in range(29)] + [(i, 0) for i in range(1, 30)])  # everybody sends back to 0


def random_columns(n, period, seed=0):
    """Directed, changing; the cycle keeps it connected."""
    rng = np.random.default_rng(seed)
    A = rng.random((period, n, n)) * (rng.random((period, n, n)) < 0.3) + np.eye(n) + np.roll(np.eye(n), 1, axis=0)
    return A / A.sum(axis=1, keepdims=True)


def drawn(seed, n, step):
    rng = topology.generator(seed, step)
    A = rng.rand(n, n) * (rng.rand(n, n) < 0.4) + 0.5 * np.eye(n)
    return A / A.sum(axis=0)


def exact_masses(matrices):
    """w A = w, or A w = w for columns, by elimination in rational numbers; then from step to step."""
    exact = [[[Fraction(v) for v in row] for row in A] for A in matrices]
    n = len(exact[0])
    product = [[Fraction(i == j) for j in range(n)] for i in range(n)]
    for A in exact:
        columns = [sum(A[i][j] for i in range(n)) for j in range(n)]
        for i in range(n):
            for j in range(n):
                A[i][j] /= columns[j]  # what rounding left
        product = [[sum(A[i][k] * product[k][j] for k in range(n)) for j in range(n)] for i in range(n)]
    rows = [[product[i][j] - (i == j) for j in range(n)] + [Fraction(0)] for i in range(n - 1)]
    rows.append([Fraction(1)] * n + [Fraction(n)])
    for k in range(n):
        pivot = next(r for r in range(k, n) if rows[r][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [v / rows[k][k] for v in rows[k]]
        for r in range(n):
            if r != k and rows[r][k]:
                rows[r] = [a - rows[r][k] * b for a, b in zip(rows[r], rows[k], strict=True)]
    w = [[row[-1] for row in rows]]
    for A in exact[:-1]:
        w.append([sum(A[i][j] * w[-1][j] for j in range(n)) for i in range(n)])
    return np.array([[float(v) for v in masses] for masses in w])


GRAPHS = {
    "static 1": [np.eye(1)],
    "static 2": [np.array([[0.9, 0.5], [0.1, 0.5]])],
    "static 3": [UNEVEN.T],
    "changing 5": list(random_columns(5, 4)),
    "changing 8": list(random_columns(8, 3, seed=1)),
    "no weight of their own": [np.array([[0, 0, 1], [0.5, 0.25, 0], [0.5, 0.75, 0]])],
    "tiny masses": [topology.push(CHAIN).weights()],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_masses_are_exact_and_conserved(name):
    A = GRAPHS[name]
    top = Topology(A, name, sums="columns")
    expected, period = exact_masses(A), len(A)
    rows = top.as_rows
    assert (top.sums, rows.sums, rows.as_rows is rows, rows.name) == ("columns", "rows", True, name)
    for k in range(2 * period + 1):
        w, after = top.mass(k), top.mass(k + 1)
        assert w.dtype == np.float64 and w.shape == (top.n,)
        np.testing.assert_allclose(w, expected[k % period], rtol=1e-12, atol=0)
        assert w.sum() == pytest.approx(top.n, rel=1e-13)
        np.testing.assert_array_equal(top.weights(k), A[k % period])
        R = rows.weights(k)
        np.testing.assert_allclose(R, np.diag(1 / after) @ A[k % period] @ np.diag(w), rtol=1e-12, atol=0)
        np.testing.assert_allclose(R.sum(axis=1), 1, rtol=0, atol=1e-13)
        np.testing.assert_allclose(after @ R, w, rtol=1e-12, atol=0)  # so sum_i w_i z_i stays
        np.testing.assert_array_equal(rows.mass(k), w)
    top.mass()[:] = 0
    assert top.mass().sum() == pytest.approx(top.n)
    if name == "tiny masses":
        assert expected.min() < 1e-7


@pytest.mark.parametrize("phases", [[UNEVEN], [UNEVEN, DIRECTED], list(random_columns(5, 4).transpose(0, 2, 1)[::-1])])
def test_masses_where_rows_sum_to_one(phases):
    """w_{k+1} W_k = w_k: those of the transposed matrices in reverse."""
    top = quiet(phases)
    period = len(phases)
    backwards = exact_masses([W.T for W in phases[::-1]])
    for k in range(2 * period):
        np.testing.assert_allclose(top.mass(k), backwards[-k % period], rtol=1e-12)
        np.testing.assert_allclose(top.mass(k + 1) @ top.weights(k), top.mass(k), rtol=1e-12)
    np.testing.assert_allclose(top.mass(), top.n * top.limit_weights, rtol=1e-12)
    assert top.as_rows is top


def test_a_doubly_stochastic_graph_has_ones():
    for top in (
        Topology(DIRECTED, sums="columns"), Topology(topology.ring(5).phases, sums="columns"), topology.random_match(5),
        topology.push(topology.ring(6)), topology.one_peer_exponential(6),
    ):  # fmt: skip
        assert top.is_doubly_stochastic and np.array_equal(top.mass(3), np.ones(top.n))
        assert all(np.array_equal(top.weights(k), top.as_rows.weights(k)) for k in range(4))
        assert top.rho == top.as_rows.rho
    assert not Topology(UNEVEN.T, sums="columns").is_doubly_stochastic


# -- spectra, and graphs that are made from others ---------------------------------------------------------------------


@pytest.mark.parametrize("A", [GRAPHS["static 3"], GRAPHS["changing 5"], GRAPHS["tiny masses"]])
def test_spectra_are_those_of_as_rows(A):
    top = Topology(A, sums="columns")
    rows = quiet([top.as_rows.weights(k) for k in range(len(A))])
    assert top.rho == pytest.approx(rows.rho, rel=1e-6) and top.slowest_rho == pytest.approx(rows.slowest_rho, rel=1e-6)
    np.testing.assert_allclose(top.limit_weights, top.mass() / top.n, rtol=1e-13)
    if len(A) == 1 and top.n < 10:
        both = np.sort_complex(np.append(top.modes[0], 1)), np.sort_complex(np.linalg.eigvals(A[0]).astype(complex))
        np.testing.assert_allclose(*both, rtol=0, atol=1e-12)
    z = np.random.default_rng(0).standard_normal(top.n)
    x, mean = top.mass() * z, top.limit_weights @ z
    for k in range(600 * len(A)):
        x = top.weights(k) @ x
    assert abs(x / top.mass() - mean).max() < 1e-11


@pytest.mark.parametrize(
    "top",
    [
        Topology(random_columns(5, 3), "mine", sums="columns"),
        topology.changing(partial(drawn, 4, 5), 5, sums="columns"),
    ],
)
def test_derived_graphs_keep_their_columns(top):
    for derived in (top.lazy(), top.every(3), top.with_global_average(4), top.every(2).lazy()):
        assert derived.sums == "columns" and not derived.is_doubly_stochastic and 0 <= derived.rho < 1
        for k in range(7):
            A, w = derived.weights(k), derived.mass(k)
            np.testing.assert_allclose(A.sum(axis=0), 1, rtol=0, atol=1e-12)
            np.testing.assert_allclose(A @ w, derived.mass(k + 1), rtol=1e-12)
            np.testing.assert_allclose(derived.as_rows.weights(k).sum(axis=1), 1, rtol=0, atol=1e-12)
            assert derived.degree(k) == derived.as_rows.degree(k) <= derived.as_rows.most_messages
    np.testing.assert_array_equal(top.every(3).weights(2), top.weights(0))
    np.testing.assert_array_equal(top.every(3).mass(2), top.every(3).mass(0))
    with pytest.raises(ValueError, match="not doubly stochastic, so"):
        top.symmetrize()
    again = pickle.loads(pickle.dumps(top))
    assert (again.sums, again.fingerprint) == ("columns", top.fingerprint) == (again.sums, top.as_rows.fingerprint)
    np.testing.assert_array_equal(again.mass(5), top.mass(5))


def test_peers_and_networkx():
    top = Topology(UNEVEN.T, sums="columns")
    assert top.peers(1) == topology.Peers((0, 2), (0.3, 0.4), (2,)) and top.degree() == 2
    again = topology.from_networkx(top.to_networkx(), sums="columns")
    np.testing.assert_array_equal(again.weights(), UNEVEN.T)
    partly = nx.DiGraph()
    partly.add_weighted_edges_from([(0, 1, 0.5), (1, 2, 0.25), (2, 0, 1.0), (0, 2, 0.25)])
    expected = np.array([[0.25, 0, 1], [0.5, 0.75, 0], [0.25, 0.25, 0]])
    np.testing.assert_array_equal(topology.from_networkx(partly, sums="columns").weights(), expected)
    plain = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])
    np.testing.assert_allclose(topology.from_networkx(plain, sums="columns").weights(), topology.push(plain).weights())


# -- the graphs --------------------------------------------------------------------------------------------------------


def test_push_is_its_definition():
    graph = nx.gnp_random_graph(9, 0.4, seed=2, directed=True)
    A = topology.push(graph).weights()
    for j in graph:
        out = set(graph.successors(j)) - {j}
        for i in graph:
            assert A[i, j] == (1 / (1 + len(out)) if i == j or i in out else 0)
    undirected = nx.Graph([("b", "a"), ("a", "c"), ("c", "c")])
    np.testing.assert_allclose(
        topology.push(undirected).weights(), [[1 / 2, 1 / 3, 0], [1 / 2, 1 / 3, 1 / 2], [0, 1 / 3, 1 / 2]]
    )
    by_steps = topology.push(topology.one_peer_ring(5))
    assert by_steps.period == 5 and by_steps.name == "push one-peer-ring" and by_steps.is_doubly_stochastic
    grid = topology.push(topology.grid(6))
    np.testing.assert_allclose(grid.weights(), equal_weights(6, lattice(6, wrap=False)).T)
    never = topology.push(topology.random_match(5))
    np.testing.assert_array_equal(never.weights(7), topology.random_match(5).weights(7))
    assert (never.sums, never.period) == ("columns", None)


def bluefogs(graph, rank):
    """GetDynamicOnePeerSendRecvRanks: the ranks it sends to and receives from, for ever."""
    size = graph.number_of_nodes()
    clockwise = []
    for k in range(size):
        order = sorted(graph.successors(k), key=lambda r, k=k: r - k if r >= k else r - k + size)
        clockwise.append(order[1:] if order[0] == k else order)
    index = 0
    while True:
        target = clockwise[rank][index % len(clockwise[rank])]
        yield target, [o for o in range(size) if o != rank and clockwise[o][index % len(clockwise[o])] == rank]
        index += 1


@pytest.mark.parametrize(
    "graph",
    [topology.grid(8), topology.star(5, center=2), topology.exponential(6), topology.symmetric_exponential(8),
     topology.ring(3), topology.grid(12, shape=(3, 4))], ids=repr)  # fmt: skip
def test_one_peer_is_bluefogs(graph):
    top, edges = topology.one_peer(graph), graph.to_networkx()
    assert top.period == math.lcm(*(len(graph.peers(i).destinations) for i in range(graph.n)))
    walks = [bluefogs(edges, rank) for rank in range(graph.n)]
    for k in range(top.period + 2):
        A = np.eye(graph.n) / 2
        for rank, walk in enumerate(walks):
            target, sources = next(walk)
            A[target, rank] = 0.5
            assert top.peers(rank, k) == topology.Peers(tuple(sources), (0.5,) * len(sources), (target,))
        np.testing.assert_array_equal(top.weights(k), A)
    assert (
        (top.sums == "rows")
        == top.is_doubly_stochastic
        == (graph.name not in ("grid", "grid, 3 x 4", "star, center = 2"))
    )


def test_one_peer_of_an_exponential_graph_is_the_known_one():
    for n in range(1, 12):
        known, ours = topology.one_peer_exponential(n), topology.one_peer(topology.exponential(n))
        assert ours.period == known.period and all(np.array_equal(ours.weights(k), known.weights(k)) for k in range(9))


def test_push_sum_is_exact_on_the_one_peer_mesh_where_pulling_is_not():
    """BlueFog's tutorial: values 0 to 7 on a mesh of 2 x 4, each worker sends to one neighbor by turns. A worker that
    gives equal weights to itself and what it receives agrees with the others on a mean that is 0.129 off."""
    top = topology.one_peer(topology.grid(8))
    x, p, pulled = np.arange(8.0), np.ones(8), np.arange(8.0)
    for k in range(600):
        A = top.weights(k)
        x, p = A @ x, A @ p
        hears = (A > 0) / (A > 0).sum(axis=1, keepdims=True)
        pulled = hears @ pulled
    assert abs(x / p - 3.5).max() < 1e-14 and np.allclose(p, top.mass(600), rtol=1e-12)
    assert np.ptp(pulled) < 1e-12
    assert pulled[0] - 3.5 == pytest.approx(-0.1286716, abs=1e-7)


def test_variants_of_graphs():
    assert topology.grid(12, shape=(3, 4)).fingerprint == topology.grid(12).fingerprint
    line = topology.grid(6, shape=(1, 6))
    assert line.name == "grid, 1 x 6" and line.peers(0).sources == (1,) and line.peers(3).sources == (2, 4)
    star = topology.star(5, center=3)
    assert star.name == "star, center = 3" and star.peers(3).sources == (0, 1, 2, 4) and star.peers(0).sources == (3,)
    order = [3, 1, 2, 0, 4]
    np.testing.assert_allclose(star.weights(), topology.star(5).weights()[np.ix_(order, order)], rtol=0, atol=1e-15)
    four = topology.symmetric_exponential(16, base=4)
    assert four.name == "symmetric-exponential, base = 4" and four.peers(0).sources == (1, 4, 12, 15)
    ring = topology.inner_outer_ring(6, machine_size=6)
    assert ring.name == "inner-outer-ring, machine_size = 6"
    np.testing.assert_array_equal(ring.weights(), topology.one_way_ring(6).weights())


def test_where_symmetric_exponential_is_bluefogs():
    """As the docstring says, for base 2 to 4."""
    for n in range(1, 40):
        for base in (2, 3, 4):
            powers = {base**t for t in range(9)}
            theirs = {k for k in range(1, n) if min(k, n - k) in powers}
            ours = {k % n for p in powers if p < n for k in (p, -p)}
            largest = max((p for p in powers if p < n), default=0)
            same = not (2 * largest > n and n - largest not in powers)
            assert (ours == theirs) == same, (n, base)
            assert set(topology.symmetric_exponential(n, base).peers(0).sources) == ours
            if base == 2:
                assert same == (bin(n).count("1") < 3)


# -- one that need not repeat ------------------------------------------------------------------------------------------


def test_changing_masses_follow_from_the_steps():
    n = 5
    top = topology.changing(partial(drawn, 7, n), n, name="drawn, seed = 7", sums="columns")
    assert (top.period, top.sums, top.most_messages, top.name) == (None, "columns", 4, "drawn, seed = 7")
    w, all_w = np.ones(n), [np.ones(n)]
    for k in range(700):
        w = drawn(7, n, k) @ w
        all_w.append(w)
    for k in (0, 5, 4, 700, 3, 699, 255, 256, 257, 700, 0):
        np.testing.assert_allclose(top.mass(k), all_w[k], rtol=1e-12)
    assert len(top._known) < 50  # not all of them are kept
    np.testing.assert_allclose(
        top.as_rows.weights(9), np.diag(1 / all_w[10]) @ drawn(7, n, 9) @ np.diag(all_w[9]), rtol=1e-12
    )
    again = pickle.loads(pickle.dumps(topology.changing(partial(drawn, 7, n), n, sums="columns")))
    np.testing.assert_array_equal(again.mass(600), top.mass(600))
    assert 0 < top.rho < 1 and top.rho == top.as_rows.rho
    rows = topology.changing(lambda step: topology.circulant(4, (1 + step % 3,)).dense(), 4, degree=1)
    assert rows.as_rows is rows and np.array_equal(rows.mass(9), np.ones(4)) and rows.most_messages == 1


def test_what_the_command_says_of_one():
    """Masses, and of each method whether it is stable or knows none."""
    text = describe(topology.one_peer(topology.grid(8)), 0.9)
    assert "no, columns sum to one" in text and "0.3201 to 1.784, one on average" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip() and line[0] != " "}
    assert rows["mi-dmsgd"] == "knows no masses refused".split() and rows["pmsgd"] == "exact 3.80 1.75 M".split()
    assert rows["push-sum"][0] == "0.9000" and rows["push-sum"][2] == "stable" and 1 < float(rows["push-sum"][3]) < 1.9


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "sums", "message"),
    [
        (UNEVEN, "columns", r"every column must.*; column 0 sums to 1.2 \(its rows do: sums='rows' takes it\)"),
        (UNEVEN.T, "rows", r"every row must sum to one; row 0.*\(its columns do: sums='columns' takes it\)"),
        ([UNEVEN.T, 2 * UNEVEN.T], "columns", "phase 1: every column must sum to one; column 0 sums to 2$"),
        (np.array([[1.5, 0.5], [-0.5, 0.5]]), "columns", "must not be negative, found -0.5"),
        (np.array([[np.nan, 0.5], [0.5, 0.5]]), "columns", "must be finite"),
        (np.array([[1.0, 0.5], [0.0, 0.5]]), "columns", "not connected"),
        (UNEVEN.T, "both", "sums must be 'rows' or 'columns', what sums to one, not 'both'"),
        (UNEVEN.T, None, "sums must be 'rows' or 'columns'"),
        ([[[0, 0, 0.5], [0.5, 1, 0], [0.5, 0, 0.5]]] * 2, "columns", "not connected"),
        ([UNEVEN.T, [[0, 0, 0], [1, 0.5, 0.5], [0, 0.5, 0.5]]], "columns", "not determined|worker 0 has no mass"),
    ],
)  # fmt: skip
def test_wrong_columns_are_refused(weights, sums, message):
    with pytest.raises(ValueError, match=message):
        Topology(weights, sums=sums)


def test_masses_too_small_are_refused():
    """Half of what each has goes back to worker 0, so the last of n holds about 2^-n."""
    n = 140
    chain = nx.DiGraph([(i, i + 1) for i in range(n - 1)] + [(i, 0) for i in range(1, n)])
    with pytest.raises(ValueError, match=r"'push': worker 139 has a mass of .*e-\d\d, and push-sum divides by it"):
        topology.push(chain)
    assert 1e-38 < topology.push(chain.subgraph(range(120))).mass().min() < 1e-30
    emptied = topology.changing(
        lambda k: np.array([[0.0, 0], [1, 1]]) if k == 40 else np.full((2, 2), 0.5), 2, sums="columns"
    )
    with pytest.raises(ValueError, match="'changing', step 41: worker 0 has no mass"):
        emptied.mass(50)
    unheard = quiet([UNEVEN, [[0, 0.5, 0.5], [0, 1, 0], [0, 0, 1]]])  # nobody hears worker 0, not even itself
    with pytest.raises(ValueError, match="worker 0 has no mass"):
        unheard.mass()


def test_wrong_arguments_are_refused():
    for make in (topology.push, topology.one_peer):
        for wrong in ("grid", np.eye(3), None):
            with pytest.raises(TypeError, match="a networkx.Graph, a DiGraph or a Topology is needed"):
                make(wrong)
        with pytest.raises(ValueError, match="no nodes"):
            make(nx.DiGraph())
        with pytest.raises(ValueError, match="not connected"):
            make(nx.DiGraph([(0, 1), (1, 2)]))
    with pytest.raises(ValueError, match="never repeats"):
        topology.one_peer(topology.random_match(4))
    degrees = nx.DiGraph([(i, (i + d) % 40) for i in range(40) for d in range(1, i + 1)] + [(0, 1)])
    with pytest.raises(ValueError, match=r"repeat after 5,342,931,457,063,200 steps.*topology.changing"):
        topology.one_peer(degrees)
    for arguments, message in (
        ({"shape": (2, 3)}, "2 x 3 has 6 workers, not 8"), ({"shape": (0, 8)}, "number of rows must be"),
        ({"shape": 4}, r"shape must be \(rows, columns\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            topology.grid(8, **arguments)
    with pytest.raises(ValueError, match="the center must be one of the 4 workers, 0 to 3, not 4"):
        topology.star(4, center=4)
    with pytest.raises(TypeError, match="draw must be a function of the step, not ndarray"):
        topology.changing(np.eye(2), 2)
    with pytest.raises(ValueError, match="step 0: every column must sum to one, or"):
        topology.changing(lambda step: UNEVEN, 3)
    with pytest.raises(ValueError, match="a worker hears from 2 others, more than 1"):
        topology.changing(lambda step: UNEVEN.T, 3, sums="columns", degree=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # columns are no mistake
        assert Topology(UNEVEN.T, sums="columns").as_rows.rho < 1
    with pytest.warns(UserWarning, match="but not with the methods 'push-sum'"):
        Topology(UNEVEN)
