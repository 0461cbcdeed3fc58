"""Promises about topologies, whatever they are asked for:

- every constructor gives a topology or refuses in words, whatever kind of number it is given;
- rows of every step's matrix sum to one, and columns too where the graph says so; weights are at least 0 and finite;
- who a worker sends to hears from it, with the weight that the matrix has; `pull` is W y - y;
- after a period the matrices repeat; a graph that never repeats draws the same step the same way twice;
- what is derived (lazy, symmetrize, every, with_global_average) is what the dense matrices say;
- rho is at most 1 and finite, and what is left of disagreement after many periods is nothing.
"""

import networkx as nx
import numpy as np
from api_examples import fuzzed, refused
from hypothesis import assume
from hypothesis import strategies as st

from fused_dlam import topology
from fused_dlam.topology import FAMILY, Circulant, RandomTopology, Sparse, Topology

ODD = st.sampled_from(
    [0, -1, 1.0, 2.5, True, False, None, "4", "", float("nan"), float("inf"), -float("inf"), np.int64(4), np.int8(3),
     np.float64(3), np.bool_(True), np.array(4), np.array([4]), [4], (), {}, b"4", 3j, 10**30, -(10**30), object]
)  # fmt: skip
SOME = st.integers(1, 12)
FINITE = st.floats(0, 1, allow_subnormal=False)


def hold(graph, n=None):
    """All that is promised of a topology."""
    n = graph.n if n is None else n
    assert graph.n == n and type(graph.n) is int
    steps = 2 * graph.period if graph.period and graph.period <= 12 else 5
    for step in range(steps):
        W = graph.weights(step)
        assert W.shape == (n, n) and W.dtype == np.float64 and (W >= 0).all()
        np.testing.assert_allclose(W.sum(1), 1, atol=1e-9)
        if graph.is_doubly_stochastic:
            np.testing.assert_allclose(W.sum(0), 1, atol=1e-9)
        if graph.is_symmetric and graph.period:
            np.testing.assert_allclose(W, W.T, atol=1e-9)
        assert np.array_equal(W, graph.weights(step))
        if graph.period:
            assert np.array_equal(W, graph.weights(step + graph.period))
        peers = [graph.peers(i, step) for i in range(n)]
        for i, mine in enumerate(peers):
            assert i not in mine.sources and len(set(mine.sources)) == len(mine.sources) == len(mine.weights)
            assert sorted(mine.sources) == [j for j in range(n) if j != i and W[i, j] > 0]
            assert all(w == W[i, j] for j, w in zip(mine.sources, mine.weights, strict=True))
            assert sorted(mine.destinations) == [j for j in range(n) if i in peers[j].sources]
        assert graph.degree(step) == max(len(mine.sources) for mine in peers)
        y = np.random.default_rng(step).standard_normal((n, 2))
        np.testing.assert_allclose(graph.phase(step).pull(y), W @ y - y, atol=1e-9)
        assert graph.averages_exactly(step) == bool(np.allclose(W * n, 1, rtol=0, atol=1e-8))
    assert 0 <= graph.rho <= graph.slowest_rho <= 1 + 1e-9 and len(graph.fingerprint) == 16
    np.testing.assert_allclose(graph.limit_weights.sum(), 1, atol=1e-6)
    if graph.period and graph.period <= 64 and graph.rho < 0.99:
        product = np.eye(n)
        for step in range(graph.period):
            product = graph.weights(step) @ product
        for _ in range(14):
            product = product @ product
        np.testing.assert_allclose(product, np.tile(graph.limit_weights, (n, 1)), atol=1e-5)


@fuzzed(60, 0.08, name=st.sampled_from(sorted(FAMILY)), n=SOME | st.sampled_from([np.int64(5), np.uint8(7)]) | ODD)
def test_by_name(name, n):
    graph, error = refused(lambda: topology.get(name, n))
    if error is None:
        assert isinstance(n, (int, np.integer)) and not isinstance(n, bool)
        hold(graph, int(n))
    else:
        good = isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 1
        assert not good or ("hypercube" in name and int(n) & (int(n) - 1)) or n > 10**9


PARAMETERS = {"base_k": "k", "exponential": "base", "d_equistatic": "offsets", "u_equistatic": "offsets",
              "od_equidyn": "eta", "ou_equidyn": "eta", "random_match": "seed",
              "inner_outer_exponential": "machine_size", "inner_outer_ring": "machine_size",
              "symmetric_exponential": "base", "star": "center", "grid": "shape"}  # fmt: skip


@fuzzed(60, 0.08, name=st.sampled_from(sorted(PARAMETERS)), n=SOME, value=SOME | FINITE | ODD, seed=SOME | ODD)
def test_parameters(name, n, value, seed):
    options = {PARAMETERS[name]: value}
    if "equi" in name:
        options["seed"] = seed
    graph, error = refused(lambda: getattr(topology, name)(n, **options))
    if error is None:
        hold(graph, n)


@fuzzed(20, 0.03, wrong=ODD | st.text(max_size=12) | st.sampled_from([np.eye(3), lambda n: None, len, topology.ring]),
        n=SOME)  # fmt: skip
def test_get(wrong, n):
    assume(wrong not in (object, len) if callable(wrong) else True)  # what a function raises is its own
    graph, error = refused(lambda: topology.get(wrong, n))
    if error is None:
        hold(graph, n)


def rows(draw, n, kind):
    """A matrix that is row stochastic, or almost, or not at all."""
    numbers = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 3.0]) | FINITE
    W = np.array(draw(st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=n, max_size=n)))
    if kind == "symmetric":
        W = (W + W.T) / 2
        W = np.minimum(W, 1 / n)
        np.fill_diagonal(W, 0)
        np.fill_diagonal(W, 1 - W.sum(1))
    elif kind != "raw":
        W = W + np.eye(n)
        W = W / W.sum(1, keepdims=True)
    if kind == "harmed":
        W[draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1))] = draw(
            st.sampled_from([np.nan, np.inf, -np.inf, -1e-3, 1.1, 1e-300, -0.0])
        )
    return W


KIND = st.sampled_from(["symmetric", "rows", "raw", "harmed"])


@fuzzed(60, 0.08, data=st.data(), n=st.integers(1, 6), kind=KIND, period=st.integers(1, 3))
def test_matrices(data, n, kind, period):
    Ws = [rows(data.draw, n, kind) for _ in range(period)]
    given = data.draw(st.sampled_from([Ws, np.stack(Ws), Ws[0], [W.tolist() for W in Ws], tuple(Ws)]))
    graph, error = refused(lambda: Topology(given))
    if error is None:
        hold(graph)
        np.testing.assert_array_equal(graph.weights(0), Ws[0])
    else:
        assert kind in ("raw", "harmed") or "is not connected" in str(error)


LISTS = st.recursive(ODD | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=9)
SIZE = st.integers(0, 3)


@fuzzed(30, 0.03, weights=LISTS | st.builds(lambda *shape: np.ones(shape), SIZE, SIZE, SIZE))
def test_what_is_no_matrix(weights):
    graph, error = refused(lambda: Topology(weights))
    if error is None:
        hold(graph)


OFFSETS = st.lists(st.tuples(st.integers(-9, 9), st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.5, np.nan])), max_size=4)


@fuzzed(40, 0.04, n=st.integers(1, 7), offsets=OFFSETS, fill=st.booleans(), width=st.integers(0, 3), data=st.data())
def test_forms(n, offsets, fill, width, data):
    """Circulant and Sparse, as a user may build them."""
    if fill:
        offsets = [*offsets, (0, 1 - sum(w for _, w in offsets))]
    graph, error = refused(lambda: Topology(Circulant(n, tuple(offsets))))
    if error is None:
        hold(graph, n)
    who = st.lists(st.lists(st.integers(0, n - 1), min_size=width, max_size=width), min_size=n, max_size=n)
    sources = np.array(data.draw(who), dtype=int).reshape(n, width)
    assume(all(len(set(row)) == len(row) for row in sources.tolist()))
    others = np.where(sources != np.arange(n)[:, None], data.draw(st.sampled_from([0.2, 0.3, 0.0])), 0.0)
    graph, error = refused(lambda: Topology([Sparse(sources, others)] * data.draw(st.integers(1, 2))))
    if error is None:
        hold(graph, n)


CHANGES = st.lists(st.sampled_from(["lazy", "symmetrize", "every", "with_global_average"]), max_size=3)


@fuzzed(
    50, 0.06, name=st.sampled_from(sorted(FAMILY)), n=st.sampled_from([1, 2, 4, 6, 8]), k=SOME | ODD, changes=CHANGES
)
def test_derived(name, n, k, changes):
    assume("hypercube" not in name or n != 6)
    graph = FAMILY[name](n)
    for change in changes:
        before = graph
        arguments = (k,) if change in ("every", "with_global_average") else ()
        graph, error = refused(lambda: getattr(graph, change)(*arguments))  # noqa: B023
        if error is not None:
            assert arguments and not (isinstance(k, int) and 1 <= k < 2**20) or isinstance(k, bool), error
            return
        for t in range(7):
            W, J = before.weights(t), np.full((n, n), 1 / n)
            wanted = {
                "lazy": lambda: (np.eye(n) + W) / 2,  # noqa: B023
                "symmetrize": lambda: (W + W.T) / 2,  # noqa: B023
                "every": lambda: before.weights(t // k) if t % k == k - 1 else np.eye(n),  # noqa: B023
                "with_global_average": lambda: J if t % k == k - 1 else W,  # noqa: B023
            }[change]()
            np.testing.assert_allclose(graph.weights(t), wanted, atol=1e-12)
    if not graph.period or graph.period <= 300:
        hold(graph, n)


@fuzzed(40, 0.04, n=st.integers(0, 6), directed=st.booleans(), multi=st.booleans(), weighted=st.sampled_from(
    ["no", "all", "some"]), data=st.data())  # fmt: skip
def test_networkx(n, directed, multi, weighted, data):
    kinds = [[nx.Graph, nx.MultiGraph], [nx.DiGraph, nx.MultiDiGraph]]
    graph = kinds[directed][multi]()
    graph.add_nodes_from([f"worker {i}" for i in range(n)])
    edges = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)) if n else st.nothing()
    for i, j in data.draw(st.lists(edges, max_size=10)) if n else ():
        has = weighted == "all" or (weighted == "some" and data.draw(st.booleans()))
        numbers = st.sampled_from([0.1, 0.2, 0.25, 0.5, 1, -0.1, 2.0, np.nan, None, "0.5"])
        graph.add_edge(f"worker {i}", f"worker {j}", **({"weight": data.draw(numbers)} if has else {}))
    made, error = refused(lambda: topology.from_networkx(graph))
    if error is None:
        hold(made, n)
        for step_graph in (made.to_networkx(),):
            np.testing.assert_allclose(nx.to_numpy_array(step_graph, weight="weight").T, made.weights())


def constant(phase, step):
    return phase


@fuzzed(30, 0.03, n=st.integers(1, 5), degree=SOME | ODD, data=st.data(), name=st.sampled_from(sorted(FAMILY)))
def test_drawn_by_a_user(n, degree, data, name):
    assume("hypercube" not in name or n in (1, 2, 4))
    inner = FAMILY[name](n)
    draws = [inner.phase, lambda t: inner.weights(t), lambda t: None, lambda t: topology.identity(n), lambda t: 3,
             lambda t: Circulant(n + 1, ((0, 1.0),)), lambda t: Circulant(n, ((0, 0.5),))]  # fmt: skip
    graph, error = refused(lambda: RandomTopology(data.draw(st.sampled_from(draws)), n, degree))
    if error is None:
        hold(graph, n)
