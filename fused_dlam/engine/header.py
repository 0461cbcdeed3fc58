"""What a message says of itself: who sent it, in which step, with which settings, and whether to believe the others.

It travels in the padding of a step's last bucket, as whole numbers below 256, which every floating type holds exactly,
through a mean of equal ones too. So it costs no message and no kernel, and 64 bytes of a copy on a GPU.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# step, sender, layout, learning rates, other settings, the first learning rate, flags
FORM = struct.Struct("<IHHHHfB")
SIZE = FORM.size  # elements of the padding

RECALLED = 1  # what left before this bucket, in this step, is sent again
STALE = 4  # the sender came back in the midst of its loop: its settings are of before, and count for no local step
NOT_FINITE = 2  # a gradient of the sender was not finite, and it will raise


class Header(NamedTuple):
    step: int
    sender: int  # its number among the workers, from 0
    layout: int = 0  # of the buckets
    rates: int = 0  # of the learning rates
    settings: int = 0  # of the other settings
    rate: float = 0.0  # the first learning rate, to be shown
    flags: int = 0

    @classmethod
    def places(cls, *fields: str) -> set[int]:
        """Where fields lie among the values."""
        ends = [struct.calcsize(FORM.format[: k + 1]) for k in range(len(cls._fields) + 1)]  # behind "<" and each field
        return {i for k in map(cls._fields.index, fields) for i in range(ends[k], ends[k + 1])}

    def values(self) -> list[int]:
        return list(FORM.pack(self.step % 2**32, self.sender % 2**16, *self[2:]))

    def write(self, row: torch.Tensor) -> None:
        """Into its place in a message. From pinned memory, or a GPU would be waited for."""
        host = torch.tensor(self.values(), dtype=row.dtype)
        row.copy_(host.pin_memory() if row.is_cuda else host, non_blocking=True)

    @classmethod
    def read(cls, values: Sequence[float]) -> Header | None:
        """None if these are no such numbers: a mean of different headers, or something else altogether."""
        if any(v != v or v < 0 or v > 255 or v != int(v) for v in values):
            return None
        return cls(*FORM.unpack(bytes(map(int, values))))

    def compare(self, other: Header | None, me: int, name: Callable[[int], int]) -> str:
        """What is wrong with what another worker says, if anything makes its message useless.

        Args:
            me: this rank's global number.
            name: a worker's global number.
        """
        if other is None:
            return (
                f"rank {me} at step {self.step}: a message arrived that is none of this step's: some rank runs another"
                " version, or calls step() of another optimizer"
            )
        peer = name(other.sender) if other.sender < 2**16 else other.sender
        if other.step != self.step % 2**32:
            behind, ahead = (peer, me) if other.step < self.step else (me, peer)
            return (
                f"rank {me} at step {self.step}: the message of rank {peer} is of step {other.step}. Rank {behind} left"
                f" out a step() that rank {ahead} took, or they loaded checkpoints of different steps. Every rank must"
                " call step() equally often; where data run out at different times, train within `with"
                " optimizer.join():`, and a batch that is left out still needs its step()"
            )
        if other.layout != self.layout:
            return (
                f"rank {me} at step {self.step}: rank {peer} has cut its parameters into other buckets: the ranks do"
                " not optimize the same parameters (another model, other parameter groups, other layers trainable)"
            )
        return ""


def digest(thing: object) -> int:
    """16 bits of a value's text."""
    return zlib.crc32(repr(thing).encode()) & 0xFFFF


def told(settings: Sequence[tuple]) -> tuple[tuple, tuple]:
    """The learning rates of all groups, which come first in each, and the other settings, from a list of both.

    What lives on a device is left out.
    """
    plain = [tuple("" if isinstance(value, tuple) else value for value in group) for group in settings]
    return tuple(group[0] for group in plain), tuple(group[1:] for group in plain)
