"""What a bucket was when its gradients were complete, to be compared with what it is in step()."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .buckets import Bucket
from .fingerprint import fingerprint
from .slot import Slot

UNSEEN = "(through .data, numpy or a collective: no version counter shows it)"


class Observed:
    """Which parameters had gradients, version counters, and with `values` fingerprints.

    gradients: False for parameters that are sent as they lie, between steps: their state may be set, and `averaged`
    puts means in their place and them back.
    """

    def __init__(self, b: Bucket, values: bool, gradients: bool = True):
        self.active = b.active() if gradients else []
        self.versions = [versions(slot) for slot in b.slots] if gradients else None
        watched = [("value", b.x), ("value", b.low)]
        if gradients:
            watched += [("gradient", b.grads), *(("state", t) for t in b.state)]
        # Without the padding, where a header may be on its way in a message.
        parts = [(what, t[: b.flags.start]) for what, t in watched if values and t is not None]
        self.prints = [(what, t, fingerprint(t)) for what, t in parts]

    def gradient_changed(self, b: Bucket, name_of: Callable[[Slot], str]) -> str:
        """What version counters and None tell of the gradients, "" if nothing."""
        for slot, was, now in zip(b.slots, self.active, b.active(), strict=True):
            if was != now:
                return f"the gradient of {name_of(slot)} {'came' if now else 'was taken away'}"
            if slot.arrived_at is not None and slot.grad._version != slot.arrived_at:  # type: ignore[union-attr]
                return f"the gradient of {name_of(slot)} changed"
        return ""

    def changed(self, b: Bucket, name_of: Callable[[Slot], str], verdicts: Verdicts | None = None) -> str:
        """What version counters tell of the parameters, and values of everything; on a GPU that comes later."""
        for k, slot in enumerate(b.slots):
            if self.versions is None and slot.p._version != slot.published_at:  # this package may have put it back
                return f"{name_of(slot)} changed"
            if self.versions is not None and versions(slot) != self.versions[k]:
                return f"{name_of(slot)}, or its state, changed"
        for what, t, before in self.prints:
            if t.is_cuda and verdicts is not None:
                verdicts.ask(before, fingerprint(t), partial(_unseen, what, b, name_of))
            elif not torch.equal(before, fingerprint(t)):
                return _unseen(what, b, name_of)
        return ""


def _unseen(what: str, b: Bucket, name_of: Callable[[Slot], str]) -> str:
    last, first = name_of(b.slots[-1]), name_of(b.slots[0])
    where = first if last == first else f"a parameter between {last} and {first}"
    return f"the {what} of {where} changed {UNSEEN}"


def versions(slot: Slot) -> list[int]:
    """Of the parameter and of the optimizer's state of it."""
    return [slot.p._version, *[t._version for t in slot.shown.values()]]


class Verdicts:
    """Comparisons that run on a GPU, to be read when they are done: nothing waits for them."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.Tensor, torch.cuda.Event, Callable[[], str]]] = []

    def ask(self, a: torch.Tensor, b: torch.Tensor, text: Callable[[], str]) -> None:
        differ = torch.zeros((), dtype=torch.bool, pin_memory=True)
        differ.copy_((a != b).any(), non_blocking=True)
        self.asked.append((differ, torch.cuda.current_stream(a.device).record_event(), text))

    def found(self) -> str:
        """The text of one that found a difference, in this step or an earlier one."""
        for one in list(self.asked):
            differ, event, text = one
            if event.query():
                self.asked.remove(one)
                if differ:
                    return text()
        return ""
