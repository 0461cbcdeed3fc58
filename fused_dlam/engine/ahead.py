"""What leaves before its step begins: messages that are x itself, which is there as soon as the step before has ended.

They follow that step, bucket by bucket as it combines them, or leave one after another in the steps of a round, which
write nothing into x.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from .buckets import Bucket
from .flight import EVERYBODY, OPEN, Flight

if TYPE_CHECKING:
    from .engine import Engine


class Ahead:
    """One engine's."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.goes = False  # whether the next step's exchange begins before that step
        self._written: dict[int, bool] = {}  # by bucket: whether the last step has written its message

    def expect(self, share: float) -> int:
        """The present step ends: the next one's exchange follows it, for this share of all values. Returns for how many
        buckets."""
        self.goes = share > 0 and self.engine.gossips
        return self._due(share) if self.goes else 0

    def follow(self, b: Bucket, step: int, flights: dict[int, Flight]) -> None:
        """Begins a bucket's exchange in a step that has not begun, once, and keeps it: one that is interrupted has
        receives that are posted, and perhaps its message sent. Done again it would be a message late from then on."""
        if b.index not in flights:
            flights[b.index] = Flight(self.engine, b, step, follows=True, written=self._written.get(b.index, False))
            flights[b.index].to(OPEN)

    def send(self, share: float) -> None:
        """Between steps: begins the next exchange of this share of all values, where it goes ahead."""
        engine = self.engine
        for b in engine.buckets[: self._due(share)] if self.goes else ():
            self.follow(b, engine.steps, engine.flights)

    def _due(self, share: float) -> int:
        """How many buckets begin within a share of all values."""
        starts = itertools.accumulate((b.N for b in self.engine.buckets), initial=0)
        total = sum(b.N for b in self.engine.buckets)
        return sum(start < share * total for start in itertools.islice(starts, len(self.engine.buckets)))

    def message(self, flight: Flight) -> tuple[torch.Tensor, ...]:
        """Where the message of the step after a flight's goes, if that is the new x in another type: the pass that
        computes x writes it."""
        engine, b = self.engine, flight.b
        if not (self.goes and engine.message.is_x) or engine.sends_as_it_lies(b):
            return ()
        peers = engine.peers(flight.step + 1)
        due = peers is not EVERYBODY and (peers.sources or peers.destinations)
        return (b.messages[0],) if due else ()

    def note(self, flight: Flight) -> None:
        """Whether a step has written the next message of a bucket."""
        self._written[flight.b.index] = flight.next_written

    def rewrite(self, b: Bucket) -> None:
        """x has changed since, and the message has not left."""
        self._written[b.index] = False

    def forget(self) -> None:
        """The step that comes may be another, and x is read anew."""
        self.goes, self._written = False, {}
