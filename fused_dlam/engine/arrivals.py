"""When a bucket is sent: in the backward pass, as its last gradient arrives, or in step().

Autograd runs hooks on one thread per device, and accumulates a gradient on the stream of the forward pass that made it.
So a lock keeps two threads from sending one bucket twice, and a bucket waits for every stream that wrote into it.

A message must not leave before its gradient is final. With `overlap="auto"` the first step sends in step() and watches
what the training script does in between: clipping, a loss scaler, accumulation. The gradients' version counters tell.
The ranks then agree, once: if nothing touched the gradients, sending moves into the backward pass from then on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..comm.watch import log
from .buckets import Bucket
from .engine import Engine
from .slot import Slot

HOW = (
    "overlap=False sends in step(), max_grad_norm= in the optimizer clips by the exact norm, no_sync() holds back all"
    " but the last backward pass of an accumulation, schedule='awc' hides the exchange without regard to gradients"
)

_hooks = WeakTensorKeyDictionary()  # parameter -> hook of the optimizer that owns it now


class Arrivals:
    """Watches gradients arrive.

    Args:
        mode: the optimizer's `overlap`.
        clips: whether gradients are clipped in step(), by a norm for which all must be there.
        begin: opens the engine's step, from the parameter groups as they are then.
        settings: what a user may change between the backward pass and step().
        name_of: a parameter's name, for messages.
    """

    def __init__(
        self,
        engine: Engine,
        mode: bool | str,
        clips: bool,
        begin: Callable[[], None],
        settings: Callable[[], object],
        name_of: Callable[[Slot], str],
    ):
        self.engine, self.begin, self.settings, self.name_of = engine, begin, settings, name_of
        self.mode = mode
        # A clipped gradient is final only when all are there, and x itself is sent whatever the gradients do.
        early = engine.place.workers.size > 1 and not engine.message.is_x and not clips
        self.observing = early and mode == "auto"
        self.sending = early and mode is True
        self.first = early and mode is not False  # after the first step the ranks agree how to go on
        self.held = False  # inside no_sync()
        self.late: str | None = None  # why gradients were not final when they arrived
        self.seen: object = None  # the settings when the first gradient arrived
        self.order: list[int] = []  # buckets in the order in which they were complete
        self.waiting: dict[int, int] = {}
        self._lock = threading.RLock()
        self.reset()

    @property
    def ahead(self) -> bool:
        """Whether the next step's exchange begins at the end of this one: not in the first, which may set the order."""
        return self.mode is not False and not self.first

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Gradients that arrive within are not final."""
        outer, self.held = self.held, True
        try:
            yield
        finally:
            self.held = outer

    def watch(self, b: Bucket) -> None:
        """Has autograd tell when a bucket's gradients have been accumulated.

        A parameter outlives its optimizers, so a hook does not keep its optimizer alive. An optimizer that loses a
        parameter to another one hears no more of it, or both would collect its gradients in turn.
        """
        b.hooked = sum(slot.p.requires_grad for slot in b.slots)
        for slot in b.slots:
            if slot.p.requires_grad:
                former = _hooks.pop(slot.p, None)
                if former is not None:
                    former.remove()
                _hooks[slot.p] = slot.p.register_post_accumulate_grad_hook(self._hook(b, slot))

    def _hook(self, b: Bucket, slot: Slot) -> Callable[[torch.Tensor], None]:

        owner, bucket, k = weakref.ref(self), weakref.ref(b), b.slots.index(slot)

        def hooked(_: torch.Tensor) -> None:
            self, b = owner(), bucket()
            if self is not None and b is not None:
                with self._lock:
                    self._arrived(b, b.slots[k])

        return hooked

    def _arrived(self, b: Bucket, slot: Slot) -> None:
        if b.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._captured(b, slot)
        b.arrived(slot)
        if self.held or not (self.observing or self.sending):
            return
        if self.observing and self.seen is None:
            self.seen = self.settings()
        if slot.arrived_at is not None:
            self.engine.check_whole()
            self.late = f"the gradient of {self.name_of(slot)} was accumulated in more than one backward pass"
            if not self.observing:
                raise RuntimeError(f"{self.late}, but its message leaves after the first. {HOW}.")
            slot.arrived_at = slot.grad._version  # type: ignore[union-attr]
            return
        slot.arrived_at = slot.grad._version  # type: ignore[union-attr]
        self.waiting[b.index] -= 1
        if self.waiting[b.index] == 0:
            self.order.append(b.index)
            if self.sending:
                self._send_complete_ones()

    def _captured(self, b: Bucket, slot: Slot) -> None:
        """This backward pass is recorded. When it is replayed no hook runs.

        The copy into the view is part of the graph, and the message leaves in step().
        """
        b.collect([slot])
        slot.graphed = True
        if self.observing:
            self.late = f"the gradient of {self.name_of(slot)} comes from a CUDA graph"

    def _send_complete_ones(self) -> None:
        """In the one order of all ranks: a bucket waits for those before it."""
        engine = self.engine
        if engine.step is None:
            self.begin()
        while engine.sent < len(engine.buckets) and self.waiting[engine.buckets[engine.sent].index] <= 0:
            with torch.no_grad():
                engine.buckets[engine.sent].gather()  # all that will arrive: others of its parameters may be unused
                engine.send_next()

    def check(self) -> None:
        """At the start of step(): whether any gradient changed since it arrived.

        Raises RuntimeError, naming the parameter, if its message leaves in the backward pass.
        """
        if self.observing and self.seen not in (None, self.settings()):
            self.late = "a hyper-parameter was set between the backward pass and step()"
        for b in self.engine.buckets if self.observing or self.sending else ():
            for slot in b.slots:
                if slot.arrived_at is None or slot.grad is None:
                    continue  # no gradient has arrived in this step
                if slot.grad._version != slot.arrived_at:
                    self.late = f"the gradient of {self.name_of(slot)} changed between the backward pass and step()"
                    if not self.observing:
                        raise RuntimeError(f"{self.late}, but its message leaves in the backward pass. {HOW}.")

    def hold_back(self, why: str) -> None:
        """Called at the start of step() for a reason that a backward pass cannot know: messages must leave in step().

        Raises RuntimeError, on all ranks, if they leave in the backward pass already.
        """
        if self.sending:
            raise RuntimeError(
                f"{why}, but messages leave in the backward pass. Build with overlap='auto' and do so from the first"
                " step on, or with overlap=False or schedule='awc'."
            )
        if self.observing:
            self.late = why

    def finish(self) -> None:
        """At the end of step()."""
        watched = self.observing or self.sending
        if self.first:
            self._agree()
            self.first = self.observing = False
        if watched:
            self.reset()
        else:
            for b in self.engine.buckets:
                b.streams.clear()

    def reset(self) -> None:
        self.order, self.seen = [], None
        for b in self.engine.buckets:
            b.streams.clear()
            self.waiting[b.index] = sum(slot.p.requires_grad for slot in b.slots)
            for slot in b.slots:
                slot.arrived_at = None

    def _agree(self) -> None:
        """All ranks hold back if one rank has late gradients. If not, rank 0's order of arrival becomes the order.

        In that order a parameter that is never used holds back its own bucket alone.
        """
        engine, workers = self.engine, self.engine.place.workers
        rest = [b.index for b in engine.buckets if b.index not in self.order]
        late = torch.tensor([float(self.late is not None)])
        late = workers.largest(late, "agreeing on the order of buckets").cpu()
        order = torch.tensor(self.order + rest, device=workers.wire)
        workers.broadcast(order)
        if late.item() > 0:
            if self.late is not None:
                log.warning("messages are sent in step(), not during the backward pass, for %s. %s.", self.late, HOW)
            return
        self.sending = True
        engine.reorder(order.tolist())
