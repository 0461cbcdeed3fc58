"""`sometimes`: a graph of which each step's exchange takes place by chance, and all ranks draw the same chance."""

from __future__ import annotations

import math
from functools import partial

from .drawn import FIRST, RandomTopology, check_seed, generator
from .matrix import Phase, identity
from .topology import LONGEST, Topology

COIN = 1  # the stream of `generator` of which coins are drawn


def sometimes(topology: Topology, p: float, seed: int = 0) -> Topology:
    """Exchanges as `topology` says in a step with probability p, else nobody does: ProxSkip's coin.

    The coin of a step depends on seed and step alone, so all ranks toss the same without communicating. With p = 1 it
    is the topology itself. `topology` must be doubly stochastic.

    Raises ValueError for a p that is not in (0, 1] or so small that the graph would take more than 2^20 steps to be
    connected, for a bad seed, and for a graph that is not doubly stochastic. TypeError for a topology that is none.
    """
    if not isinstance(topology, Topology):
        raise TypeError(f"sometimes() needs a Topology, e.g. topology.ring(8), not {type(topology).__name__}")
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p <= 1:
        raise ValueError(f"the probability of an exchange must be in (0, 1], not {p!r}")
    seed = check_seed(seed)
    if p == 1:
        return topology
    steps = max(FIRST, math.ceil(4 * len(topology.phases) / p))
    if steps * (4 + topology.n) > LONGEST:
        raise ValueError(f"with an exchange in {1 / p:.3g} steps the workers of {topology.name!r} hardly ever meet")
    name = f"{topology.name}, sometimes {p:g}" + (f", seed = {seed}" if seed else "")
    at = partial(_at, topology, p, seed, identity(topology.n))
    return RandomTopology(at, topology.n, topology.most_messages, name, _first=steps)


def exchanges(topology: Topology, step: int) -> bool:
    """Whether any worker hears from another in this step. A single worker's exchange is with itself: it does."""
    return topology.n == 1 or topology.degree(step) > 0


def _at(inner: Topology, p: float, seed: int, local: Phase, step: int) -> Phase:
    return inner.phase(step) if generator(seed, step, COIN).random_sample() < p else local
