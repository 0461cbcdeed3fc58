"""An exchange of a pair that comes late is left out, by both ends or by neither (`skip_late=`).

Left out on one end alone it would move the workers' mean. So both ends propose, and the first proposal counts:

    "skip"   a rank that has waited for its peer's messages for so many seconds
    "use"    one that has them

One atomic sum in the default store for each pair and step tells either end who was first; the second end deletes it.
Nobody waits longer for a late peer than those seconds and a question to the store.

What is left out still arrives: its sends and receives are posted, and gloo cannot take them back. They keep their
buffers as an `Orphan` until they are through. A pair has two of them at most; then its messages are waited for as
without `skip_late`, so that no rank runs ahead of a peer by more than that. A rank that was held up once stays behind
by that time, and its exchanges may be late for long: after eight in a row a pair's next one is waited for.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import breaks
from .store import default_store
from .waiter import Orphan, Waiter

if TYPE_CHECKING:
    from .group import Group
    from .transfer import Transfer

MOST = 2  # orphans of a pair
IN_A_ROW = 8  # exchanges of a pair that may be left out one after the other
SKIP, USE = 1, 1 << 20  # what proposals add to the sum: one of each of two ranks can be told apart
REMEMBERED = 10_000  # exchanges that were left out: the last ones


class Late:
    """One rank's end of it. All ranks of a group build one, after the same calls.

    Args:
        seconds: how long a peer's messages are waited for.
    """

    def __init__(self, group: Group, seconds: float):
        self.group, self.seconds = group, seconds
        self.skipped: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)  # (step, global rank of the peer)
        self._store = default_store(f"fused_dlam late {group.generation}")
        self._waiters: dict[int, Waiter] = {}
        self._orphans: dict[int, deque[Orphan]] = {}
        self._in_a_row: Counter[int] = Counter()  # by peer; alike at both ends

    def use(self, j: int, step: int, transfers: Sequence[Transfer], buffers: Sequence[torch.Tensor]) -> bool:
        """Waits for a peer's messages, and returns whether both ends use them, or both leave them out.

        Args:
            j: the one source and destination of all transfers, which have sent.
            buffers: what they read and write. Where the messages are left out, nobody else may use them again.

        Raises ExchangeError if they do not come within the group's timeout where they must.
        """
        group = self.group
        if j not in self._waiters:
            # A pair's messages come in the order in which they were posted: one that is late holds up only later ones.
            self._waiters[j], self._orphans[j] = Waiter(), deque()
        waiter, orphans = self._waiters[j], self._orphans[j]
        with group.watched("waiting for a message from", step, j):
            while orphans and orphans[0].done.is_set():
                orphans.popleft().check()
            messages = waiter.take([work for t in transfers for work in t.take_receives()])
            must = self._store is None or len(orphans) >= MOST or self._in_a_row[j] >= IN_A_ROW
            here = self._within(j, messages, group.timeout if must else self.seconds)
            if must and not here:
                raise RuntimeError(f"Timed out waiting {group.timeout:g}s for recv operation to complete")
        if self._store is not None:
            with group.watched("agreeing on whether to leave out the exchange with", step, j):
                here = self._agreed(j, step, here)
        if here:
            with group.watched("waiting for a message from", step, j):
                if not self._within(j, messages, group.timeout):
                    raise RuntimeError(f"Timed out waiting {group.timeout:g}s for recv operation to complete")
            self._in_a_row[j] = 0
            return True
        # The sends, which are behind the receives. This rank must not leave before they are through.
        sends = [work for t in transfers for work in t.take_sends()]
        orphans.append(waiter.take(sends, buffers, None if group.holdings is None else group.holdings.posted))
        self._in_a_row[j] += 1
        self.skipped.append((step, group.ranks[j]))
        return False

    def _within(self, j: int, messages: Orphan, seconds: float) -> bool:
        assert self.group.holdings is not None
        return breaks.within(self.group.holdings, self.group.ranks[j], messages, seconds)

    def _agreed(self, j: int, step: int, here: bool) -> bool:
        """Whether the first of the two proposals was to use the messages."""
        assert self._store is not None
        low, high = sorted((self.group.rank, j))
        key, mine = f"{low} {high} {step}", USE if here else SKIP
        theirs = self._store.add(key, mine) - mine
        if theirs == 0:
            return here
        self._store.delete_key(key)
        return theirs == USE
