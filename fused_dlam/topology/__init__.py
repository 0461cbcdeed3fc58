"""Who averages with whom. A topology is a name in FAMILY, a `Topology`, or a function of the number of workers.

To add one, write a function of n that returns a `Topology` and enter it in FAMILY: README.md here has an example.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from .base_graph import base_k
from .drawn import RandomTopology, changing, generator
from .equitopo import d_equistatic, od_equidyn, ou_equidyn, u_equistatic
from .graphs import (
    exponential,
    from_networkx,
    full,
    grid,
    hypercube,
    inner_outer_exponential,
    inner_outer_ring,
    metropolis_hastings,
    one_peer_exponential,
    one_peer_hypercube,
    one_peer_ring,
    one_way_ring,
    random_match,
    ring,
    star,
    symmetric_exponential,
    torus,
)  # fmt: skip
from .matrix import Circulant, Peers, Phase, Sparse, check_workers, circulant, identity, sparse
from .pushing import one_peer, push
from .topology import Topology

__all__ = [
    "Circulant", "FAMILY", "Peers", "Phase", "RandomTopology", "Sparse", "Topology", "TopologyLike", "base_k",
    "changing", "circulant", "d_equistatic", "exponential", "from_networkx", "full", "generator", "get", "grid",
    "hypercube", "identity", "inner_outer_exponential", "inner_outer_ring", "metropolis_hastings", "od_equidyn",
    "one_peer", "one_peer_exponential", "one_peer_hypercube", "one_peer_ring", "one_way_ring", "ou_equidyn", "push",
    "random_match", "ring", "sparse", "star", "symmetric_exponential", "torus", "u_equistatic",
]  # fmt: skip

TopologyLike = str | Topology | Callable[[int], Topology]

#: A name is that of the function, with hyphens. The order is that of `fused-dlam topology`'s list.
FAMILY: dict[str, Callable[..., Topology]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        full, ring, one_way_ring, grid, torus, star, hypercube, exponential, symmetric_exponential, d_equistatic,
        u_equistatic, one_peer_exponential, one_peer_hypercube, one_peer_ring, base_k, inner_outer_exponential,
        inner_outer_ring, random_match, od_equidyn, ou_equidyn,
    )
}  # fmt: skip


def get(topology: TopologyLike, n: int) -> Topology:
    """The topology for n workers: by name, as it is, or what a function such as `lambda n: ring(n).every(4)` returns.

    Raises ValueError for an unknown name or another number of workers, TypeError for anything that is no topology.
    What the function itself raises passes through.
    """
    n = check_workers(n)
    if isinstance(topology, str):
        if topology not in FAMILY:
            near = difflib.get_close_matches(topology.lower().replace("_", "-"), list(FAMILY), 1, 0.7)
            meant = f". Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown topology {topology!r}; known: {', '.join(FAMILY)} (or pass a Topology){meant}")
        return FAMILY[topology](n)
    if isinstance(topology, Topology):
        made = topology
    elif callable(topology):
        made = topology(n)
        if not isinstance(made, Topology):
            name, kind = getattr(topology, "__name__", repr(topology)), type(made).__name__
            raise TypeError(
                f"topology={name} must return a Topology for {n} workers, not {kind} (Topology(matrices) makes one)"
            )
    else:
        raise TypeError(f"topology must be a function of n, a name or a Topology, not {type(topology).__name__}")
    if made.n != n:
        raise ValueError(f"topology {made.name!r} is for {made.n} workers, but there are {n}")
    return made
