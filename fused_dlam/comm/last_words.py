"""A note in the default store by a rank that gives up, for those that wait for it: whom it had waited for itself.

One rank that dies takes all others along, in turn: each sees a neighbor's connection close, and only the first of them
has seen the one that died. With the notes each error names that one.

Best effort: nothing here raises, and nothing takes longer than `PATIENCE`; a store that does not answer is left to a
daemon thread.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist

from .store import default_store

PATIENCE = 2.0  # seconds, in all
# seconds that a peer may take to its note: gloo closes its connections first, or its time runs out at the same moment
HESITATION = 0.5


class Note(NamedTuple):
    """What a rank that gave up has left."""

    first: int | None  # the rank to look at, if it knows of one
    step: int | None
    call: str


def exchange(generation: str, me: int, own: Note, witnesses: Sequence[int]) -> tuple[int, int | None, Note] | None:
    """Leaves this rank's note and looks for those of `witnesses`: (who left one, the first to look at, the note).

    None if there is no note, which is all that happens where the default store cannot be asked.
    """
    found = asking(generation, lambda store, found: _look(store, me, own, witnesses, found))
    return found[0] if found else None


def silent(generation: str, members: Sequence[int]) -> list[int]:
    """Those of `members` that have left no note: in an exchange of all of them, the ones to look at."""

    def look(store: dist.Store, found: list) -> None:
        time.sleep(HESITATION)
        found.append([rank for rank in members if _note_of(store, rank) is None])

    found = asking(generation, look)
    return found[0] if found else []


def asking(generation: str, look: Callable[[dist.Store, list], None]) -> list:
    """What `look` finds in the notes, as far as it comes within `PATIENCE`. Nothing where nobody can be asked."""
    found: list = []

    def run() -> None:
        try:
            store = default_store(f"fused_dlam/left/{generation}")
            if store is not None:
                look(store, found)
        except Exception:  # noqa: BLE001 -- the error that is being told is not to be replaced by another
            pass

    try:
        if generation:
            thread = threading.Thread(target=run, daemon=True, name="fused_dlam-last-words")
            thread.start()
            thread.join(PATIENCE)
    except RuntimeError:  # no thread can be started any more
        pass
    return found


def _look(store: dist.Store, me: int, own: Note, witnesses: Sequence[int], found: list) -> None:
    end = time.monotonic() + PATIENCE
    store.set(str(me), json.dumps(own))
    until = time.monotonic() + HESITATION
    while True:
        for witness in witnesses:
            note = _note_of(store, witness)
            if note is not None:
                first = _first(store, me, note, end)
                found.append((witness, first, note))
                if first is not None and first != own.first and first != me:
                    store.set(str(me), json.dumps(own._replace(first=first)))
                return
            if time.monotonic() > end:
                return
        if time.monotonic() >= until:
            return
        time.sleep(0.05)


def _note_of(store: dist.Store, rank: int) -> Note | None:
    key = str(rank)
    return Note(*json.loads(store.get(key))) if store.check([key]) else None


def _first(store: dist.Store, me: int, note: Note, end: float) -> int | None:
    """Where the notes lead to: from each to that of the rank it names."""
    first, seen = note.first, {me}
    while first is not None and first not in seen and time.monotonic() < end:
        seen.add(first)
        further = _note_of(store, first)
        if further is None or further.first is None:
            break
        first = further.first
    return first
