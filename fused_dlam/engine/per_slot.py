"""Values for each parameter of a bucket, written out for each of its elements where a layer needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from .slot import Slot

PIECE = 1 << 26  # elements for which values per slot are written out at once: 256 MiB, and as much for their index


class PerSlot:
    """The part of a bucket that knows its slots as vectors on its device."""

    slots: list[Slot]
    x: torch.Tensor
    N: int

    def mask(self, per_slot: Sequence[bool]) -> torch.Tensor:
        """A truth value for each slot, where the buffers are. From pinned memory, or a GPU would be waited for."""
        host = torch.tensor(per_slot)
        return host.pin_memory().to(self.x.device, non_blocking=True) if self.x.is_cuda else host

    @cached_property
    def matrices(self) -> torch.Tensor:
        """[slots], true for parameters of more than one dimension."""
        return self.mask([slot.p.ndim > 1 for slot in self.slots])

    @cached_property
    def _extents(self) -> torch.Tensor:
        """Elements of each slot, and between it and the next."""
        ends = [*(slot.offset for slot in self.slots[1:]), self.N]
        pairs = [(slot.numel, end - slot.offset - slot.numel) for slot, end in zip(self.slots, ends, strict=True)]
        kind = torch.int32 if self.N < 1 << 31 else torch.int64  # also of an index for every element
        return torch.tensor(pairs, dtype=kind).flatten().to(self.x.device)

    def spread(self, per_slot: torch.Tensor, between: float) -> Iterator[tuple[slice, torch.Tensor]]:
        """A value for each slot written out for each of its elements, `between` in the padding: run by run of slots.

        A run is as long as its slots need to be, from PIECE elements on: a model in one bucket is not written out at
        once.
        """
        both = torch.stack((per_slot, torch.full_like(per_slot, between)), dim=1).flatten()
        first = start = 0
        for k in range(len(self.slots)):
            end = self.slots[k + 1].offset if k + 1 < len(self.slots) else self.N
            if end - start >= PIECE or end == self.N:
                some, span = slice(2 * first, 2 * k + 2), slice(start, end)
                yield span, torch.repeat_interleave(both[some], self._extents[some], output_size=end - start)
                first, start = k + 1, end
