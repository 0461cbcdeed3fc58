"""Before groups are built: every rank says in the default store what it builds, and hears the others.

Without it a rank that never builds its optimizer, or builds another one, leaves the others in torch's rendezvous until
the timeout, with an error about the store's keys; and those that disagree would notice in the middle of a collective.

    prefix   fused_dlam/roll/<the ranks, hashed>/<number>     number: how many over these ranks were completed
    key      a rank's global number                           value: what it builds
    key      the same and "came"                              value: when it gave up, by the store's "clock"

A roll call that was not completed is withdrawn and not counted, so the next attempt stands at the same number; one that
was completed is counted on all ranks, whatever comes of it. All values together name what is built then: a name that no
other attempt has had, nor one of a process that died and was replaced.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from .errors import ExchangeError, listed
from .store import default_store

# By default group: where a job starts anew with a fresh process in the place of a dead one, all count from zero.
_completed: weakref.WeakKeyDictionary[dist.ProcessGroup, Counter] = weakref.WeakKeyDictionary()
NOT_AT_ONCE = 1.0  # seconds after which a rank that waits also says over which ranks, and looks where the others wait


def call(ranks: Sequence[int], what: str, facts: Mapping[str, object], timeout: float) -> str:
    """Waits until all of `ranks`, this one among them, build the same; returns a name that they share.

    Args:
        what: is built, for messages: "optimizer".
        facts: what must be equal on all ranks. Raises ValueError on all of them otherwise.
        timeout: seconds, after which ExchangeError names who has not come.
    """
    members, me = tuple(sorted(ranks)), dist.get_rank()
    counts = _completed.setdefault(dist.group.WORLD, Counter())  # type: ignore[arg-type]
    which = hashlib.sha1(str(members).encode()).hexdigest()
    number = counts[members]
    store = default_store(f"fused_dlam/roll/{which}/{number}")
    if store is None:
        counts[members] += 1
        return f"{which}_{number}"
    mine = {"what": what, **{name: str(value) for name, value in facts.items()}}
    try:
        began = store.add("clock", 1)
        store.set(str(me), json.dumps([mine, uuid.uuid4().hex]))
        complete = False
        try:
            complete = _all_there(store, members, me, what, timeout)
        finally:
            if not complete:  # whoever comes later waits for the next attempt
                store.set(f"{me} came", str(store.add("clock", 1)))  # first, lest one looks in between
                store.delete_key(str(me))
        if not complete:
            _raise_missing(store, members, me, what, timeout, began)
        values = [value.decode() for value in store.multi_get([str(rank) for rank in members])]
    except RuntimeError as error:
        if isinstance(error, ExchangeError):
            raise
        raise ExchangeError(
            f"rank {me}: the store of the default process group does not answer while {what} is built"
            f" ({str(error).splitlines()[0][:160]}): the process that keeps it, rank 0 or torchrun's agent, may be gone"
        ) from error
    counts[members] += 1
    _compare([json.loads(value)[0] for value in values], members, what)
    return hashlib.sha1("".join(values).encode()).hexdigest()


def clear(ranks: Sequence[int]) -> None:
    """Takes this rank's word of the last completed roll call out of the store, once all have heard it."""
    members = tuple(sorted(ranks))
    number = _completed[dist.group.WORLD][members] - 1  # type: ignore[index]
    store = default_store(f"fused_dlam/roll/{hashlib.sha1(str(members).encode()).hexdigest()}/{number}")
    if store is not None:
        store.delete_key(str(dist.get_rank()))


def _all_there(store: dist.Store, members: Sequence[int], me: int, what: str, timeout: float) -> bool:
    """Waits for one rank after the other. Not by `Store.wait`: that holds a TCPStore's only connection, and warns."""
    began, pause, told = time.monotonic(), 0.002, False
    if store.check([str(rank) for rank in members]):
        return True
    missing = [rank for rank in members if rank != me]
    elsewhere = default_store("fused_dlam/roll/waiting")
    assert elsewhere is not None
    try:
        while missing:
            if store.check([str(missing[0])]):
                missing.pop(0)
                continue
            waited = time.monotonic() - began
            if waited > timeout:
                return store.check([str(rank) for rank in members])
            if waited > NOT_AT_ONCE:
                if not told:
                    elsewhere.set(str(me), json.dumps([what, members]))
                    told = True
                _compare_ranks(elsewhere, missing[0], members, me, what)
            time.sleep(min(pause, timeout))
            pause = min(1.5 * pause, 0.25)
        return True
    finally:
        if told:
            elsewhere.delete_key(str(me))


def _compare_ranks(elsewhere: dist.Store, rank: int, members: Sequence[int], me: int, what: str) -> None:
    """Raises ValueError if `rank` waits over other ranks, of which this is one: the two would wait for each other."""
    if not elsewhere.check([str(rank)]):
        return
    other, theirs = json.loads(elsewhere.get(str(rank)))
    if tuple(theirs) != tuple(members) and me in theirs and other == what:
        # It has to see this rank's word too, before that is taken back: both then raise.
        time.sleep(NOT_AT_ONCE)
        raise ValueError(
            f"the ranks do not agree on group=: rank {me} builds its {what} over {listed(members)}, rank {rank} over"
            f" {listed(theirs)}. Build the same on every rank of a group"
        )


def _raise_missing(store: dist.Store, members: Sequence[int], me: int, what: str, timeout: float, began: int) -> None:
    def came(rank: int) -> bool:
        """Whether a rank was here, and has given up since this one began to wait."""
        return store.check([f"{rank} came"]) and int(store.get(f"{rank} came")) > began

    here = [rank for rank in members if store.check([str(rank)]) or came(rank)]
    missing = [rank for rank in members if rank not in here] or [rank for rank in members if rank != me]
    here = [rank for rank in here if rank not in missing]
    verb = "has" if len(missing) == 1 else "have"
    error = ExchangeError(
        f"{listed(missing)} {verb} not built {'its' if len(missing) == 1 else 'their'} {what} within {timeout:g} s;"
        f" {listed(here)} {'has' if len(here) == 1 else 'have'}. All ranks of a group must build it,"
        f" and the same number of times: look at the log of rank {missing[0]} first"
    )
    error.rank, error.peer, error.call = me, missing[0], f"building the {what}"
    raise error


def _compare(facts: Sequence[Mapping[str, str]], members: Sequence[int], what: str) -> None:
    first = facts[0]
    for rank, other in zip(members, facts, strict=True):
        for name in first:
            if other.get(name) != first[name]:
                raise ValueError(
                    f"the workers do not agree on {name}: rank {members[0]} has {first[name]}, rank {rank} has"
                    f" {other.get(name)}. Build the same {what} on every rank"
                )
