"""All buckets' steps. flight.py tells one bucket's way through a step; here is how far each may go, and when.

    begin(step)      flights are of this step from now on
    set_scalars()    its scalars, and the weights of its neighbors
    send_next()      the next bucket in line is sent                  (in the backward pass when overlapped)
    complete(ahead)  the rest is sent, and what left too early once more; then bucket by bucket:
                     wait -> combine -> parameters
                     ahead: the next step's receives are posted, or x itself is sent, right after that

What is sent, to whom and in which order depends on the layout and the step alone, never on what one rank happens to
have (a missing gradient, an overflow): otherwise its neighbors would hang.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..comm import other_averagers
from ..comm.place import Place
from ..comm.streams import Lane
from ..layers.compression import Codec, damping
from ..layers.layer import Layer
from ..rules.rule import Rule
from ..rules.scalars import Scalar, Scalars
from ..topology import Peers, Topology
from . import layout
from .ahead import Ahead
from .buckets import Bucket
from .compressed import places
from .flight import AVERAGING, DONE, EVERYBODY, NOBODY, OPEN, SENT, Flight
from .header import STALE, digest
from .hearing import Hearing
from .leaving_out import LeavingOut
from .local import Local
from .message import Message
from .regroup import averager
from .warm import warm


class Engine:
    """Flat buffers, passes and flights of all parameter groups.

    Args:
        topology: as it is, or with columns that sum to one: what is averaged then is x / w, with rows that do.
        place: whom this rank gossips with, and with whom it is one worker.
        message: what is sent. For `STEPPED` and `COPY` x is stepped by an inner optimizer and only averaged here.
        layers: what runs around the rule.
        fused: see `kernels.passes.choose`.
        message_dtype: type of the messages; None: that of the master values.
        bucket_mb: MiB from which a bucket is full; None: see layout.py.
        clips: whether gradients far longer than usual are shortened, see spikes.py.
        elastic: whether other workers may come, so that one alone has room for them.
        codec: what makes bytes of messages, see compressed.py.
        anchored: whether an inner optimizer moves the parameters between exchanges, see anchored.py.
    """

    def __init__(
        self,
        rule: Rule,
        topology: Topology,
        place: Place,
        message: Message,
        layers: Sequence[Layer] = (),
        fused: bool | None = None,
        message_dtype: torch.dtype | None = None,
        bucket_mb: float | None = None,
        clips: bool = False,
        elastic: bool = False,
        codec: Codec | None = None,
        anchored: bool = False,
    ):
        self.rule, self.topology, self.place, self.message = rule, topology.as_rows, place, message
        self.message_dtype, self.bucket_mb, self.elastic, self.codec = message_dtype, bucket_mb, elastic, codec
        self.places, self.anchored = places(codec, self.topology), anchored
        self.averager = averager(message, place)
        # How buckets are laid out, for good: also of parameters that come while this worker is alone.
        self.averages, self.parts = self.averager.size > 1, place.parts
        self.buckets: list[Bucket] = []  # in the one order in which every rank exchanges them
        self.lanes: dict[torch.device, Lane] = {}
        self.layers = tuple(layers)
        # Names of buffers that start as the parameters. The others start at zero.
        self.starting_at_x = {"master", *(k for layer in layers for k, start in layer.state.items() if start == "x")}
        self.guard = not place.alone  # what is not finite stays where it is; one worker is as torch has it
        self.guesses = False  # whether messages may leave before step(), see arrivals.py
        self.recalls = False  # whether those that did are sent anew
        self.factor: Scalar = 1.0  # of the gradients, before they are averaged
        self.settings: tuple[tuple, tuple] = ((), ())  # learning rates and the rest, for the header
        self.flags = 0
        self.stale = False  # in the first step of a worker that came back, whose settings are of before
        self.steps = 0  # of the last step that has begun, plus one
        self.hearing, self.ahead = Hearing(self), Ahead(self)
        self.leaving_out: LeavingOut | None = None  # what decides on exchanges that come late
        self.local = Local(rule, self.layers, fused, self.guard, message.only_averages, clips)
        self.flights: dict[int, Flight] = {}  # by bucket: of this step, or between steps of the next
        self.following: dict[int, Flight] = {}  # while this step ends: of the next
        self.step: int | None = None  # the step that has begun
        self.skip: Scalar = 0.0
        self.sent = 0  # buckets in line for which it has begun
        self._left = 0  # and those of them whose message has left
        self._first = True  # the first step is still to come

    # -- layout ------------------------------------------------------------------------------------------------------

    def add_group(self, params: Iterable[torch.Tensor]) -> list[Bucket]:
        """Moves a parameter group into flat buffers. Same parameters in the same order on every rank."""
        self.local.passes.append({})
        return self.enter(params, len(self.local.passes) - 1)

    def enter(self, params: Iterable[torch.Tensor], group: int) -> list[Bucket]:
        """Moves parameters of a group into flat buffers, those that come later into buckets of their own."""
        new = layout.enter(self, params, group)
        self.buckets += new
        for first in self.local.choose(new, group):
            warm(self, first)
        self.note_layout()
        return new

    def leave_group(self, group: int) -> None:
        """Takes back what `add_group` has made of a group, the last one, whose parameters are exchanged by nobody."""
        del self.local.passes[group:]
        for b in [b for b in self.buckets if b.group >= group]:
            self.buckets.remove(b)
            self.flights.pop(b.index, None)
        self.note_layout()

    def note_layout(self) -> None:
        """What messages say of the buckets, which are others now."""
        self.layout = digest([(b.index, b.N, str(b.x.dtype)) for b in self.buckets])

    @property
    def on_gpu(self) -> bool:
        return any(device.type == "cuda" for device in self.lanes)

    @property
    def me(self) -> int:
        """This rank's global number."""
        return self.place.workers.ranks[self.place.workers.rank]

    @property
    def recallable(self) -> bool:
        """Whether ranks can read on the host what messages say, before they combine: over NCCL they would have to wait
        for the GPU in every step."""
        staged = self.on_gpu and self.averager.size == 1 and not self.place.splits
        return self.place.workers.backend in ("gloo", "none") and (staged or not self.on_gpu)

    @property
    def averages_inside(self) -> bool:
        """Whether gradients are averaged inside a machine in every inner step, and not by flights."""
        return self.anchored and self.averages and self.message is not Message.GRADIENT

    @property
    def steps_alone(self) -> bool:
        """Whether this rank takes steps by itself between two exchanges, which may lie far apart."""
        return self.anchored and not self.averages_inside

    @property
    def gossips(self) -> bool:
        """Whether there are neighbors to average with."""
        return self.place.workers.size > 1 and self.message is not Message.GRADIENT

    @property
    def silent(self) -> bool:
        """Whether nothing is ever sent: one worker, with gradients of its own."""
        return self.place.workers.size == 1 and self.averager.size == 1

    def reorder(self, indices: Sequence[int]) -> None:
        """Buckets are exchanged in this order from now on. Every rank must call it between the same steps."""
        place = {index: i for i, index in enumerate(indices)}
        self.buckets.sort(key=lambda b: place[b.index])

    def start_equal(self, new: Iterable[Bucket]) -> None:
        """Gives every worker rank 0's parameters. All ranks must call it for the same buckets."""
        for b in new:
            self.place.start_equal(b.x)
            for name in self.starting_at_x - {"master"}:
                b.extra[name].copy_(b.x)
            if b.compressed is not None:
                b.compressed.start(b.x)
            b.publish()

    # -- a step ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """At the start of a step: parameters and gradients are where they should be, or come there.

        Raises RuntimeError if a parameter was moved, or changed while its message was in flight; ValueError if, in the
        first step, the model was wrapped in DDP since.
        """
        self.check_whole()
        if self._first and self.place.workers.size > 1:
            self._first, workers = False, self.place.workers
            ddp = other_averagers.ddp_ranks(slot.p for b in self.buckets for slot in b.slots)
            other_averagers.refuse_ddp(ddp, workers.ranks, workers.ranks[workers.rank])
        for b in self.buckets:
            b.refresh()
        if self.step is None:
            for flight in self.flights.values():
                flight.check_unchanged()

    def begin(self, step: int, skip: Scalar = 0.0) -> None:
        """From here on flights are of this step. Once more in the same step, what has left is not what counts.

        skip: a number other than 0 if nobody takes a local step in it, as all ranks agree; with one worker it may be a
        number on the device, which the passes read.
        """
        if self.step is None:
            self.recalls, self.flags = False, STALE if self.stale else 0
        for b in self.buckets:
            b.absorb_shards()  # before a message is packed from it, in the backward pass or in step()
        self.step, self.skip, self.steps = step, skip, step + 1

    @property
    def skipped(self) -> bool:
        """Whether the host knows that nobody takes a local step."""
        return not isinstance(self.skip, torch.Tensor) and bool(self.skip)

    def set_scalars(self, scalars: Sequence[Scalars], groups: Sequence[dict[str, Any]] = ()) -> None:
        """Fixes the step's scalars, one entry per group, without the weights."""
        assert self.step is not None
        weights, skip = self.peers(self.step).weights, self.skip if isinstance(self.skip, torch.Tensor) else 0.0
        self.local.set([s._replace(weights=weights, skip=skip) for s in scalars], groups)

    def bring(self, stage: int) -> None:
        """All buckets as far as a stage of their flights."""
        for b in self.buckets:
            self.flight(b).to(stage)

    def send_next(self, waits: bool = True) -> None:
        """Sends the next bucket in line. With machines as workers it sends those before it: their gradients have been
        averaged by now.

        waits: False in the backward pass, where the machine's other ranks may wait for this one elsewhere: then only
        what has been averaged.
        """
        self.flight(self.buckets[self.sent]).to(AVERAGING)
        self.sent += 1
        while self._left < (self.sent - 1 if self.place.splits else self.sent):
            flight = self.flight(self.buckets[self._left])
            if not (waits or flight.averaged):
                break
            flight.to(SENT)
            self._left += 1

    def complete(self, ahead: float = False, recalls: bool = False) -> None:
        """Sends what is left, then waits for and combines every bucket.

        The last bucket is always sent here, and says whether what left before it counts. Whoever hears that it does not
        receives anew, before anything is combined.

        Args:
            ahead: the next step's exchange begins, for this share of the buckets.
            recalls: what was sent in the backward pass is not what this step sends.
        """
        assert self.step is not None
        self.recalls = recalls and self.sent > 0
        while self.sent < len(self.buckets):
            self.send_next()
        if self.place.splits:
            self.bring(SENT)
        if self.guesses:
            self.hearing.recall()
        if self.leaving_out is not None:
            self.leaving_out.decide()
        first = self.ahead.expect(ahead)
        done, following = self.flights, self.following
        for number, b in enumerate(self.buckets):
            if b is self.buckets[-1] and not self.guesses:
                self.hearing.listen()
            done[b.index].to(DONE)
            self.ahead.note(done[b.index])
            if number < first:
                self.ahead.follow(b, self.step + 1, following)
        for flight in done.values():
            flight.wait_sent()  # when step() returns this rank may leave: its neighbors have what they need
        self.following = {}
        self.place.workers.ledger.end_step()
        self._between_steps(following)

    def end(self) -> None:
        """Ends a step in which there is nothing to send and nothing to combine."""
        for flight in self.flights.values():
            flight.close()
        self.place.workers.ledger.end_step()
        self._between_steps({})

    def _between_steps(self, flights: dict[int, Flight]) -> None:
        """No step has begun. flights: of the next one."""
        self.flights, self.step, self.skip, self.sent, self._left = flights, None, 0.0, 0, 0
        self.stale = False

    def check_whole(self) -> None:
        """Raises RuntimeError if an earlier attempt at the present step failed, see `Flight.to`."""
        for flight in (*self.flights.values(), *self.following.values()):
            if flight.failure:
                flight.to(DONE)

    # -- between steps -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Waits for what was started for the next step, without using it. All ranks must call it.

        Afterwards x may be read and written, but must be restored before the next step.
        """
        if self.message.is_x and self.step is None and not self.anchored:
            for flight in self.flights.values():
                flight.wait()

    def forget(self, step: int) -> None:
        """Ends what was started for the next step and drops it: that step exchanges anew. On all ranks.

        A backward pass without its step() may have sent some messages on one rank and none on another. If any rank has,
        all exchange every bucket of that step once, and use none.

        Raises RuntimeError if an attempt at a step failed, for nothing can be dropped then.
        """
        self.check_whole()
        if self.step is None and self.anchored:  # ranks may have come unlike far within a round
            self.ahead.send(1.0)
        begun = self.step is not None and self.sent > 0
        if self.guesses:
            mine = torch.tensor([float(begun)])
            begun = bool(self.place.largest(mine, "ending what the backward pass began", None) > 0)
        if begun:
            self.step = step
            for b in self.buckets:
                self.flight(b).to(OPEN)
        for b in self.buckets:
            if b.index in self.flights:
                self.flights[b.index].drop(begun)
        self._between_steps({})
        self.ahead.forget()

    # -- what a flight asks ------------------------------------------------------------------------------------------

    def flight(self, b: Bucket) -> Flight:
        """A bucket's flight in the present step."""
        if b.index not in self.flights:
            assert self.step is not None
            self.flights[b.index] = Flight(self, b, self.step)
        return self.flights[b.index]

    def memory(self, step: int) -> int | None:
        """Which of what is remembered of messages a step's messages are about, see compressed.py."""
        return self.places[step % len(self.places)]

    def peers(self, step: int) -> Peers:
        if not self.gossips:
            return NOBODY
        exactly = self.topology.n > 2 and self.topology.averages_exactly(step)
        return EVERYBODY if exactly else self.topology.peers(self.place.workers.rank, step)

    def masses(self, step: int, exchanges: bool = True) -> tuple[float, float] | None:
        """This worker's mass before and after a step, for a rule that reads them; None: one each.

        exchanges: False for a local step, in which masses stay.
        """
        rank, graph = self.place.workers.rank, self.topology
        if not self.rule.mass or graph.is_doubly_stochastic or graph.n != self.place.workers.size:
            return None
        return float(graph.mass(step)[rank]), float(graph.mass(step + exchanges)[rank])

    def make_room(self, b: Bucket) -> None:
        """Room for a bucket's messages to the present neighbors, and for what is remembered of them."""
        degree = self.topology.most_messages if self.gossips else 0
        rows = 0 if self.sends_as_it_lies(b) else self.rule.messages
        b.make_room(self.rule.messages, degree, rows, self.message_dtype)
        codec, memories = self.codec if degree else None, 1 + max((p for p in self.places if p is not None), default=0)
        weaker = 1.0 if codec is None else damping(codec, self.topology.phases)
        b.compress(codec, self.rule.messages, degree, self.place.parts, memories, weaker, self.local.fused)

    def sends_as_it_lies(self, b: Bucket) -> bool:
        """Whether the message is a buffer that is there already."""
        return self.message.is_x and self.message_dtype in (None, b.x.dtype)

    def buffers(self, b: Bucket) -> Mapping[str, torch.Tensor]:
        """A bucket's flat buffers that make up the optimizer's state, by name."""
        named = dict(zip(self.rule.state, b.state, strict=True)) | b.extra
        named |= {} if b.compressed is None else b.compressed.kept
        if b.anchored:
            return {**named, "anchor": b.x}
        return named if b.low is None else {**named, "master": b.x}
