"""Promises about graphs from networkx: edges keep their direction and weights, and wrong graphs are refused."""

import networkx as nx
import numpy as np
import pytest
from by_hand import UNEVEN, equal_weights, family, metropolis, quiet

from fused_dlam import topology
from fused_dlam.topology import from_networkx, metropolis_hastings


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
