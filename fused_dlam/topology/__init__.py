"""Who averages with whom: the family of topologies by name, and topologies from graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import networkx as nx
import numpy as np

from .base_graph import base_k
from .drawn import RandomTopology, check_seed, generator
from .equitopo import d_equistatic, od_equidyn, ou_equidyn, u_equistatic
from .matrix import Circulant, Peers, Phase, Sparse, check_workers, circulant, identity, sparse
from .topology import Topology

__all__ = [
    "Circulant",
    "FAMILY",
    "Peers",
    "Phase",
    "RandomTopology",
    "Sparse",
    "Topology",
    "base_k",
    "circulant",
    "d_equistatic",
    "exponential",
    "from_networkx",
    "full",
    "generator",
    "get",
    "grid",
    "hypercube",
    "identity",
    "inner_outer_exponential",
    "metropolis_hastings",
    "od_equidyn",
    "one_peer_exponential",
    "one_peer_hypercube",
    "one_peer_ring",
    "one_way_ring",
    "ou_equidyn",
    "random_match",
    "ring",
    "sparse",
    "star",
    "symmetric_exponential",
    "torus",
    "u_equistatic",
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
    return Topology(circulant(check_workers(n), range(n)), "full")


def ring(n: int) -> Topology:
    """Both neighbors on a cycle, 1/3 each (1/2 each for n = 2)."""
    return Topology(circulant(check_workers(n), (1, -1)), "ring")


def grid(n: int) -> Topology:
    """A rows x columns grid, as square as n allows (a line if n is prime); Metropolis-Hastings."""
    rows = _rows(check_workers(n))
    return Topology(metropolis_hastings(nx.grid_2d_graph(rows, n // rows)), "grid")


def torus(n: int) -> Topology:
    """The grid with its edges joined; Metropolis-Hastings."""
    rows = _rows(check_workers(n))
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    for i, j in itertools.product(range(rows), range(n // rows)):
        for a, b in (((i + 1) % rows, j), (i, (j + 1) % (n // rows))):
            graph.add_edge(i * (n // rows) + j, a * (n // rows) + b)
    return Topology(metropolis_hastings(graph), "torus")


def star(n: int) -> Topology:
    """Worker 0 in the middle; Metropolis-Hastings, that is 1/n on every edge."""
    return Topology(metropolis_hastings(nx.star_graph(check_workers(n) - 1)), "star")


def hypercube(n: int) -> Topology:
    """i xor 2^t for every t, equal weights. n must be a power of two."""
    bits = _bits(n, "hypercube")
    W = np.eye(n)
    for t in range(bits):
        W[np.arange(n), np.arange(n) ^ (1 << t)] = 1
    return Topology(W / (bits + 1), "hypercube")


def one_way_ring(n: int) -> Topology:
    """Worker i hears from i - 1, 1/2 and 1/2. Directed."""
    return Topology(circulant(check_workers(n), (1,)), "one-way-ring")


def exponential(n: int, base: int = 2) -> Topology:
    """Worker i hears from i - 1, i - 2, i - 4, ... (mod n), the powers of a base; equal weights. Directed."""
    powers = _powers(check_workers(n), base)
    return Topology(circulant(n, powers), "exponential" if base == 2 else f"exponential, base = {base}")


def symmetric_exponential(n: int) -> Topology:
    """Worker i hears from i +- 1, i +- 2, i +- 4, ... (mod n), equal weights. Symmetric."""
    powers = _powers(check_workers(n))
    return Topology(circulant(n, (*powers, *(-k for k in powers))), "symmetric-exponential")


def one_peer_exponential(n: int) -> Topology:
    """At step k worker i hears from i - 2^(k mod ceil(log2 n)), 1/2 and 1/2 (Ying et al. 2021).

    For a power of two the product over a period is exact averaging.
    """
    return Topology([circulant(n, (k,)) for k in _powers(check_workers(n)) or (0,)], "one-peer-exponential")


def one_peer_hypercube(n: int) -> Topology:
    """At step k worker i exchanges with i xor 2^(k mod log2 n), 1/2 and 1/2. n must be a power of two."""
    bits = _bits(n, "one_peer_hypercube")
    return Topology([_one_peer(np.arange(n) ^ 1 << t) for t in range(bits)] or identity(n), "one-peer-hypercube")


def one_peer_ring(n: int) -> Topology:
    """Pairs (0, 1) (2, 3) ..., then (1, 2) (3, 4) ..., 1/2 and 1/2. For odd n another worker is left out at each step.

    Period 2 for even n, n for odd n, in which every edge of the ring has its turn.
    """
    period = 1 if check_workers(n) <= 2 else 2 if n % 2 == 0 else n
    firsts = np.arange(0, n - 1, 2)
    return Topology([_paired(n, (firsts + t) % n, (firsts + t + 1) % n) for t in range(period)], "one-peer-ring")


def random_match(n: int, seed: int = 0) -> RandomTopology:
    """At every step another uniformly random pairing, 1/2 and 1/2; for odd n one worker is left out. Never repeats."""
    draw = partial(_random_pairs, check_workers(n), check_seed(seed))
    return RandomTopology(draw, n, min(1, n - 1), f"random-match, seed = {seed}" if seed else "random-match")


def _random_pairs(n: int, seed: int, step: int) -> Sparse:
    order = generator(seed, step).permutation(n)
    return _paired(n, order[0 : n - 1 : 2], order[1:n:2])


def inner_outer_exponential(n: int, machine_size: int | None = None) -> Topology:
    """One peer per step, inside the machine but for one worker of each, which hears from its like on another machine.

    At step k, in a machine of m workers, worker k mod m hears from the machine 2^(k mod t) before, t = ceil(log2 of
    the number of machines); the others form a one-peer exponential graph, skipping it. 1/2 and 1/2, directed. This is
    BlueFog's GetInnerOuterExpo2DynamicSendRecvRanks.

    Args:
        machine_size: m, which must divide n; by default the divisor nearest the root of n, 2 left out. With m = 1 or
            m = n this is the one-peer exponential graph; with m = 2 the two would never hear each other: ValueError.
    """
    sizes = [m for m in range(1, check_workers(n) + 1) if n % m == 0 and m != 2]
    m = min(sizes, key=lambda m: abs(m - math.sqrt(n))) if machine_size is None else machine_size
    if m not in sizes:
        raise ValueError(f"machine_size must be a divisor of the {n} workers other than 2, not {m!r}")
    machines, inside = n // m, np.arange(n) % m
    outer = _powers(machines) or (0,)
    inner = _powers(m - 1 if machines > 1 else m) or (0,)
    phases = []
    for t in range(math.lcm(m if machines > 1 else 1, len(outer), len(inner))):
        hop = np.full(n, inner[t % len(inner)])
        if machines > 1:
            hop += hop >= (inside - t) % m  # skip the one that is outside
        sources = np.arange(n) - inside + (inside - hop) % m
        if machines > 1:
            sources = np.where(inside == t % m, (np.arange(n) - m * outer[t % len(outer)]) % n, sources)
        phases.append(_one_peer(sources))
    return Topology(phases, "inner-outer-exponential" + (f", machine_size = {m}" if machine_size else ""))


FAMILY: dict[str, Callable[..., Topology]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        full, ring, one_way_ring, grid, torus, star, hypercube, exponential, symmetric_exponential, d_equistatic,
        u_equistatic, one_peer_exponential, one_peer_hypercube, one_peer_ring, base_k, inner_outer_exponential,
        random_match, od_equidyn, ou_equidyn,
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


def _powers(n: int, base: int = 2) -> tuple[int, ...]:
    if isinstance(base, bool) or not isinstance(base, int) or base < 2:
        raise ValueError(f"the base must be an integer >= 2, not {base!r}")
    return tuple(itertools.takewhile(lambda power: power < n, (base**t for t in itertools.count())))


def _one_peer(sources: np.ndarray) -> Sparse:
    """Each worker hears from one, or from itself."""
    return Sparse(sources[:, None], np.where(sources == np.arange(len(sources)), 0.0, 0.5)[:, None])


def _paired(n: int, i: np.ndarray, j: np.ndarray) -> Sparse:
    partner = np.arange(n)
    partner[i], partner[j] = j, i
    return _one_peer(partner)


def _bits(n: int, name: str) -> int:
    if check_workers(n) & (n - 1):
        raise ValueError(f"{name} needs a power of two, not {n} workers; one_peer_exponential takes any number")
    return n.bit_length() - 1


def _rows(n: int) -> int:
    return next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
