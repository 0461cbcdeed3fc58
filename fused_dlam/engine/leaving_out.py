"""A step whose exchange comes late is completed as one without neighbors, at both ends of the pair (comm/late.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..comm.late import Late
from ..comm.transfer import Transfer
from ..topology import Topology
from ..topology.matrix import Phase

if TYPE_CHECKING:
    from .engine import Engine


def pairs(phase: Phase) -> bool:
    """Whether each worker exchanges with one other, which exchanges with it, or with none."""
    return phase.degrees()[0] <= 1 and phase.is_symmetric()


def check_pairs(topology: Topology) -> None:
    """Raises ValueError for a graph on which an exchange cannot be left out by two workers alone."""
    if not all(pairs(phase) for phase in topology.phases):
        raise ValueError(
            f"skip_late needs a graph of pairs, such as 'one-peer-hypercube' or 'random-match', and {topology.name!r}"
            " is none: where a worker hears from one and is heard by another, a message that is left out moves the"
            " workers' mean"
        )


class LeavingOut:
    """Decides, once a step's messages are sent and before anything is combined. One decision holds for all buckets."""

    def __init__(self, engine: Engine, seconds: float):
        self.engine, self.late = engine, Late(engine.place.workers, seconds)

    def decide(self) -> None:
        """Waits for this step's messages, or has the flights end without them."""
        e = self.engine
        assert e.step is not None
        peers, flights = e.peers(e.step), [e.flights[b.index] for b in e.buckets]
        transfers = [f.transfer for f in flights if isinstance(f.transfer, Transfer)]
        if not (transfers and pairs(e.topology.phase(e.step))):
            return
        (j,) = peers.sources
        buffers = [t for b in e.buckets for t in b.in_transit]
        try:
            used = self.late.use(j, e.step, transfers, buffers)
        except BaseException as error:  # the messages are with the waiter: this step cannot be tried again
            for flight in flights:
                flight.failure = f"{type(error).__name__}: {error}"
            raise
        if used:
            return
        for flight in flights:
            flight.leave_out()
            e.make_room(flight.b)
        e.local.without_neighbors()
