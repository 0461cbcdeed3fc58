"""Who averages with whom: the family of topologies by name, and topologies from graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import networkx as nx
import numpy as np

from .mixing import Circulant, Peers, Phase, Topology, circulant, identity

__all__ = [
    "Circulant",
    "FAMILY",
    "Peers",
    "Phase",
    "Topology",
    "circulant",
    "exponential",
    "from_networkx",
    "full",
    "get",
    "grid",
    "hypercube",
    "identity",
    "metropolis_hastings",
    "one_peer_exponential",
    "one_peer_hypercube",
    "ring",
    "star",
    "symmetric_exponential",
    "torus",
]


def metropolis_hastings(graph: nx.Graph) -> np.ndarray:
    """Symmetric weights for an undirected graph: 1/(1 + the larger degree) per edge, what is left for oneself."""
    n = graph.number_of_nodes()
    index = {node: i for i, node in enumerate(graph)}
    degree = {node: len(set(graph[node]) - {node}) for node in graph}
    W = np.zeros((n, n))
    for a, b in graph.edges:
        if a != b:
            W[index[a], index[b]] = W[index[b], index[a]] = 1 / (1 + max(degree[a], degree[b]))
    np.fill_diagonal(W, 1 - W.sum(axis=1))
    return W


def from_networkx(graph: nx.Graph, name: str = "networkx") -> Topology:
    """A topology from a graph whose nodes, in their order, are the workers.

    An edge j -> i carries j's message to i. With `weight` attributes those are the weights, and each worker keeps the
    rest for itself unless it has a self-loop; without, an undirected graph gets Metropolis-Hastings weights and a
    directed one equal weights on everything a worker hears, itself included.
    """
    if graph.number_of_nodes() == 0:
        raise ValueError("the graph has no nodes")
    weighted = [data for _, _, data in graph.edges(data=True) if "weight" in data]
    if weighted and len(weighted) < graph.number_of_edges():
        raise ValueError("some edges have a 'weight' and some have none")
    if not weighted and not graph.is_directed():
        return Topology(metropolis_hastings(graph), name)
    A = nx.to_numpy_array(graph, weight="weight" if weighted else None).T
    if not weighted:
        np.fill_diagonal(A, 1)
        return Topology(A / A.sum(axis=1, keepdims=True), name)
    for i in np.flatnonzero(A.diagonal() == 0):
        A[i, i] = max(0.0, 1 - A[i].sum())
    return Topology(A, name)


# -- the family --------------------------------------------------------------------------------------------------------


def full(n: int) -> Topology:
    """Everybody hears everybody: W = J."""
    return Topology(circulant(_workers(n), range(n)), "full")


def ring(n: int) -> Topology:
    """Both neighbors on a cycle, 1/3 each (1/2 each for n = 2)."""
    return Topology(circulant(_workers(n), (1, -1)), "ring")


def grid(n: int) -> Topology:
    """A rows x columns grid, as square as n allows (a line if n is prime); Metropolis-Hastings."""
    rows = _rows(_workers(n))
    return Topology(metropolis_hastings(nx.grid_2d_graph(rows, n // rows)), "grid")


def torus(n: int) -> Topology:
    """The grid with its edges joined; Metropolis-Hastings."""
    rows = _rows(_workers(n))
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    for i, j in itertools.product(range(rows), range(n // rows)):
        for a, b in (((i + 1) % rows, j), (i, (j + 1) % (n // rows))):
            graph.add_edge(i * (n // rows) + j, a * (n // rows) + b)
    return Topology(metropolis_hastings(graph), "torus")


def star(n: int) -> Topology:
    """Worker 0 in the middle; Metropolis-Hastings, that is 1/n on every edge."""
    return Topology(metropolis_hastings(nx.star_graph(_workers(n) - 1)), "star")


def hypercube(n: int) -> Topology:
    """i xor 2^t for every t, equal weights. n must be a power of two."""
    bits = _bits(n, "hypercube")
    W = np.eye(n)
    for t in range(bits):
        W[np.arange(n), np.arange(n) ^ (1 << t)] = 1
    return Topology(W / (bits + 1), "hypercube")


def exponential(n: int) -> Topology:
    """Worker i hears from i - 1, i - 2, i - 4, ... (mod n), equal weights. Directed."""
    return Topology(circulant(_workers(n), _powers(n)), "exponential")


def symmetric_exponential(n: int) -> Topology:
    """Worker i hears from i +- 1, i +- 2, i +- 4, ... (mod n), equal weights. Symmetric."""
    powers = _powers(_workers(n))
    return Topology(circulant(n, (*powers, *(-k for k in powers))), "symmetric-exponential")


def one_peer_exponential(n: int) -> Topology:
    """At step k worker i hears from i - 2^(k mod ceil(log2 n)), 1/2 and 1/2 (Ying et al. 2021).

    For a power of two the product over a period is exact averaging.
    """
    return Topology([circulant(n, (k,)) for k in _powers(_workers(n)) or (0,)], "one-peer-exponential")


def one_peer_hypercube(n: int) -> Topology:
    """At step k worker i exchanges with i xor 2^(k mod log2 n), 1/2 and 1/2. n must be a power of two."""
    phases = []
    for t in range(_bits(n, "one_peer_hypercube")):
        W = np.eye(n) / 2
        W[np.arange(n), np.arange(n) ^ (1 << t)] = 1 / 2
        phases.append(W)
    return Topology(phases or identity(n), "one-peer-hypercube")


FAMILY: dict[str, Callable[[int], Topology]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        full, ring, grid, torus, star, hypercube, exponential, symmetric_exponential, one_peer_exponential,
        one_peer_hypercube,
    )
}  # fmt: skip


def get(topology: str | Topology, n: int) -> Topology:
    """A topology by name for n workers, or the topology itself if it has n.

    Raises ValueError for an unknown name or another number of workers, TypeError for anything else.
    """
    if isinstance(topology, Topology):
        if topology.n != n:
            raise ValueError(f"topology {topology.name!r} is for {topology.n} workers, but there are {n}")
        return topology
    if not isinstance(topology, str):
        raise TypeError(f"topology must be a name or a Topology, not {type(topology).__name__}")
    if topology not in FAMILY:
        raise ValueError(f"unknown topology {topology!r}; known: {', '.join(FAMILY)} (or pass a Topology)")
    return FAMILY[topology](n)


def _workers(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"the number of workers must be an integer >= 1, not {n!r}")
    return int(n)


def _powers(n: int) -> tuple[int, ...]:
    return tuple(1 << t for t in range(math.ceil(math.log2(n)))) if n > 1 else ()


def _bits(n: int, name: str) -> int:
    if _workers(n) & (n - 1):
        raise ValueError(f"{name} needs a power of two, not {n} workers; one_peer_exponential takes any number")
    return n.bit_length() - 1


def _rows(n: int) -> int:
    return next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
