"""When neighbors are lost: the broken step is ended alone, and the next ones run with whoever is left.

    let_go    of the messages that are under way
    isolate   what is left of the present step is this worker's alone: no pull where nothing was combined yet
    enter     another place and another graph, between two steps
    settle    newcomers get a copy; what has mean zero over the workers has it again over those that are left

Each survivor so takes one local step in every step(), nothing is kept for a way back, and nobody votes on it. What the
broken step leaves uneven is the sum of its pulls, and the lost worker's share of the centered buffers. MI-DmSGD's
correction would integrate both: with it as it was, the mean of 7 workers that were 8 is 8.5 % off their optimum after
1,000 steps; centered, 0.015 %, as where there were never more (tests/faults/test_centering.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..comm.group import Group
from ..comm.place import Place, alone
from ..comm.streams import Lane
from ..comm.transfer import connect
from ..topology import Topology
from .anchored import AnchoredBucket
from .compressed import places
from .flight import DONE
from .message import Message

if TYPE_CHECKING:
    from .engine import Engine


def let_go(engine: Engine) -> None:
    """Of messages. Receives of the next step, which are posted already, hold connections open."""
    for flight in (*engine.flights.values(), *engine.following.values()):
        flight.close()
        flight.transfer = flight.average = None


def isolate(engine: Engine) -> None:
    """From here on this is one worker. What was combined in the present step stays, the rest gets no pull."""
    for flight in (*engine.flights.values(), *engine.following.values()):
        if flight.average is not None and not flight.average.done and flight.b.g is not flight.b.grads:
            flight.b.g = torch.zeros_like(flight.b.g)  # the transport may still write into the old one
    let_go(engine)
    for flight in engine.flights.values():
        flight.failure = ""
        if flight.combined:
            flight.stage, flight.talks = DONE, False
            flight.b.publish()  # a layer that comes after the rule may have failed before it
    engine.flights = {index: flight for index, flight in engine.flights.items() if flight.combined}
    engine.following, engine.sent, engine.recalls = {}, 0, False
    engine.hearing.forget()
    _replace(engine, alone(engine.place.workers.device))
    engine.averager = engine.place.workers
    if engine.step is None:
        engine.flights = {}
    else:
        engine.local.without_neighbors()


def enter(engine: Engine, place: Place, graph: Topology) -> None:
    """From the next step on this is the place, and the graph."""
    # In the order in which they were built: a newcomer knows no other, and a loss may come while one is agreed on.
    engine.buckets.sort(key=lambda b: b.index)
    engine.flights, engine.topology = {}, graph.as_rows
    engine.ahead.forget()
    if place is not engine.place:  # a newcomer's first
        _replace(engine, place)
    engine.averager = averager(engine.message, place)
    engine.places = places(engine.codec, engine.topology)
    degree = engine.topology.most_messages if engine.gossips else 0
    for device in engine.lanes:
        engine.lanes[device] = Lane(device)
        if degree:
            connect(place.workers, engine.topology, device)
    for b in engine.buckets:
        engine.make_room(b)


def _replace(engine: Engine, place: Place) -> None:
    """What was sent counts from the optimizer's construction on, whatever the place."""
    before, now = engine.place.workers, place.workers
    now.bytes_sent, now.messages_sent = now.bytes_sent + before.bytes_sent, now.messages_sent + before.messages_sent
    engine.place = place


def averager(message: Message, place: Place) -> Group:
    """The ranks over which gradients are averaged first: all workers, a machine's, or this one alone."""
    if message is Message.GRADIENT:
        return place.workers
    return place.inside if place.averages else alone(place.workers.device).workers


def meet_anchors(engine: Engine, back: bool = False) -> None:
    """Between two rounds: x follows the parameters; or back, what was settled is the parameters' too."""
    for b in engine.buckets:
        assert isinstance(b, AnchoredBucket)
        if back:
            b.publish()
        else:
            b.anchor()


def settle(engine: Engine, new: Sequence[int]) -> None:
    """All ranks must call it, before the first step in the new place. new: the ranks that came.

    Each newcomer takes what its left neighbor has.
    """
    place, workers = engine.place, engine.place.workers
    for rank in new:
        source = left_of(rank, new, workers.size)
        for b in engine.buckets:
            for t in (b.x, *b.state, *b.extra.values()):
                workers.copy(t, source, rank)
    for b in engine.buckets:
        kept = dict(zip(engine.rule.state, b.state, strict=True))
        if engine.message is Message.GRADIENT:  # replicas are equal, or all-reduce keeps them apart for ever
            for t in (b.x, *b.state):
                workers.finite_mean(t)
        for name in engine.rule.centered:
            mean = kept[name].clone()
            workers.mean(mean)
            kept[name].sub_(mean.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))
        for t in b.extra.values():  # of layers, whose exact averages keep them equal
            workers.finite_mean(t)
        if place.splits:  # a machine's ranks are equal; perhaps not all of them had combined this bucket
            for t in (b.x, *b.state, *b.extra.values(), *((b.low,) if b.anchored else ())):
                place.inside.broadcast(t)
        b.remember_nothing(workers)  # of messages to others
        if not b.anchored or workers.rank in new:  # who is within a round stays on its way
            b.publish()
    engine.note_layout()


def left_of(rank: int, new: Sequence[int], n: int) -> int:
    """The nearest rank to the left that has been there before."""
    source = (rank - 1) % n
    while source in new:
        source = (source - 1) % n
    return source
