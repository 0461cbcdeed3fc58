"""The graphs: from networkx, and most of the family by name. One function of n each."""

from __future__ import annotations

import itertools
import math
from functools import partial
from numbers import Real

import networkx as nx
import numpy as np

from .checks import check_word
from .drawn import RandomTopology, check_seed, generator
from .matrix import Sparse, average, check_count, check_workers, circulant, identity
from .topology import Topology


def metropolis_hastings(graph: nx.Graph) -> np.ndarray:
    """Symmetric weights for an undirected graph: 1/(1 + the larger degree) per edge. A worker keeps the rest.

    Edges that a multigraph has several times count once. Raises ValueError for a directed graph, whose nodes have two
    degrees.
    """
    _check_graph(graph)
    if graph.is_directed():
        raise ValueError("Metropolis-Hastings weights are those of an undirected graph: pass graph.to_undirected()")
    n = graph.number_of_nodes()
    index = {node: i for i, node in enumerate(graph)}
    degree = {node: len(set(graph[node]) - {node}) for node in graph}
    W = np.zeros((n, n))
    for a, b in graph.edges():
        if a != b:
            W[index[a], index[b]] = W[index[b], index[a]] = 1 / (1 + max(degree[a], degree[b]))
    np.fill_diagonal(W, 1 - W.sum(axis=1))
    return W


def from_networkx(graph: nx.Graph, name: str = "networkx", sums: str = "rows") -> Topology:
    """A topology from a graph whose nodes, in their order, are the workers.

    An edge j -> i carries j's message to i. If the edges have a `weight`, that is the weight, and a worker without a
    self-loop keeps the rest for itself. If they have none, an undirected graph gets Metropolis-Hastings weights. In a
    directed graph each worker gives equal weights to itself and to everybody it hears from; with sums="columns" to
    everybody it sends to. Weights of edges that a multigraph has several times add up.
    """
    check_word(sums)
    _check_graph(graph)
    if graph.number_of_nodes() == 0:
        raise ValueError("the graph has no nodes")
    weighted = [data["weight"] for _, _, data in graph.edges(data=True) if "weight" in data]
    for weight in weighted:
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"an edge's weight must be a number, not {weight!r}")
    if weighted and len(weighted) < graph.number_of_edges():
        raise ValueError("some edges have a 'weight' and some have none")
    if not weighted and not graph.is_directed():
        return Topology(metropolis_hastings(graph), name, sums)
    across = 1 if sums == "rows" else 0
    A = nx.to_numpy_array(graph, weight="weight" if weighted else None).T
    if not weighted:
        A = (A > 0).astype(np.float64)
        np.fill_diagonal(A, 1)
        return Topology(A / A.sum(axis=across, keepdims=True), name, sums)
    for i in np.flatnonzero(A.diagonal() == 0):
        A[i, i] = max(0.0, 1 - A.sum(axis=across)[i])
    return Topology(A, name, sums)


# -- the same matrix at every step -------------------------------------------------------------------------------------


def full(n: int) -> Topology:
    """Everybody hears everybody: W = J."""
    return Topology(average(check_workers(n)), "full")


def ring(n: int) -> Topology:
    """Both neighbors on a cycle, 1/3 each (1/2 each for n = 2)."""
    return Topology(circulant(check_workers(n), (1, -1)), "ring")


def grid(n: int, shape: tuple[int, int] | None = None) -> Topology:
    """A grid, as square as n allows (a line if n is prime). Metropolis-Hastings weights.

    Args:
        shape: (rows, columns) instead, whose product is n. Worker r columns + c is in row r and column c.
    """
    n = check_workers(n)
    if shape is None:
        rows, name = _rows(n), "grid"
    else:
        if not isinstance(shape, (tuple, list)) or len(shape) != 2:
            raise ValueError(f"shape must be (rows, columns), not {shape!r}")
        rows, columns = check_count("the number of rows", shape[0]), check_count("the number of columns", shape[1])
        if rows * columns != n:
            raise ValueError(f"a grid of shape {rows} x {columns} has {rows * columns} workers, not {n}")
        name = f"grid, {rows} x {columns}"
    return Topology(metropolis_hastings(nx.grid_2d_graph(rows, n // rows)), name)


def torus(n: int) -> Topology:
    """The grid with opposite borders joined. Metropolis-Hastings weights."""
    n = check_workers(n)
    rows = _rows(n)
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    for i, j in itertools.product(range(rows), range(n // rows)):
        for a, b in (((i + 1) % rows, j), (i, (j + 1) % (n // rows))):
            graph.add_edge(i * (n // rows) + j, a * (n // rows) + b)
    return Topology(metropolis_hastings(graph), "torus")


def star(n: int, center: int = 0) -> Topology:
    """Worker 0 in the middle. Metropolis-Hastings weights: 1/n on every edge.

    Args:
        center: another worker in the middle.
    """
    n, center = check_workers(n), check_count("the center", center, at_least=0)
    if center >= n:
        raise ValueError(f"the center must be one of the {n} workers, 0 to {n - 1}, not {center}")
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from((center, i) for i in range(n) if i != center)
    return Topology(metropolis_hastings(graph), f"star, center = {center}" if center else "star")


def hypercube(n: int) -> Topology:
    """Worker i hears from i xor 2^t for all t, equal weights. n must be a power of two."""
    n, bits = _bits(n, "hypercube")
    W = np.eye(n)
    for t in range(bits):
        W[np.arange(n), np.arange(n) ^ (1 << t)] = 1
    return Topology(W / (bits + 1), "hypercube")


def one_way_ring(n: int) -> Topology:
    """Worker i hears from i - 1, 1/2 and 1/2. Directed."""
    return Topology(circulant(check_workers(n), (1,)), "one-way-ring")


def exponential(n: int, base: int = 2) -> Topology:
    """Worker i hears from i - 1, i - 2, i - 4, ... (mod n), equal weights. Directed.

    Args:
        base: the offsets are its powers below n.
    """
    n = check_workers(n)
    powers = _powers(n, base)
    return Topology(circulant(n, powers), "exponential" if base == 2 else f"exponential, base = {base}")


def symmetric_exponential(n: int, base: int = 2) -> Topology:
    """Worker i hears from i +- 1, i +- 2, i +- 4, ... (mod n), equal weights. Symmetric.

    Args:
        base: the offsets are its powers below n, those beyond n/2 as well: 5 workers and base 4 hear at +- 1 and +- 4,
            which is the same ring. BlueFog's SymmetricExponentialGraph (base 4 by default) keeps powers up to n/2. The
            two differ where the largest power p below n is beyond n/2 and n - p is no power: with base 2 for n = 7, 11,
            13, 14, 15, 19, ..., in all n with three or more binary digits of one. Ours then has an offset more.
    """
    n = check_workers(n)
    powers = _powers(n, base)
    offsets = (*powers, *(-k for k in powers))
    return Topology(
        circulant(n, offsets), "symmetric-exponential" if base == 2 else f"symmetric-exponential, base = {base}"
    )


# -- one peer per step -------------------------------------------------------------------------------------------------


def one_peer_exponential(n: int) -> Topology:
    """At step k worker i hears from i - 2^(k mod ceil(log2 n)), 1/2 and 1/2.

    This is Ying et al. 2021. If n is a power of two, the product over a period is an exact average. Directed.
    """
    n = check_workers(n)
    return Topology([circulant(n, (k,)) for k in _powers(n) or (0,)], "one-peer-exponential")


def one_peer_hypercube(n: int) -> Topology:
    """Worker i exchanges with i xor 2^(k mod log2 n) at step k. n must be a power of two."""
    n, bits = _bits(n, "one-peer-hypercube")
    return Topology([_one_peer(np.arange(n) ^ 1 << t) for t in range(bits)] or identity(n), "one-peer-hypercube")


def one_peer_ring(n: int) -> Topology:
    """Pairs (0, 1) (2, 3) ..., then (1, 2) (3, 4) ..., 1/2 and 1/2.

    For odd n each step leaves another worker out. The period, in which every edge of the ring has its turn, is 2 for
    even n and n for odd n.
    """
    n = check_workers(n)
    period = 1 if n <= 2 else 2 if n % 2 == 0 else n
    firsts = np.arange(0, n - 1, 2)
    return Topology([_paired(n, (firsts + t) % n, (firsts + t + 1) % n) for t in range(period)], "one-peer-ring")


def inner_outer_exponential(n: int, machine_size: int | None = None) -> Topology:
    """One peer per step inside the machine, and for one worker of each machine on another one.

    At step k, worker k mod m of each machine of m workers hears from the same worker of the machine 2^(k mod t)
    before, where t = ceil(log2 of the number of machines). The others form a one-peer exponential graph that skips it.
    1/2 and 1/2, directed. This is BlueFog's GetInnerOuterExpo2DynamicSendRecvRanks.

    Args:
        machine_size: m, a divisor of n other than 2. By default the one nearest to the square root of n. With m = 1 or
            m = n this is the one-peer exponential graph. With m = 2 the two would never hear each other: ValueError.
    """
    n, m = check_workers(n), _machine_size(n, machine_size)
    phases = _inner_outer(n, m, _powers(m - 1 if n > m else m), _powers(n // m))
    return Topology(phases, "inner-outer-exponential" + (f", machine_size = {m}" if machine_size else ""))


def inner_outer_ring(n: int, machine_size: int | None = None) -> Topology:
    """A one-way ring inside the machine, and for one worker of each machine among the machines.

    At step k, worker k mod m of each machine of m workers hears from the same worker of the machine before. Each of the
    others hears from the one before it in its machine, that worker left out. 1/2 and 1/2, directed. This is BlueFog's
    GetInnerOuterRingDynamicSendRecvRanks.

    Args:
        machine_size: m, as for `inner_outer_exponential`. With m = 1 or m = n this is the one-way ring.
    """
    n, m = check_workers(n), _machine_size(n, machine_size)
    phases = _inner_outer(n, m, (1,) if m > 1 else (), (1,) if n > m else ())
    return Topology(phases, "inner-outer-ring" + (f", machine_size = {m}" if machine_size else ""))


def _machine_size(n: int, machine_size: int | None) -> int:
    n = check_workers(n)
    sizes = [m for m in range(1, n + 1) if n % m == 0 and m != 2]
    m = min(sizes, key=lambda m: abs(m - math.sqrt(n))) if machine_size is None else machine_size
    if isinstance(m, bool) or not isinstance(m, (int, np.integer)) or m not in sizes:
        raise ValueError(f"machine_size must be a divisor of the {n} workers other than 2, not {m!r}")
    return int(m)


def _inner_outer(n: int, m: int, inner: tuple[int, ...], outer: tuple[int, ...]) -> list[Sparse]:
    """Hops by turns: within machines of m workers, and among machines for worker k mod m of each."""
    machines, inside = n // m, np.arange(n) % m
    inner, outer = inner or (0,), outer or (0,)
    phases = []
    for t in range(math.lcm(m if machines > 1 else 1, len(outer), len(inner))):
        hop = np.full(n, inner[t % len(inner)])
        if machines > 1:
            hop += hop >= (inside - t) % m  # skip the worker that hears from another machine
        sources = np.arange(n) - inside + (inside - hop) % m
        if machines > 1:
            sources = np.where(inside == t % m, (np.arange(n) - m * outer[t % len(outer)]) % n, sources)
        phases.append(_one_peer(sources))
    return phases


def random_match(n: int, seed: int = 0) -> RandomTopology:
    """A random pairing at every step, 1/2 and 1/2. Symmetric; never repeats.

    All pairings are equally likely. For odd n each leaves one worker out.
    """
    n, seed = check_workers(n), check_seed(seed)
    draw = partial(_random_pairs, n, seed)
    return RandomTopology(draw, n, min(1, n - 1), f"random-match, seed = {seed}" if seed else "random-match")


def _random_pairs(n: int, seed: int, step: int) -> Sparse:
    order = generator(seed, step).permutation(n)
    return _paired(n, order[0 : n - 1 : 2], order[1:n:2])


# -- building blocks ---------------------------------------------------------------------------------------------------


def _powers(n: int, base: int = 2) -> tuple[int, ...]:
    """1, base, base^2, ... below n."""
    base = check_count("the base", base, at_least=2)
    return tuple(itertools.takewhile(lambda power: power < n, (base**t for t in itertools.count())))


def _one_peer(sources: np.ndarray) -> Sparse:
    """Worker i hears from sources[i], 1/2 and 1/2, or from nobody if that is i."""
    return Sparse(sources[:, None], np.where(sources == np.arange(len(sources)), 0.0, 0.5)[:, None])


def _paired(n: int, i: np.ndarray, j: np.ndarray) -> Sparse:
    """i[e] and j[e] exchange for every e, 1/2 and 1/2."""
    partner = np.arange(n)
    partner[i], partner[j] = j, i
    return _one_peer(partner)


def _bits(n: int, name: str) -> tuple[int, int]:
    """n and log2 n. Raises ValueError unless n is a power of two."""
    n = check_workers(n)
    if n & (n - 1):
        raise ValueError(f"{name} needs a power of two, not {n} workers; 'one-peer-exponential' takes any number")
    return n, n.bit_length() - 1


def _check_graph(graph: nx.Graph) -> None:
    if not isinstance(graph, nx.Graph):
        raise TypeError(f"a networkx.Graph or DiGraph is needed, not {type(graph).__name__}")


def _rows(n: int) -> int:
    """The largest divisor of n up to its square root."""
    return next(r for r in range(math.isqrt(n), 0, -1) if n % r == 0)
