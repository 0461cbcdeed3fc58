"""When a bucket is sent: in the backward pass, as its last gradient arrives, or in step().

Autograd runs hooks on one thread per device, and accumulates a gradient on the stream of the forward pass that made it.
So a lock keeps two threads from sending one bucket twice, and a bucket waits for every stream that wrote into it.

A message that leaves in the backward pass is a guess: that nothing the script does until step() changes it. The guess
is checked in step(), and the step's last bucket, which never leaves before, says whether it held (`Engine.complete`).
If not, this rank sends anew, and sends in step() for a while. So a wrong guess costs time, never a wrong number.

    version counters, None, a second arrival, hyper-parameters    in every step
    the values themselves (fingerprint.py)                        on CPUs in every step; on GPUs, where it is a kernel
                                                                  more, in steps 0 to 2, 4, 8, 16, ..., which guess
                                                                  nothing
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..comm.errors import ExchangeError
from ..comm.watch import log
from .buckets import Bucket
from .engine import Engine
from .observed import Observed, Verdicts
from .slot import Slot

HOW = (
    "overlap=False sends in step(), max_grad_norm= in the optimizer clips by the exact norm, no_sync() holds back all"
    " but the last backward pass of an accumulation, schedule='awc' hides the exchange without regard to gradients"
)
LOOKS = 2  # steps that are watched before messages leave early again
PATIENCE = 8  # steps sent in step() after the first wrong guess; twice as many after each further one

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
        self._may = engine.message.needs_gradient and not clips and mode is not False
        self.early = engine.guesses = self._may and engine.place.workers.size > 1
        self.first = self.early  # after the first step the ranks agree on an order
        self.held = False  # inside no_sync()
        self.late = ""  # why what arrived is not what step() sends
        self.patience = PATIENCE
        self.told = False
        self.seen: object = None  # the settings when the first gradient arrived
        self.order: list[int] = []  # buckets in the order in which they were complete
        self.observed: dict[int, Observed] = {}  # by bucket, when it was complete
        self.waiting: dict[int, int] = {}
        self.verdicts = Verdicts()
        self.on_error: Callable[[ExchangeError], None] | None = None  # takes errors of exchanges, to be told in step()
        self.failed = False  # whether it has one
        self._lock = threading.RLock()
        self.wait = 0  # steps to be sent in step() first
        self.reset()

    @property
    def sending(self) -> bool:
        """Whether messages leave in this step's backward pass."""
        return self.early and self.wait == 0

    @property
    def looking(self) -> bool:
        """Whether this step is watched."""
        return self.early and self.wait <= LOOKS

    @property
    def ahead(self) -> bool:
        """Whether the next step's exchange begins at the end of this one: not in the first, which may set the order."""
        return self.mode is not False and not self.first

    @property
    def values(self) -> bool:
        """Whether values are compared, not version counters alone."""
        return not self.sending or not self.engine.on_gpu

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Gradients that arrive within are not final."""
        outer, self.held = self.held, True
        try:
            yield
        finally:
            self.held = outer

    def pause(self) -> None:
        """There are no neighbors for now."""
        self.early = self.engine.guesses = self.first = False
        self.reset()

    def resume(self) -> None:
        """There are others: the next step is watched as the first was, and its order agreed on."""
        self.early = self.engine.guesses = self._may and self.engine.place.workers.size > 1
        self.first = self.early
        for b in self.engine.buckets:
            b.expected = set(range(len(b.slots)))
        if self.mode == "auto":
            self.wait = 3 if self.engine.on_gpu else 1
        self.reset()

    def leave(self) -> None:
        """Hears of no gradient any more."""
        for b in self.engine.buckets:
            for slot in b.slots:
                if slot.hook is not None and _hooks.get(slot.p) is slot.hook:
                    _hooks.pop(slot.p).remove()

    def watch(self, b: Bucket) -> None:
        """Has autograd tell when a bucket's gradients have been accumulated.

        A parameter outlives its optimizers, so a hook does not keep its optimizer alive. An optimizer that loses a
        parameter to another one hears no more of it, or both would collect its gradients in turn.
        """
        b.expected = set(range(len(b.slots)))
        self.waiting[b.index] = len(b.expected)
        for slot in b.slots:
            former = _hooks.pop(slot.p, None)
            if former is not None:
                former.remove()
            slot.hook = _hooks[slot.p] = slot.p.register_post_accumulate_grad_hook(self._hook(b, slot))
        if self.mode == "auto":
            self.wait = max(self.wait, 3 if self.engine.on_gpu else 1)

    def _hook(self, b: Bucket, slot: Slot) -> Callable[[torch.Tensor], None]:

        owner, bucket, k = weakref.ref(self), weakref.ref(b), b.slots.index(slot)

        def hooked(_: torch.Tensor) -> None:
            self, b = owner(), bucket()
            if self is not None and b is not None:
                with self._lock:
                    self._hear(b, k)

        return hooked

    def _hear(self, b: Bucket, k: int) -> None:
        if self.failed:  # nothing leaves any more in this backward pass
            b.arrived(b.slots[k])
            return
        try:
            self._arrived(b, k)
        except ExchangeError as error:
            if self.on_error is None or not error.lost:
                raise
            self.failed = True
            self.on_error(error)

    def _arrived(self, b: Bucket, k: int) -> None:
        slot = b.slots[k]
        if b.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._captured(b, slot)
        b.arrived(slot)
        if self.held or not self.looking:
            return
        if self.seen is None:
            self.seen = self.settings()
        if slot.arrived_at is not None:
            self.late = f"the gradient of {self.name_of(slot)} was accumulated in more than one backward pass"
        elif slot.p.grad is not None and slot.p.grad.requires_grad:
            self.late = f"the gradient of {self.name_of(slot)} has a graph of its own (create_graph=True)"
        elif k in b.expected:
            self.waiting[b.index] -= 1
        first, slot.arrived_at = slot.arrived_at is None, slot.grad._version  # type: ignore[union-attr]
        if first and self.waiting[b.index] == 0 and b.index not in self.observed:
            self.order.append(b.index)
            if self.sending:
                self._send_complete_ones()
            else:
                b.gather()
                self.observed[b.index] = Observed(b, self.values)

    def _captured(self, b: Bucket, slot: Slot) -> None:
        """This backward pass is recorded. When it is replayed no hook runs.

        The copy into the view is part of the graph, and the message leaves in step().
        """
        b.collect([slot])
        self.late = f"the gradient of {self.name_of(slot)} comes from a CUDA graph"

    def _send_complete_ones(self) -> None:
        """In the one order of all ranks: a bucket waits for those before it. The last one waits for step()."""
        engine = self.engine
        while engine.sent < len(engine.buckets) - 1 and self.waiting[engine.buckets[engine.sent].index] <= 0:
            if engine.step is None:
                self.begin()
            b = engine.buckets[engine.sent]
            with torch.no_grad():
                b.gather()  # all that will arrive: others of its parameters may be unused
                self.observed[b.index] = Observed(b, self.values)
                engine.send_next(waits=False)

    def verify(self) -> str:
        """At the start of step(): why the guess did not hold, or would not have, "" if it did.

        Raises RuntimeError if it did not and messages have left that cannot be recalled.
        """
        why = self.late
        if self.looking and not why and self.seen not in (None, self.settings()):
            why = "a hyper-parameter was set between the backward pass and step()"
        for b in self.engine.buckets:
            if not why and b.index in self.observed:
                seen = self.observed[b.index]
                why = seen.gradient_changed(b, self.name_of) or seen.changed(b, self.name_of, self.verdicts)
                why = f"{why} between the backward pass and step()" if why else ""
        why = why or self.verdicts.found()
        if why and self.engine.sent and not self.engine.recallable:
            raise RuntimeError(f"{why}, but its message left in the backward pass. {HOW}.")
        self.late = why
        return why

    def hold_back(self, why: str) -> None:
        """Called at the start of step() for a reason that a backward pass cannot know."""
        if self.early:
            self.late = why

    def finish(self) -> None:
        """At the end of step()."""
        if self.first:
            self._agree()
            self.first = False
        if self.early:
            self._decide()
            for b in self.engine.buckets:
                arrived = {k for k, slot in enumerate(b.slots) if slot.arrived_at is not None}
                # Where nothing can be recalled a bucket waits for all its parameters: others may arrive next time.
                if self.order and self.looking and self.engine.recallable:
                    b.expected = arrived
        self.reset()

    def _decide(self) -> None:
        """Whether the next steps guess."""
        if self.late:
            if not self.told:
                self.told = True
                log.warning(
                    "rank %d at step %d: messages are sent in step(), not during the backward pass, for %s. The result"
                    " is the same. %s.",
                    self.engine.me, self.engine.steps - 1, self.late, HOW,
                )  # fmt: skip
            if self.mode == "auto":
                self.wait, self.patience = self.patience, min(2 * self.patience, 1 << 10)
            return
        if self.wait:
            self.wait -= 1
            return
        following = self.engine.steps
        if self.engine.on_gpu and self.mode == "auto" and following & (following - 1) == 0:
            self.wait = 1

    def reset(self) -> None:
        self.order, self.seen, self.late, self.failed = [], None, "", False
        self.observed.clear()
        for b in self.engine.buckets:
            b.streams.clear()
            self.waiting[b.index] = len(b.expected)
            for slot in b.slots:
                slot.arrived_at = None

    def _agree(self) -> None:
        """Rank 0's order of arrival becomes the order: in it a parameter that is never used holds back its own bucket
        alone. Of all ranks: those of a machine average gradients in it."""
        engine = self.engine
        rest = [b.index for b in engine.buckets if b.index not in self.order]
        order = torch.tensor(self.order + rest, device=engine.place.workers.wire)
        engine.place.start_equal(order)
        engine.reorder(order.tolist())
