"""Flat buffers in which parameters and gradients are views, so that a pass or a message is one contiguous run.

    parameters  p0 p1 p2 ...        ->  Bucket(x, g, state, messages, received), one Slot per parameter

Parameters are never copied; how gradients come here is told in gathering.py.

Two kinds of parameters are not views: 16-bit ones, whose float32 master values are in x, and the shards of FSDP2, whose
memory FSDP's own buffers alias. They are copies of x. `publish` writes them, `absorb` reads them back. (Around an inner
optimizer that takes many steps none is a view of x: anchored.py.)

Between the backward pass and step() a gradient is the script's: nothing here writes it. Where it is averaged or scaled
by a layer before the rule sees it, that happens in a buffer beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from ..comm.group import Group
from ..layers.compression import Codec
from ..rules.scalars import Scalar
from . import rehoming
from .compressed import Compressed
from .gathering import Gathering
from .header import SIZE
from .per_slot import PerSlot
from .slot import Slot

# Elements; a slot starts on a 16-byte boundary in every floating type, and a run of slots has a length that Triton
# knows to be divisible by 16: with 8, half of all runs took a kernel with masked 32-bit accesses.
ALIGN = 16
PADDING = 1024  # elements; a bucket's length is a multiple, so that a kernel needs no mask
Key = TypeVar("Key")
LOW_PRECISION = (torch.float16, torch.bfloat16)


class Bucket(Gathering, PerSlot):
    """Parameters of one dtype and device and their flat buffers, all of one length N.

    x holds master values: the parameters themselves, or float32 copies of 16-bit ones (then `low` holds the
    parameters). `grads` are the gradients, g what the rule sees of them. `state` are the method's buffers, `messages`
    [messages, N] what is sent, `received` [d, messages, N].

    Args:
        gradients: False leaves gradients where they are; x stands in for them, which nothing reads then.
        beside: g is a buffer of its own, for gradients that are averaged or scaled first.
    """

    anchored = False  # see anchored.py

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        index: int,
        group: int = 0,
        shards: int = 1,
        gradients: bool = True,
        beside: bool = False,
    ):
        self.index, self.group = index, group
        self.slots = []
        end = 0
        for p in params:
            self.slots.append(Slot(p, end))
            end = -(-(end + self.slots[-1].numel) // ALIGN) * ALIGN
        self.flags = slice(end, end + len(self.slots))  # in the padding: which parameters got a gradient
        self.recalled = slice(self.flags.stop, self.flags.stop + 1)  # and whether other buckets are averaged again
        self.header = slice(self.recalled.stop, self.recalled.stop + SIZE)  # see header.py
        unit = math.lcm(PADDING, shards)
        self.N = -(-self.header.stop // unit) * unit
        first = params[0]
        dtype = first.dtype.to_real()
        self.x = torch.zeros(self.N, dtype=torch.float32 if dtype in LOW_PRECISION else dtype, device=first.device)
        apart = dtype in LOW_PRECISION or self.anchored
        self.low = torch.zeros(self.N, dtype=dtype, device=first.device) if apart else None
        kind = grad_type(first)
        self.grads = torch.zeros(self.N, dtype=kind, device=first.device) if gradients else self.x
        self.g = torch.zeros_like(self.grads) if beside else self.grads
        self.state: tuple[torch.Tensor, ...] = ()
        self.extra: dict[str, torch.Tensor] = {}  # the layers' buffers
        self.name = ""  # by what is in it, see spikes.py
        self.watched = False  # whether anybody asks what was written into parameters since `publish`
        self.expected: set[int] = set()  # slots whose gradients arrived in the last step that was watched
        Gathering.__init__(self)
        self.messages = self.received = torch.empty(0)
        self.compressed: Compressed | None = None  # where messages travel as bytes
        for slot in self.slots:
            self._adopt(slot, gradients)
        self.copies = [slot for slot in self.slots if slot.apart or self.low is not None]
        own, theirs = self.front, [slot for slot in self.slots if slot.apart]
        self._shards = [slot.data for slot in theirs], [slot.view(own) for slot in theirs]

    @property
    def front(self) -> torch.Tensor:
        """What `averaged` puts means into."""
        return self.x

    def allocate(self, state: Sequence[str], extra: Sequence[str]) -> None:
        """Room for state and layers."""
        self.state = tuple(torch.zeros_like(self.x) for _ in state)
        self.extra = {name: torch.zeros_like(self.x) for name in extra}

    def make_room(self, messages: int, degree: int, rows: int, dtype: torch.dtype | None) -> None:
        """Room for messages, if there are neighbors, new: what has been there may still be read by a transport.

        rows: how many messages are packed; none where the message is a buffer that is there already.
        """
        dtype = dtype or self.x.dtype
        self.messages = torch.zeros(rows if degree else 0, self.N, dtype=dtype, device=self.x.device)
        self.received = torch.zeros(degree, messages, self.N, dtype=dtype, device=self.x.device)

    def compress(
        self, codec: Codec | None, messages: int, degree: int, parts: int, memories: int, damping: float,
        fused: bool | None,
    ) -> None:  # fmt: skip
        """Messages travel as bytes, for which there is room, or not. What was remembered of them stays."""
        kept = {} if self.compressed is None else self.compressed.kept
        used = self.flags.start  # what lies behind is padding
        self.compressed = None
        if codec is not None:
            self.compressed = Compressed(
                codec, self.x, used, messages, degree, parts, memories, damping, kept, fused
            )  # fmt: skip

    @property
    def landing(self) -> torch.Tensor:
        """Where neighbors' messages arrive, [d, ...]."""
        return self.received if self.compressed is None else self.compressed.landing

    @property
    def in_transit(self) -> list[torch.Tensor]:
        """The buffers that a transport reads and writes."""
        coded = [] if self.compressed is None else [self.compressed.sending, self.compressed.landing]
        return [self.messages, self.received, *coded]

    def remember_nothing(self, workers: Group) -> None:
        """What messages have left out, or were next to, counts no more. All ranks must call it.

        Differences to what was sent begin with those to the workers' mean, for that all have alike.
        """
        if self.compressed is None:
            return
        mean = self.x.clone()
        if self.compressed.codec.references:
            workers.mean(mean)
        self.compressed.start(mean.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))

    def _adopt(self, slot: Slot, gradients: bool) -> None:
        p = slot.p
        slot.view(self.x).copy_(slot.data)
        if self.low is not None and (self.anchored or not slot.apart):
            slot.view(self.low).copy_(slot.data)
        if not slot.apart:
            slot.data = slot.storage(self.x if self.low is None else self.low)
        slot.address = slot.data.data_ptr()
        had = p.grad
        if not slot.apart:
            p.data = slot.data
        rehoming.own(p, self)
        if not gradients:
            return
        slot.lay_gradient(self.grads)
        if had is not None:
            p.grad = had.to(getattr(p, "grad_dtype", None) or p.dtype) if had.layout == torch.strided else had
            self.collect([slot])

    def refresh(self) -> None:
        """Brings parameters home that got other memory, and collects stray gradients. Raises RuntimeError for those
        that cannot come home, see rehoming.py."""
        self.bring_home()
        self.collect_all()

    def bring_home(self, values: bool = True, all_of_them: bool = True) -> None:
        """See rehoming.py."""
        slots = rehoming.away(self)
        if not all_of_them:
            slots = [slot for slot in slots if rehoming.can_come(self, slot)]
        if slots:
            rehoming.bring_home(self, slots, values)

    def active(self) -> list[bool]:
        """For each slot, whether its parameter has a gradient. As in torch zeros are one, and None is none."""
        return [slot.p.grad is not None for slot in self.slots]

    def runs(self, active: list[Key]) -> Iterator[tuple[slice, Key]]:
        """Maximal runs of slots that are alike, as (span, what they are), together all of it. Mostly that is one."""
        start, current = 0, active[0]
        for slot, now in zip(self.slots, active, strict=True):
            if now != current and slot.numel:
                yield slice(start, slot.offset), current
                start, current = slot.offset, now
        yield slice(start, self.N), current

    def set_aside(self, active: list[bool], factor: Scalar, finite: bool) -> None:
        """g from the gradients: zeros what has no gradient, and with `finite` what is not finite in those that are."""
        if self.g is not self.grads:
            if finite:
                torch.nan_to_num(self.grads, nan=0.0, posinf=0.0, neginf=0.0, out=self.g)
            else:
                self.g.copy_(self.grads)
            if isinstance(factor, torch.Tensor) or factor != 1.0:
                self.g.mul_(factor)
        for slot, now in zip(self.slots, active, strict=True):
            if not now:
                self.g[slot.span].zero_()

    def raise_flags(self, active: list[bool], recalled: bool) -> None:
        """Before g is averaged: notes what has a gradient, and whether other buckets are averaged anew."""
        if recalled:  # else it is zero, as all of the gradients' padding
            self.g[self.recalled].fill_(1)
        if all(active):
            self.g[self.flags].fill_(1)
        else:
            self.g[self.flags].copy_(self.mask(active))

    def lower_flags(self, active: list[bool]) -> list[bool]:
        """After it was averaged: for each slot, whether its parameter got a gradient on any rank."""
        if not all(active):  # else all are known to be set, and a GPU need not be waited for
            active = (self.g[self.flags] > 0).tolist()
        self.g[self.flags.start : self.recalled.stop] = 0
        return active

    def publish(self, low: bool = True) -> None:
        """Brings parameters that are copies up to date, and tells autograd that the parameters changed.

        low=False: the 16-bit copy is already.
        """
        if low and self.low is not None:
            self.low.copy_(self.x)
        shards, views = self._shards
        if shards:
            torch._foreach_copy_(shards, views)
        torch.autograd.graph.increment_version([slot.p for slot in self.slots])
        if self.watched or self.copies:
            for slot in self.slots:
                slot.published_at = slot.p._version

    def absorb(self, part: slice | None = None, stepped: bool = False) -> None:
        """Takes over what others wrote into parameters that are copies of x: into all of them, or into a run of them.

        A wider x keeps its further digits where nothing was written. Where a parameter was set, however that was done,
        x becomes that value. With `stepped=True` an inner optimizer moved the parameter, and x moves by as much: what
        averaging adds up below the last digit of 16 bits must not be lost at every step.
        """
        if part is None:  # those of an optimizer that was closed may be another's by now
            self.bring_home(all_of_them=False)
        if self.low is not None:
            span = part or slice(0, self.flags.start)  # what lies behind, in x alone, may be on its way in a message
            x, low = self.x[span], self.low[span]
            here = x.to(low.dtype)
            if stepped:
                x.add_(low.to(x.dtype) - here)
            else:
                x.copy_(torch.where(written(low, here), low.to(x.dtype), x))
        if part is None:
            self.absorb_shards()

    def absorb_shards(self) -> None:
        """The part of `absorb` that passes do not do themselves."""
        shards, views = self._shards
        if shards:
            torch._foreach_copy_(views, shards)


def written(low: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Where `low` holds another value than `here`. One NaN is like another."""
    return (low != here) & ~(low.isnan() & here.isnan())


def grad_type(p: torch.Tensor) -> torch.dtype:
    """The real type of a parameter's gradient: its own, or what `p.grad_dtype` says."""
    return (getattr(p, "grad_dtype", None) or p.dtype).to_real()
