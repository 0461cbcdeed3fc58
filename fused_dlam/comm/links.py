"""One rank's part in y = W x, and the weighted sum it makes of what it hears.

    y_i = own_i x_i + sum_j weight_ij (scale_ij x_j)       i multiplies by the weight, j by the scale before it sends

The gradient of x is W^T times that of y: i sends its own back the same way, multiplied by weight_ij, and j multiplies
by scale_ij. So the transpose is of the same kind, with weights and scales exchanged, and no rank needs to know more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..topology import Peers, Topology
from .packing import wide


class Links(NamedTuple):
    """With whom a rank exchanges, by their numbers in the group."""

    own: float | None  # None: one minus the sum of the weights
    sources: tuple[tuple[int, float], ...]  # (rank, weight)
    destinations: tuple[tuple[int, float], ...]  # (rank, scale)
    mean: bool = False  # W = J, every entry 1/n: an all-reduce in place of messages

    @property
    def peers(self) -> Peers:
        ranks, weights = zip(*self.sources, strict=True) if self.sources else ((), ())
        return Peers(ranks, weights, tuple(i for i, _ in self.destinations))

    def transposed(self) -> Links:
        own = 1 - sum(w for _, w in self.sources) if self.own is None else self.own
        return Links(own, self.destinations, self.sources, self.mean)


def check_step(step: object) -> None:
    """Raises TypeError for what counts no steps."""
    if isinstance(step, bool) or not hasattr(type(step), "__index__"):
        raise TypeError(f"step must be an integer, which phase of the topology, not {step!r}")


def of_topology(graph: Topology, rank: int, step: int) -> Links:
    """A rank's row of the step's matrix."""
    peers = graph.peers(rank, step)
    # Where the columns sum to one, and the rows to anything, the weight of the rank itself is the matrix's.
    own = float(graph.weights(step)[rank, rank]) if graph.sums == "columns" else None
    return Links(
        own,
        tuple(zip(peers.sources, peers.weights, strict=True)),
        tuple((i, 1.0) for i in peers.destinations),
        mean=graph.n > 2 and graph.averages_exactly(step),
    )


def combined(x: torch.Tensor, received: Sequence[torch.Tensor], links: Links) -> torch.Tensor:
    """own x + sum_j weight_j received_j, summed in float32 for 16 bits and rounded once.

    Where all weights sum to one (own=None) it sums differences: equal workers stay equal bit for bit, and no weight's
    rounding moves them. A value of weight zero is not touched: 0 * inf would be NaN.
    """
    mine = x.to(wide(x.dtype))
    if links.own is None:
        out = mine.clone()
        for row, (_, w) in zip(received, links.sources, strict=True):
            if w:  # of 60000 and -60000 in float16 the difference overflows where the average does not
                out.add_(row.to(mine.dtype) - mine, alpha=w)
    else:
        out = times(mine, links.own)
        for row, (_, w) in zip(received, links.sources, strict=True):
            if w:
                out.add_(row.to(mine.dtype), alpha=w)
    return out.to(x.dtype)


def times(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale x, in memory of its own, rounded once."""
    if scale in (0, 1):
        return x.clone() if scale else torch.zeros_like(x)
    return (x.to(wide(x.dtype)) * scale).to(x.dtype)
