"""What the neighbors' messages say of themselves (header.py), and what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..comm.transfer import Transfer
from ..comm.watch import ExchangeError, log
from .flight import EVERYBODY, Flight
from .header import NOT_FINITE, RECALLED, SIZE, STALE, Header, digest

if TYPE_CHECKING:
    from .engine import Engine

# Of a mean of headers: what all must say alike, what makes the messages useless where they do not, and the flags.
ALIKE, DECISIVE = Header.places("step", "layout", "rates", "settings", "rate"), Header.places("step", "layout")
(FLAGS,) = Header.places("flags")


class Hearing:
    """One rank's end of what messages say: writes it, reads it, and acts on it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.told: set[str] = set()
        self.unfit: list[int] = []  # global ranks that will raise, for their gradients are not finite
        # Over NCCL: headers on their way to the host, read in a later step.
        self._later: list[tuple[torch.Tensor, torch.cuda.Event, Header, tuple[int, ...]]] = []

    def forget(self) -> None:
        """The neighbors are others from here on."""
        self.told.clear()
        self.unfit, self._later = [], []

    def say(self, step: int) -> Header:
        """What this worker says of its messages in a step."""
        e = self.engine
        rates, others = e.settings
        rate = rates[0] if rates and isinstance(rates[0], float) and abs(rates[0]) < 1e38 else 0.0
        flags = e.flags | (RECALLED if e.recalls else 0)
        return Header(step, e.place.workers.rank, e.layout, digest(rates), digest(others), rate, flags)

    def recall(self) -> None:
        """Exchanges anew what left too early, here or where messages come from."""
        e = self.engine
        if not e.recallable or not e.buckets:
            self.listen()
            return
        last = e.flights[e.buckets[-1].index]
        if last.average is not None:  # also where nobody sends messages: all-reduce, local steps
            e.recalls = last.average_recalled()
        sources = self.listen()
        if e.recalls or sources:
            for b in e.buckets[:-1]:
                e.flights[b.index].again(e.recalls, sources)

    def listen(self) -> set[int]:
        """The workers that recall what they sent before their last message. Waits for the last bucket's messages.

        Raises ExchangeError if a message is of another step or layout.
        """
        e = self.engine
        self._read_later()
        if not e.buckets:
            return set()
        flight = e.flights[e.buckets[-1].index]
        if not flight.talks or flight.message is None:
            return set()
        own = flight.said
        assert own is not None
        if not e.recallable:
            self._ask_later(flight, own)
            return set()
        if flight.peers is EVERYBODY:
            flight.arrive()
            with e.lanes[flight.b.x.device].outbound():  # where the mean came to the device
                return self._mean(flight, own)
        return self._all(own, flight.peers.sources, self._rows(flight))

    def _rows(self, flight: Flight) -> list[list[float]]:
        assert isinstance(flight.transfer, Transfer)
        if flight.b.x.is_cuda:
            flight.transfer.wait_delivered()
            headers = flight.headers(flight.transfer.readable)
        else:
            flight.arrive()
            headers = flight.headers()
        return [header.tolist() for header in headers]

    def _all(self, own: Header, sources: tuple[int, ...], rows: list[list[float]]) -> set[int]:
        recalled = set()
        for j, values in zip(sources, rows, strict=True):
            other = Header.read(values)
            self._check(own, other)
            assert other is not None
            if other.flags & RECALLED:
                recalled.add(j)
            if other.flags & NOT_FINITE:
                self.unfit.append(self._name(j))
        return recalled

    def _name(self, worker: int) -> int:
        return self.engine.place.workers.ranks[worker]

    def _check(self, own: Header, other: Header | None) -> None:
        wrong = own.compare(other, self.engine.me, self._name)
        if wrong:
            raise ExchangeError(wrong)
        assert other is not None
        if (own.flags | other.flags) & STALE:
            return
        where, peer = f"rank {self.engine.me} at step {own.step}", self._name(other.sender)
        if other.rates != own.rates:
            self._tell(
                f"rank {peer}",
                f"{where}: the learning rates of rank {peer} are others than here (the first is {other.rate:g} there,"
                f" {own.rate:g} here): the workers' mean follows no one's objective. A scheduler that follows a loss"
                " (ReduceLROnPlateau), or counts steps, must get the same number on all ranks.",
            )
        elif other.settings != own.settings:
            self._tell(
                f"rank {peer}",
                f"{where}: rank {peer} has another momentum, weight decay, `every` or other hyper-parameter than this"
                " rank.",
            )

    def _tell(self, about: str, text: str) -> None:
        if about not in self.told:
            self.told.add(about)
            log.warning("%s", text)

    def _mean(self, flight: Flight, own: Header) -> set[int]:
        """An exact average: what all say alike comes through as it is, and a flag of any as more than none."""
        e = self.engine
        mean = flight.received[0, 0, flight.b.header].tolist()
        mine = own.values()
        wrong = {i for i in ALIKE if abs(mean[i] - mine[i]) > 1e-3}
        if wrong & DECISIVE:
            raise ExchangeError(
                f"rank {e.me} at step {own.step}: an exact average over all workers mixes different steps, or different"
                " parameters. Every rank must call step() equally often; where data run out at different times, train"
                " within `with optimizer.join():`"
            )
        if wrong:
            self._tell("mean", f"rank {e.me} at step {own.step}: the ranks have different learning rates or settings.")
        return {-1} if mean[FLAGS] > 1e-6 else set()

    # -- over NCCL: nothing waits for the device ---------------------------------------------------------------------

    def _ask_later(self, flight: Flight, own: Header) -> None:
        if flight.peers is EVERYBODY or not flight.b.x.is_cuda or self.engine.place.splits:
            return
        with self.engine.lanes[flight.b.x.device].outbound():
            flight.wait()
            rows = flight.headers()
            host = torch.empty(len(rows), SIZE, dtype=flight.b.landing.dtype, pin_memory=True)
            for there, row in zip(host, rows, strict=True):  # at once they would be made contiguous on the device first
                there.copy_(row, non_blocking=True)
            event = torch.cuda.current_stream(flight.b.x.device).record_event()
        self._later.append((host, event, own, flight.peers.sources))

    def _read_later(self) -> None:
        while self._later and self._later[0][1].query():
            host, _, own, sources = self._later.pop(0)
            recalled = self._all(own, sources, host.tolist())
            if recalled:
                raise ExchangeError(
                    f"rank {self.engine.me}: in step {own.step} rank {self._name(min(recalled))} had sent what was not"
                    " final; see its error. Restart from a checkpoint"
                )
