"""Graphs in which each worker divides what it has among those it sends to, for push-sum: columns sum to one."""

from __future__ import annotations

import math
from functools import partial

import networkx as nx
import numpy as np

from .drawn import RandomTopology
from .matrix import LARGEST, Dense, Phase
from .topology import Topology


def push(graph: nx.Graph | Topology, name: str | None = None) -> Topology:
    """Every worker divides its message equally between itself and those it sends to: A[i, j] = 1 / (1 + outdegree j).

    A worker needs to know whom it sends to, and no more: this is the graph of push-sum where links go one way. Columns
    sum to one, rows need not.

    Args:
        graph: a networkx graph whose nodes, in their order, are the workers, and whose edge j -> i carries j's message
            to i (an undirected one has both ways). Or a `Topology`, of which the edges count and not the weights, step
            by step: `push(topology.grid(8))`.
        name: what messages and checkpoints call it.

    Raises TypeError for what is no graph, ValueError if the workers are not connected both ways, or a mass is too small
    (`Topology.mass`).
    """
    if isinstance(graph, RandomTopology):
        degree = graph.n - 1 if graph.sums == "columns" else max(graph.most_messages, 1)
        at = partial(_pushed_at, graph)
        return RandomTopology(
            at, graph.n, min(degree, graph.n - 1), name or f"push {graph.name}", sums="columns", _first=graph._first
        )
    if isinstance(graph, Topology):
        return Topology(
            [_pushed(*phase.heard, graph.n) for phase in graph.phases], name or f"push {graph.name}", "columns"
        )
    return Topology(_pushed(*_edges(graph), graph.number_of_nodes()), name or "push", "columns")


def one_peer(graph: nx.Graph | Topology, name: str | None = None) -> Topology:
    """By turns over any graph: at each step a worker sends half of what it has to the next of its out-neighbors.

    A worker's turn goes round the clock: its out-neighbors in the order of (i - rank) mod n. This is BlueFog's
    GetDynamicOnePeerSendRecvRanks. A worker sends one message a step; it may get several, or none, so that columns sum
    to one and rows need not: use it with push-sum. Where each gets one at every step, as on rings and exponential
    graphs, it is a doubly stochastic topology as any other.

    Args:
        graph: as for `push`; of a `Topology` the edges of all steps.
        name: what messages and checkpoints call it.

    The period is the least common multiple of the out-degrees. Raises ValueError where the matrices of a period hold
    more than 10 million numbers, and else as `push`.
    """
    if isinstance(graph, RandomTopology):
        raise ValueError(f"one_peer takes turns over a graph that stays, and topology {graph.name!r} never repeats")
    if isinstance(graph, Topology):
        n, name = graph.n, name or f"one-peer {graph.name}"
        heard = [phase.heard for phase in graph.phases]
        edges = np.concatenate([i for i, _ in heard]), np.concatenate([j for _, j in heard])
    else:
        edges = _edges(graph)
        n, name = graph.number_of_nodes(), name or "one-peer"
    i, j = edges
    turns = [sorted((int(k) - rank) % n for k in set(i[j == rank]) - {rank}) for rank in range(n)]  # as hops
    period = math.lcm(*(max(1, len(turn)) for turn in turns))
    if period * n * n > LARGEST:
        raise ValueError(
            f"the turns of {n} workers over this graph repeat after {period:,} steps, the least common multiple of"
            f" their out-degrees {sorted({len(turn) for turn in turns})}: too many to list. Take topology.changing("
            "draw, n, sums='columns') with a function of the step"
        )
    phases = []
    for t in range(period):
        A = np.eye(n)
        for rank, turn in enumerate(turns):
            if turn:
                A[rank, rank] = A[(rank + turn[t % len(turn)]) % n, rank] = 0.5
        phases.append(Dense(A))
    top = Topology(phases, name, "columns")
    return Topology(phases, name) if top.is_doubly_stochastic else top


def _edges(graph: nx.Graph) -> tuple[np.ndarray, np.ndarray]:
    """(i, j) of every edge j -> i, self-loops left out."""
    if not isinstance(graph, nx.Graph):
        raise TypeError(f"a networkx.Graph, a DiGraph or a Topology is needed, not {type(graph).__name__}")
    if graph.number_of_nodes() == 0:
        raise ValueError("the graph has no nodes")
    index = {node: k for k, node in enumerate(graph)}
    pairs = {(index[b], index[a]) for a, b in graph.edges() if a != b}
    pairs |= set() if graph.is_directed() else {(j, i) for i, j in pairs}
    i, j = np.array(sorted(pairs), dtype=int).reshape(-1, 2).T
    return i, j


def _pushed(i: np.ndarray, j: np.ndarray, n: int) -> Dense:
    A = np.eye(n)
    A[i, j] = 1
    return Dense(A / A.sum(axis=0))


def _pushed_at(graph: Topology, step: int) -> Phase:
    return _pushed(*graph.phase(step).heard, graph.n)
