"""Flat buffers in which parameters and gradients are views, so that a pass or a message is one contiguous run.

    parameters  p0 p1 p2 ...        ->  Bucket(x, g, state, messages, received), one Slot per parameter

Parameters are never copied. After `zero_grad()` autograd makes a new gradient. It is copied into its slot. The view
takes its place as `p.grad`, and autograd accumulates into that from then on. On a CPU this happens where the
gradient is made: 8 bytes per parameter, still in cache, in place of the 16 of zeroing the slot and adding to it (8.4 MB
of parameters: 0.5 against 1.1 ms per step, bench/train.py --own-cost). On a GPU one kernel copies all of a bucket, once
the last is there: ResNet-50 has 161. After `zero_grad(set_to_none=False)` nothing is copied at all.

Two kinds of parameters are not views: 16-bit ones, whose float32 master values are in x, and the shards of FSDP2, whose
memory FSDP's own buffers alias. They are copies of x. `publish` writes them, `absorb` reads them back.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch

from ..comm import sharded
from .slot import Slot

# Elements; a slot starts on a 16-byte boundary in every floating type, and a run of slots has a length that Triton
# knows to be divisible by 16: with 8, half of all runs took a kernel with masked 32-bit accesses.
ALIGN = 16
PADDING = 1024  # elements; a bucket's length is a multiple, so that a kernel needs no mask
PIECE = 1 << 26  # elements for which values per slot are written out at once: 256 MiB, and as much for their index
GATHER = 32 << 20  # bytes of gradients on a GPU that wait for the rest of their bucket, beside the bucket's own
LOW_PRECISION = (torch.float16, torch.bfloat16)


class Bucket:
    """Parameters of one dtype and device and their flat buffers, all of one length N.

    x holds master values: the parameters themselves, or float32 copies of 16-bit ones (then `low` holds the
    parameters). `state` are the method's buffers, `messages` [messages, N] what is sent, `received` [d, messages, N].
    `gradients=False` leaves gradients where they are; x stands in for g, which nothing reads then.
    """

    def __init__(
        self, params: Sequence[torch.Tensor], index: int, group: int = 0, shards: int = 1, gradients: bool = True
    ):
        self.index, self.group = index, group
        self.slots: list[Slot] = []
        end = 0
        for p in params:
            self.slots.append(Slot(p, end))
            end = -(-(end + self.slots[-1].numel) // ALIGN) * ALIGN
        self.flags = slice(end, end + len(self.slots))  # in the padding: which parameters got a gradient
        unit = math.lcm(PADDING, shards)
        self.N = -(-self.flags.stop // unit) * unit
        first = params[0]
        dtype = first.dtype.to_real()
        self.x = torch.zeros(self.N, dtype=torch.float32 if dtype in LOW_PRECISION else dtype, device=first.device)
        self.low = torch.zeros(self.N, dtype=dtype, device=first.device) if dtype in LOW_PRECISION else None
        self.g = torch.zeros(self.N, dtype=dtype, device=first.device) if gradients else self.x
        self.state: tuple[torch.Tensor, ...] = ()
        self.extra: dict[str, torch.Tensor] = {}  # the layers' buffers
        self.watched = False  # whether anybody asks what was written into parameters since `publish`
        self.streams: set[torch.cuda.Stream] = set()  # on which this step's gradients were written
        self.gathers = self.x.is_cuda  # gradients that autograd makes anew are copied together
        self._fresh: list[Slot] = []  # whose gradients have arrived, but not in their views
        self._waiting = 0  # their bytes
        self.hooked = 0  # slots whose gradients autograd announces
        self.messages = self.received = torch.empty(0)
        for slot in self.slots:
            self._adopt(slot, gradients)
        self.copies = [slot for slot in self.slots if slot.apart or self.low is not None]
        apart = [slot for slot in self.slots if slot.apart]
        self._shards = [slot.data for slot in apart], [slot.view(self.x) for slot in apart]

    def allocate(
        self,
        state: Sequence[str],
        extra: Sequence[str],
        messages: int,
        degree: int,
        rows: int,
        dtype: torch.dtype | None,
    ) -> None:
        """Room for state and layers, and for messages if there are neighbors.

        rows: how many messages are packed; none where the message is a buffer that is there already.
        """
        dtype = dtype or self.x.dtype
        self.state = tuple(torch.zeros_like(self.x) for _ in state)
        self.extra = {name: torch.zeros_like(self.x) for name in extra}
        self.messages = torch.zeros(rows if degree else 0, self.N, dtype=dtype, device=self.x.device)
        self.received = torch.zeros(degree, messages, self.N, dtype=dtype, device=self.x.device)

    def _adopt(self, slot: Slot, gradients: bool) -> None:
        p = slot.p
        slot.view(self.x).copy_(slot.data)
        if not slot.apart:
            if self.low is not None:
                slot.view(self.low).copy_(slot.data)
            slot.data = slot.view(self.x if self.low is None else self.low)
        slot.address = slot.data.data_ptr()
        had = p.grad
        if not slot.apart:
            p.data = slot.data
        if not gradients:
            return
        # `.data` gives the view a version counter of its own: writing the flat buffer does not move it, autograd and
        # the user do. So the counter tells whether this parameter got a gradient.
        slot.grad = slot.view(self.g).data
        slot.installed = sharded.like(p, slot.grad) if slot.apart else slot.grad
        if had is not None:
            p.grad = had.to(p.dtype) if had.layout == torch.strided else had
            self.collect([slot])

    def arrived(self, slot: Slot) -> None:
        """Autograd has accumulated a gradient: if it is not the view, it moves there, now or with others'."""
        if not self.gathers:
            return self.collect([slot])
        if self.x.is_cuda:
            slot.stream = torch.cuda.current_stream(self.x.device)
            self.streams.add(slot.stream)
        if slot.p.grad is not slot.installed and slot.p.grad is not None:
            if slot.fresh is None:
                self._fresh.append(slot)
                self._waiting += slot.numel * self.g.element_size()
            slot.fresh = weakref.ref(slot.p.grad), slot.p.grad._version
            if len(self._fresh) >= self.hooked or self._waiting >= GATHER:
                self.gather()

    def gather(self) -> None:
        """Moves what has arrived into the views, on the current stream, after the streams that wrote it."""
        if not self._fresh:
            return
        if self.x.is_cuda:
            stream = torch.cuda.current_stream(self.x.device)
            for slot in self._fresh:
                if slot.stream not in (None, stream):
                    stream.wait_stream(slot.stream)
                    if slot.p.grad is not None:  # not to be given out again on its own stream before it is read here
                        sharded.local(slot.p.grad).record_stream(stream)
            self.streams.add(stream)
        fresh = self._fresh
        self._forget_fresh()
        self.collect(fresh)

    def _forget_fresh(self) -> None:
        self._fresh, self._waiting = [], 0

    def collect(self, slots: Iterable[Slot]) -> None:
        """Copies gradients that are not the views into the views, in one operation, and puts the views back."""
        fresh = []
        for slot in slots:
            grad, arrived, slot.fresh = slot.p.grad, slot.fresh, None
            if grad is None or grad is slot.installed or slot.grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"parameter of shape {tuple(slot.p.shape)}: fused_dlam does not support sparse gradients; build the"
                    " layer with sparse=False"
                )
            untouched = arrived is not None and arrived[0]() is grad and arrived[1] == grad._version
            fresh.append((slot, slot.grad, grad, untouched))
        if not fresh:
            return
        torch._foreach_copy_([view for _, view, _, _ in fresh], [sharded.local(g.detach()) for _, _, g, _ in fresh])
        for slot, view, _, untouched in fresh:
            slot.p.grad = slot.installed
            if untouched and slot.arrived_at is not None:
                slot.arrived_at = view._version

    def zero_grad(self, set_to_none: bool) -> None:
        """Forgets the gradients, or zeros them with one write and keeps the views installed."""
        if not set_to_none:
            self.g.zero_()
        self._forget_fresh()
        for slot in self.slots:
            slot.fresh = None
            if set_to_none or slot.p.grad is None:
                slot.p.grad = None
            else:
                slot.p.grad = slot.installed
                slot.zeroed_at = slot.version(slot.installed)  # type: ignore[arg-type]

    def refresh(self) -> None:
        """Checks that the parameters still live here, and collects stray gradients. Raises RuntimeError if not."""
        dtype = self.x.dtype if self.low is None else self.low.dtype
        for slot in self.slots:
            p = slot.p
            here = sharded.local(p) if slot.apart else p
            if here.data_ptr() != slot.address or (p.dtype != dtype and not p.is_complex()):
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} was moved, converted or replaced after the optimizer was"
                    " built (model.to(...), load_state_dict(assign=True), p.data = ...). Move the model first, then"
                    " build the optimizer; load checkpoints with assign=False."
                )
        if self._fresh:
            self.gather()
        self.collect([slot for slot in self.slots if slot.p.grad is not slot.installed])

    def active(self) -> list[bool]:
        """For each slot, whether its parameter got a gradient since the last zero_grad."""
        return [
            slot.p.grad is not None and (slot.graphed or slot.version(slot.p.grad) != slot.zeroed_at)
            for slot in self.slots
        ]

    def runs(self, active: list[bool]) -> Iterator[tuple[slice, bool]]:
        """Maximal runs of the buffer as (span, active), together all of it. In the steady state that is one run."""
        start, current = 0, active[0]
        for slot, now in zip(self.slots, active, strict=True):
            if now != current and slot.numel:
                yield slice(start, slot.offset), current
                start, current = slot.offset, now
        yield slice(start, self.N), current

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

    def raise_flags(self, active: list[bool]) -> None:
        """Before the gradient buffer is averaged: zeros what has no gradient and notes what has."""
        for slot, now in zip(self.slots, active, strict=True):
            if not now:
                self.g[slot.span].zero_()
        if all(active):
            self.g[self.flags].fill_(1)
        else:
            self.g[self.flags].copy_(self.mask(active))

    def lower_flags(self, active: list[bool]) -> list[bool]:
        """After it was averaged: for each slot, whether its parameter got a gradient on any rank."""
        if not all(active):  # else all are known to be set, and a GPU need not be waited for
            active = (self.g[self.flags] > 0).tolist()
        self.g[self.flags] = 0
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

    def absorb(self, stepped: bool = False) -> None:
        """Takes over what others wrote into parameters that are copies of x.

        A wider x keeps its further digits where nothing was written. Where a parameter was set, by `load_state_dict`
        for instance, x becomes that value. With `stepped=True` an inner optimizer moved the parameter, and x moves by
        as much: what averaging adds up below the last digit of 16 bits must not be lost at every step.
        """
        for slot in self.copies:
            if stepped or slot.p._version != slot.published_at:
                x, p = slot.view(self.x), slot.data
                if p.dtype == x.dtype:
                    x.copy_(p)
                elif stepped:
                    x.add_(p.to(x.dtype) - x.to(p.dtype))
                else:
                    x.copy_(torch.where(p == x.to(p.dtype), x, p.to(x.dtype)))
