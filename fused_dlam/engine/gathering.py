"""How gradients come into a bucket's flat buffer.

After `zero_grad()` autograd makes a new gradient. It is copied into its slot. The view takes its place as `p.grad`, and
autograd accumulates into that from then on. On a CPU this happens where the gradient is made: 8 bytes per parameter,
still in cache, in place of the 16 of zeroing the slot and adding to it (8.4 MB of parameters: 0.5 against 1.1 ms per
step, bench/train.py --own-cost). On a GPU one kernel copies all of a bucket, once the last is there: ResNet-50 has 161.
After `zero_grad(set_to_none=False)` nothing is copied at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from ..comm import sharded
from .slot import Slot

GATHER = 32 << 20  # bytes of gradients on a GPU that wait for the rest of their bucket, beside the bucket's own


class Gathering:
    """The part of `Bucket` that moves gradients into their views."""

    slots: list[Slot]
    grads: torch.Tensor

    def __init__(self) -> None:
        self.streams: set[torch.cuda.Stream] = set()  # on which this step's gradients were written
        self.gathers = self.grads.is_cuda  # gradients that autograd makes anew are copied together
        self._fresh: list[Slot] = []  # whose gradients have arrived, but not in their views
        self._waiting = 0  # their bytes

    def arrived(self, slot: Slot) -> None:
        """Autograd has accumulated a gradient: if it is not the view, it moves there, now or with others'.

        One that has a graph of its own stays where it is until step(): the script means to differentiate it.
        """
        if slot.p.grad is not None and slot.p.grad.requires_grad:
            return
        if not self.gathers:
            return self.collect([slot])
        if self.grads.is_cuda:
            slot.stream = torch.cuda.current_stream(self.grads.device)
            self.streams.add(slot.stream)
        if slot.p.grad is not slot.installed and slot.p.grad is not None:
            if slot.fresh is None:
                self._fresh.append(slot)
                self._waiting += slot.numel * self.grads.element_size()
            slot.fresh = weakref.ref(slot.p.grad), slot.p.grad._version
            if len(self._fresh) >= len(self.slots) or self._waiting >= GATHER:
                self.gather()

    def gather(self) -> None:
        """Moves what has arrived into the views, on the current stream, after the streams that wrote it."""
        if not self._fresh:
            return
        if self.grads.is_cuda:
            stream = torch.cuda.current_stream(self.grads.device)
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
        """Copies gradients that are not the views into the views, in one operation, and puts the views back.

        A gradient with a graph keeps its place.
        """
        fresh = []
        for slot in slots:
            grad, arrived, slot.fresh = slot.p.grad, slot.fresh, None
            slot.keep_gradient(self.grads)
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
            if not slot.p.grad.requires_grad:  # type: ignore[union-attr]
                slot.p.grad = slot.installed
            if untouched and slot.arrived_at is not None:
                slot.arrived_at = view._version

    def collect_all(self) -> None:
        """At the start of step(): what is in the views by now, and what the script has put in their places."""
        if self._fresh:
            self.gather()
        for slot in self.slots:
            slot.keep_gradient(self.grads)
        self.collect([slot for slot in self.slots if slot.p.grad is not slot.installed])

    def zero_grad(self, set_to_none: bool) -> None:
        """Forgets the gradients, or zeros them with one write and keeps the views installed."""
        if not set_to_none:
            self.grads.zero_()
        self._forget_fresh()
        for slot in self.slots:
            slot.fresh = None
            slot.keep_gradient(self.grads)
            if set_to_none or slot.p.grad is None:
                slot.p.grad = None
            else:
                slot.p.grad = slot.installed
