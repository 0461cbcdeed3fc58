"""Parameters that an inner optimizer moves for many steps, beside the x from which it started.

    y   the parameters, in `low`: the inner optimizer's
    x   the anchor, where the round began: what is sent, pulled and stepped by the outer rule

Nothing but the end of a round writes x. So its message may travel for a whole round, whatever the inner optimizer and
the script do to y meanwhile. The pass that steps x writes y too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .buckets import Bucket, written

if TYPE_CHECKING:
    from .engine import Engine


class AnchoredBucket(Bucket):
    """A bucket of an outer rule. `low` holds the parameters, of any type.

    Passes are given `low`, and take the difference; `g` is a buffer of its own, and that difference, where it is
    averaged by all-reduce.
    """

    anchored = True
    low: torch.Tensor

    @property
    def front(self) -> torch.Tensor:
        return self.low

    def active(self) -> list[bool]:
        """All of them: who got no gradient has traveled nowhere."""
        return [True] * len(self.slots)

    def absorb(self, part: slice | None = None, stepped: bool = False) -> None:
        """Of shards alone: what was written into parameters is a part of their way."""
        if part is None:
            self.bring_home(all_of_them=False)
            self.absorb_shards()

    def moved(self) -> bool:
        """Whether the parameters are not where the anchor is. On a GPU this waits for it."""
        self.absorb_shards()
        return bool(written(self.low, self.x.to(self.low.dtype))[: self.flags.start].any())

    def anchor(self) -> None:
        """x follows what was written into parameters before a round: a script may have loaded others."""
        self.absorb_shards()
        Bucket.absorb(self, slice(0, self.flags.start))

    def travel(self, scale: float) -> None:
        """g = scale (x - y)."""
        self.g.copy_(self.x.to(self.low.dtype)).sub_(self.low)
        if scale != 1.0:
            self.g.mul_(scale)


def average_inside(engine: Engine, step: int) -> list[list[bool]]:
    """Averages gradients inside a machine, between exchanges: into g. All are on their way before one is waited for.

    Returns for each bucket which parameters have a gradient on any of its ranks.
    """
    means = []
    for b in engine.buckets:
        active = [slot.p.grad is not None for slot in b.slots]
        b.set_aside(active, engine.factor, engine.guard)
        b.raise_flags(active, False)
        means.append((b, active, engine.averager.start_mean(b.g, step)))
    found = []
    for b, active, mean in means:
        mean.wait_received()
        found.append(b.lower_flags(active))
    return found
