"""What is said when an exchange fails: who this is, whom it waited for, in which of the user's calls, and what to do.

Ranks are named by their global numbers. The witness speaks: a peer that closed its connection, one that was silent for
`timeout`, and one that left because of an error of its own (last_words.py) are three stories, and send the reader to
three places.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Any

import torch

from . import last_words

if TYPE_CHECKING:
    from .watch import Watched


class ExchangeError(RuntimeError):
    """A peer did not answer: it died, was cut off, or takes part in another exchange.

    Over gloo the wait that runs out of time raises it. Over NCCL, on which this has not run yet, a wait only orders
    streams, and what becomes of a dead peer is torch's choice, by its documentation: by default its watchdog ends this
    process once `timeout` has passed, and nothing is raised. With TORCH_NCCL_BLOCKING_WAIT=1 every wait is one of the
    host and raises this error, at the price of the overlap; with TORCH_NCCL_ASYNC_ERROR_HANDLING=2 the process lives on
    and the next exchange raises it, while this rank may have combined what never came: go back to a checkpoint. With
    on_failure="continue" the host waits, see lookout.py.

    Attributes: `rank` and `peer` (global numbers; None for a peer that is not known), `step`, `call`.
    """

    rank: int | None = None
    peer: int | None = None
    step: int | None = None
    call: str = "step()"
    lost: bool = False  # whether a peer is gone or silent; else it is there and does something else
    silent: bool = False  # whether `timeout` went by, over a connection that is open


class ClosedError(RuntimeError):
    """A group was used after its `close()`."""


_calls: dict[int, list[str]] = {}  # by thread, for another one tells of waits that take long


class calling(ContextDecorator):  # noqa: N801 -- reads as a statement: `with calling("optimizer.averaged()"):`
    """Names the user's call in errors that are raised within it, on this thread. The outermost name counts."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        _calls.setdefault(threading.get_ident(), []).append(self.name)

    def __exit__(self, *error: Any) -> None:
        names = _calls[threading.get_ident()]
        names.pop()
        if not names:
            del _calls[threading.get_ident()]


def current_call() -> str:
    """The call that the user made on this thread."""
    if threading.get_ident() not in _calls and torch._C._current_graph_task_id() != -1:
        return "backward()"
    return call_of(threading.get_ident())


def call_of(thread: int) -> str:
    """The call that the user made on a thread."""
    names = _calls.get(thread)
    return names[0] if names else "step()"


CLOSED = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "socket closed", "pair closure")
LATE = ("timed out", "timeout", "within")  # "within": streams.Errand
STEPS = ("step()", "backward()")
TORN = (
    "Some buckets may have taken this step here and others not: go on only from a checkpoint, or after averaging the"
    " workers' parameters."
)
LOST = "What never came may have been combined on the GPU by now: go on only from a checkpoint."


def kind_of(text: str) -> str:
    """ "closed", "late" or "other", by the words of the transport."""
    lower = text.lower()
    if any(word in lower for word in CLOSED):
        return "closed"
    return "late" if any(word in lower for word in LATE) else "other"


def failure(wait: Watched, error: BaseException) -> ExchangeError:
    """The error for a wait that failed. The group counts as broken from here on, and a note for the others is left."""
    group, call = wait.group, current_call()
    group.broken = True
    me = group.ranks[group.rank]
    raw = (str(error).splitlines() or [type(error).__name__])[0]
    kind = kind_of(raw)
    others = [rank for rank in group.ranks if rank != me]
    peer = group.ranks[wait.peer] if wait.peer is not None else None
    if len(others) == 1:  # an exchange of all is one with the other
        peer = others[0]
    own = last_words.Note(peer, wait.step, call)
    told = last_words.exchange(group.generation, me, own, [peer] if peer is not None else others)
    cause = _cause(kind, peer, group.ranks, group.timeout, call) if told is None else _consequence(*told, me)
    if told is not None and peer is None:  # all took part, and accuse each other
        first = last_words.silent(group.generation, others)
        if first:
            peer = first[0]
            cause = (
                f"{listed(first)} ended, {'is' if len(first) == 1 else 'are'} stuck, or"
                f" {'does' if len(first) == 1 else 'do'} not call {call}: look there first. Others gave up too."
            )
    parts = [f"{wait} failed: {cause}"]
    if call.startswith(STEPS):
        if kind != "other":
            parts.append("For data that run out at different times: `with optimizer.join():`.")
        parts.append(TORN if group.host_waits else LOST)
    parts.append(f"(The transport says: {_shortened(raw)})")
    out = ExchangeError(" ".join(parts))
    out.rank, out.peer, out.step, out.call = me, peer, wait.step, call
    out.lost, out.silent = True, kind == "late"
    return out


def _cause(kind: str, peer: int | None, ranks: Sequence[int], timeout: float, call: str) -> str:
    if peer is not None:
        if kind == "closed":
            return f"rank {peer} closed its connection: it ended or raised. Look at its log first."
        if kind == "late":
            alike = "" if call.startswith(STEPS) else ", with the same arguments"
            return (
                f"nothing came of it in {timeout:g} s (timeout=): rank {peer} is stuck or stopped, or does not call"
                f" {call} as often as this rank{alike}. Look at its log first."
            )
        return f"rank {peer}, or one that it waits for, died, was cut off, or calls something else. Look at its log."
    who = listed(ranks)
    if kind == "closed":
        return f"one of {who}, which take part, closed its connection: it ended or raised. Look for it in their logs."
    if kind == "late":
        return (
            f"not all of {who} took part within {timeout:g} s (timeout=): one is stuck or stopped, or does not call"
            f" {call}, which all of them must."
        )
    return f"{who} take part; one of them died, was cut off, or calls something else. Look at their logs."


def _consequence(witness: int, first: int | None, note: last_words.Note, me: int) -> str:
    at = "" if note.step is None else f" at step {note.step}"
    gave_up = f"rank {witness} gave up in consequence of another failure, in {note.call}{at}"
    if first is None:
        return f"{gave_up}. Look at its log first."
    if first == me:
        return f"{gave_up}: it waited for this rank, rank {me}, which came late or made other calls."
    return f"{gave_up}: look at the log of rank {first} first, for which it waited."


def listed(ranks: Sequence[int], limit: int = 16, what: str = "rank") -> str:
    """ "ranks 0, 1, 2", and of very many the first."""
    text = ", ".join(map(str, ranks[:limit]))
    more = f", ... ({len(ranks)} in all)" if len(ranks) > limit else ""
    return f"{what}{'s' if len(ranks) > 1 else ''} {text}{more}"


def _shortened(text: str, limit: int = 160) -> str:
    return re.sub(r"^\[[^\]]*\]\s*", "", text)[:limit]
