"""One bucket's messages as bytes, and what is remembered of them (layers/compression.py has the equations).

    pack  y  ->  encode  C(y + e)  ->  travels  ->  decode  rows y + (D(data_k) - D(data)), and e  ->  combine

The rule's passes know nothing of it: they pack y in full, and combine rows whose differences to y are the pull. What is
remembered changes in `decode`, right before the rows are combined. So a message that is recalled is encoded anew from
what was there before, and one that is left out, or dropped, has changed nothing at either end.

    what travels, for each part of a machine:  [message 0][message 1]...[header]

Where machines are workers their ranks are replicas: each encodes all parts, sends its own, and what is gathered inside
the machine are bytes. So all of them remember the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..layers.compression import Codec, Int8
from ..topology import Topology
from .header import SIZE

MEMORY = re.compile(r"(gossip_)?(compression_error(_\d+)?|reference_\d+_\d+_\d+)")  # what `_named` makes
ALIGN = 16  # bytes: the least that a view in another type needs, and a vector load
MOST = 32  # matrices that messages are remembered for


def places(codec: Codec | None, topology: Topology) -> list[int | None]:
    """For each step of a period which memory its messages use: None for one that sends nothing, or the exact mean.

    A step whose matrix is that of another shares its memory.

    Raises ValueError where a codec's references would have no end, or hardly one.
    """
    if codec is None or not codec.references or topology.n == 1:
        return [0]
    if topology.period is None:
        raise ValueError(
            f"{codec} remembers what was sent along every edge, and {topology.name!r} never repeats: take"
            " compress='int8', or a graph with a period"
        )
    known: dict[int, int] = {}
    found = []
    for phase in topology.phases:
        silent = phase.degrees() == (0, 0) or (phase.averages() and topology.n > 2)
        found.append(None if silent else known.setdefault(id(phase), len(known)))
    if len(known) > MOST:
        raise ValueError(
            f"{codec} remembers what was sent along every edge, and {topology.name!r} has {len(known)} matrices, each"
            f" with buffers of its own (at most {MOST}): take compress='int8', or a graph of a shorter period"
        )
    return found


class Compressed:
    """What is sent of a bucket, and what was. For every bucket one, new where the neighbors are.

    Args:
        n: length of the bucket. used: of what holds parameters; the rest is padding, of which nothing is sent.
        memories: how many matrices have messages, see `places`.
        damping: what differences between references are multiplied by.
        kept: what is remembered already.
        fused: False takes torch's operations on a GPU too.
    """

    def __init__(
        self, codec: Codec, x: Tensor, used: int, messages: int, degree: int, parts: int, memories: int,
        damping: float, kept: Mapping[str, Tensor], fused: bool | None = None,
    ):  # fmt: skip
        self.codec, self.used, self.parts, self.damping = codec, used, parts, damping
        self._size = -(-codec.bytes(len(x) // parts) // ALIGN) * ALIGN
        self._end = messages * self._size
        self._unit = self._end + -(-SIZE // ALIGN) * ALIGN
        self.sending = torch.zeros(parts * self._unit, dtype=torch.uint8, device=x.device)
        self.landing = torch.zeros(degree, parts * self._unit, dtype=torch.uint8, device=x.device)
        self._scratch = torch.empty_like(x)
        self._kernels = None if fused is False else kernels(codec, x, len(x) // parts)
        # By name, [N] each: e of every message, or h of every message, matrix and end of it (0 is the own).
        self.kept = {
            name: kept[name] if name in kept else torch.zeros_like(x)
            for m in range(messages)
            for name in (
                [_named("reference", m, p, k) for p in range(memories) for k in range(1 + degree)]
                if codec.references
                else [_named("compression_error", m)]
            )
        }

    def start(self, x: Tensor) -> None:
        """Nothing was sent. x: parameters that all workers have alike, next to which changes are small."""
        for name, t in self.kept.items():
            if name.startswith("reference_0"):
                t.copy_(x)
            else:
                t.zero_()

    def header(self, part: Tensor) -> Tensor:
        """Where the header lies in one part of what is sent, or in all, [parts, ...]."""
        return part[..., self._end : self._end + SIZE]

    @property
    def headers(self) -> Tensor:
        """Where it is to be written: in every part."""
        return self.header(self.sending.view(self.parts, -1))

    def encode(self, message: Tensor, place: int | None) -> Tensor:
        """What to send in the place of a message, [messages, N], as it lies."""
        for m, y in enumerate(message):
            if self._kernels is not None:
                for part, e, own, used in self._pieces(m, y):
                    self._kernels.quantize(part, e, *own, used, self.codec.block)  # type: ignore[attr-defined]
                continue
            v = self._difference(m, y, place)
            if self.codec.references:
                v.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            for part, data in zip(v.view(self.parts, -1), self._data(self.sending, m), strict=True):
                self.codec.encode(part, data)
        return self.sending

    def _difference(self, m: int, y: Tensor, place: int | None) -> Tensor:
        """v, without the padding: headers of exact averages have been there."""
        if self.codec.references:
            v = torch.sub(y, self._reference(m, place, 0), out=self._scratch)
        else:
            v = torch.add(y, self.kept[_named("compression_error", m)], out=self._scratch)
        v[self.used :] = 0
        return v

    def warm(self) -> None:
        """Builds the kernels, which a launch in mid-training would wait for: over zeros, which change nothing."""
        if self._kernels is not None:
            nothing = torch.zeros(1, len(self._scratch), dtype=self._scratch.dtype, device=self._scratch.device)
            for degree in {0, len(self.landing)}:
                self.encode(nothing, 0)
                self.decode(nothing, nothing.expand(degree, 1, -1).clone(), degree, 0)

    def decode(self, message: Tensor, received: Tensor, degree: int, place: int | None) -> None:
        """Writes rows, received[k, m], for the messages of `degree` neighbors that have landed; remembers."""
        for m, y in enumerate(message):
            rows = [received[k, m] for k in range(degree)]
            (self._from_references if self.codec.references else self._with_feedback)(m, y, rows, place)

    def _pieces(self, m: int, y: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor], int]]:
        """For the kernels, of every part: its y, e, codes and scales, and how much of it holds parameters."""
        e = self.kept[_named("compression_error", m)].view(self.parts, -1)
        for p, (part, left, own) in enumerate(
            zip(y.view(self.parts, -1), e, self._coded(self.sending, m), strict=True)
        ):
            yield part, left, own, self.used - p * len(part)

    def _coded(self, sent: Tensor, m: int) -> list[tuple[Tensor, Tensor]]:
        """Message m's codes and scales in every part."""
        assert isinstance(self.codec, Int8)
        n = len(self._scratch) // self.parts
        return [self.codec.parts(n, data) for data in self._data(sent, m)]

    def _with_feedback(self, m: int, y: Tensor, rows: list[Tensor], place: int | None) -> None:
        if self._kernels is not None:
            heard = [self._coded(self.landing[k], m) for k in range(len(rows))]
            for p, (part, e, own, used) in enumerate(self._pieces(m, y)):
                out = [row.view(self.parts, -1)[p] for row in rows]
                self._kernels.dequantize(part, e, own, [h[p] for h in heard], out, used, self.codec.block)  # type: ignore[attr-defined]
            return
        said = self._decoded(self.sending, m, self._scratch)
        for k, row in enumerate(rows):
            self._decoded(self.landing[k], m, row).sub_(said).add_(y)
        e = self.kept[_named("compression_error", m)]
        e.add_(y).sub_(said).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        e[self.used :] = 0

    def _from_references(self, m: int, y: Tensor, rows: list[Tensor], place: int | None) -> None:
        own = self._reference(m, place, 0)
        own.add_(self._decoded(self.sending, m, self._scratch))
        for k, row in enumerate(rows):
            heard = self._reference(m, place, 1 + k)
            heard.add_(self._decoded(self.landing[k], m, self._scratch))
            torch.sub(heard, own, out=row)
            if self.damping != 1.0:
                row.mul_(self.damping)
            row.add_(y)

    def _reference(self, m: int, place: int | None, k: int) -> Tensor:
        assert place is not None
        return self.kept[_named("reference", m, place, k)]

    def _decoded(self, sent: Tensor, m: int, out: Tensor) -> Tensor:
        for part, data in zip(out.view(self.parts, -1), self._data(sent, m), strict=True):
            self.codec.decode(data, part)
        return out

    def _data(self, sent: Tensor, m: int) -> Tensor:
        """Message m's bytes in every part, [parts, bytes]."""
        length = self.codec.bytes(len(self._scratch) // self.parts)
        return sent.view(self.parts, self._unit)[:, m * self._size :][:, :length]


def kernels(codec: Codec, x: Tensor, n: int) -> Any:
    """The module of kernels that code n numbers of a buffer like x, if there is one."""
    if type(codec) is not Int8 or x.dtype != torch.float32 or not x.is_cuda:
        return None
    try:
        from ..kernels import triton_compression
        from ..kernels.triton_passes import missing
    except ImportError:  # of triton
        return None
    return triton_compression if missing(x.device) is None and triton_compression.fits(n, codec.block) else None


def _named(what: str, m: int, *numbers: int) -> str:
    """The first message's have no number of it: most methods have one."""
    if what == "reference":
        return "_".join(map(str, (what, m, *numbers)))
    return what if m == 0 else f"{what}_{m}"


def is_memory(name: str) -> bool:
    """Whether an entry of an optimizer's state is what a codec remembers: it has no mean, and no use elsewhere."""
    return MEMORY.fullmatch(name) is not None
