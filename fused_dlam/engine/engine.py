"""All buckets' steps. flight.py tells one bucket's way through a step; here is how far each may go, and when.

    begin(step)      flights are of this step from now on
    set_scalars()    its scalars, and the weights of its neighbors
    send_next()      the next bucket in line is sent                  (in the backward pass when overlapped)
    complete(ahead)  the rest is sent; then bucket by bucket: wait -> combine -> parameters
                     ahead: the next step's receives are posted, or x itself is sent, right after that

What is sent, to whom and in which order depends on the layout and the step alone, never on what one rank happens to
have (a missing gradient, an overflow): otherwise its neighbors would hang.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..comm import other_averagers
from ..comm.group import Alone
from ..comm.place import Place
from ..comm.streams import Lane
from ..comm.transfer import connect
from ..kernels.passes import Passes, choose
from ..layers.layer import Layer, finishing
from ..rules.rule import Rule
from ..rules.scalars import Scalar, Scalars
from ..topology import Peers, Topology
from . import layout
from .buckets import Bucket
from .flight import AVERAGING, DONE, EVERYBODY, NOBODY, OPEN, SENT, Flight
from .message import Message
from .warm import warm


class Engine:
    """Flat buffers, passes and flights of all parameter groups.

    Args:
        place: whom this rank gossips with, and with whom it is one worker.
        message: what is sent. For `STEPPED` and `COPY` x is stepped by an inner optimizer and only averaged here.
        layers: what runs around the rule.
        fused: see `kernels.passes.choose`.
        message_dtype: type of the messages; None: that of the master values.
        bucket_mb: MiB from which a bucket is full; None: see layout.py.
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
    ):
        self.rule, self.topology, self.place, self.message = rule, topology, place, message
        self.fused, self.message_dtype, self.bucket_mb = fused, message_dtype, bucket_mb
        # The ranks over which gradients are averaged first: all workers, a machine's, or this one alone.
        if message is Message.GRADIENT:
            self.averager = place.workers
        else:
            self.averager = place.inside if place.averages else Alone()
        self.buckets: list[Bucket] = []  # in the one order in which every rank exchanges them
        # Per group, for it has scalars of its own: passes by device and type of the master values.
        self.passes: list[dict[tuple[torch.device, torch.dtype], Passes]] = []
        self.lanes: dict[torch.device, Lane] = {}
        self.layers = tuple(layers)
        self._before = [layer for layer in layers if type(layer).before is not Layer.before]
        self._after = [layer for layer in layers if type(layer).after is not Layer.after]
        # Names of buffers that start as the parameters. The others start at zero.
        self.starting_at_x = {"master", *(k for layer in layers for k, start in layer.state.items() if start == "x")}
        self._groups: Sequence[dict[str, Any]] = ()
        self._scales: list[Scalar] = []
        self.flights: dict[int, Flight] = {}  # by bucket: of this step, or between steps of the next
        self.step: int | None = None  # the step that has begun
        self.skip: Scalar = 0.0
        self.sent = 0  # buckets in line for which it has begun
        self._follows = False  # whether the next step's exchange starts right after this one
        self._first = True  # the first step is still to come

    # -- layout ------------------------------------------------------------------------------------------------------

    def add_group(self, params: Iterable[torch.Tensor]) -> list[Bucket]:
        """Moves the parameters into flat buffers. Same parameters in the same order on every rank."""
        group = len(self.passes)
        gradients = not self.message.only_averages or self.averager.size > 1
        full = layout.full_from(self.bucket_mb, sends=not self.silent, early=self.message.is_x)
        new = layout.build(params, full, len(self.buckets), group, self.place.parts, gradients)
        degree = self.topology.most_messages if self.gossips else 0
        extra = [name for layer in self.layers for name in layer.state]
        for b in new:
            b.watched = self.message.is_x
            rows = 0 if self.sends_as_it_lies(b) else self.rule.messages
            b.allocate(self.rule.state, extra, self.rule.messages, degree, rows, self.message_dtype)
            if b.x.device not in self.lanes:
                self.lanes[b.x.device] = Lane(b.x.device, sends=not self.silent)
                if degree:
                    connect(self.place.workers, self.topology, b.x.device)
        self.buckets += new
        kinds = {(b.x.device, b.x.dtype) for b in new}
        elements = {kind: sum(b.N for b in new if (b.x.device, b.x.dtype) == kind) for kind in kinds}
        self.passes.append({kind: choose(self.rule, *kind, elements[kind], self.fused) for kind in kinds})
        for kind in kinds:
            warm(self, next(b for b in new if (b.x.device, b.x.dtype) == kind))
        return new

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
            b.publish()

    # -- a step ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """At the start of a step: parameters and gradients are where they should be, or come there.

        Raises RuntimeError if a parameter was moved, or changed while its message was in flight; ValueError if, in the
        first step, the model was wrapped in DDP since.
        """
        self.check_whole()
        for b in self.buckets:
            b.refresh()
        self._check_unchanged()
        if self._first and self.place.workers.size > 1:
            self._first, workers = False, self.place.workers
            ddp = other_averagers.ddp_ranks(slot.p for b in self.buckets for slot in b.slots)
            other_averagers.refuse_ddp(ddp, workers.ranks, workers.ranks[workers.rank])

    def begin(self, step: int, skip: Scalar = 0.0) -> None:
        """From here on flights are of this step.

        skip: a number other than 0 if nobody takes a local step in it, as all ranks agree; with one worker it may be a
        number on the device, which the passes read.
        """
        for b in self.buckets:
            b.absorb()  # before a message is packed from it, in the backward pass or in step()
        self.step, self.sent, self.skip = step, 0, skip

    @property
    def skipped(self) -> bool:
        """Whether the host knows that nobody takes a local step."""
        return not isinstance(self.skip, torch.Tensor) and bool(self.skip)

    def set_scalars(self, scalars: Sequence[Scalars], groups: Sequence[dict[str, Any]] = ()) -> None:
        """Fixes the step's scalars, one entry per group, without the weights."""
        assert self.step is not None
        self._groups, self._scales = groups, [s.grad_scale for s in scalars]
        weights, skip = self.peers(self.step).weights, self.skip if isinstance(self.skip, torch.Tensor) else 0.0
        for of_group, s, group in zip(self.passes, scalars, groups or [{}] * len(self.passes), strict=True):
            if finishing(self.layers, group):
                s = s._replace(grad_scale=1.0)
            for one in of_group.values():
                one.set(s._replace(weights=weights, skip=skip))

    def bring(self, stage: int) -> None:
        """All buckets as far as a stage of their flights."""
        for b in self.buckets:
            self.flight(b).to(stage)

    def send_next(self) -> None:
        """Sends the next bucket in line. With machines as workers it sends the bucket before it: that one's gradient
        has been averaged by now."""
        self.flight(self.buckets[self.sent]).to(AVERAGING)
        self.sent += 1
        due = self.sent - 1 if self.place.splits else self.sent
        if due:
            self.flight(self.buckets[due - 1]).to(SENT)

    def complete(self, ahead: bool = False) -> None:
        """Sends what is left, then waits for and combines every bucket. ahead: the next step's exchange begins."""
        assert self.step is not None
        while self.sent < len(self.buckets):
            self.send_next()
        if self.place.splits:
            self.bring(SENT)
        self._follows = ahead and self.gossips
        done, following = self.flights, {}
        for b in self.buckets:
            done[b.index].to(DONE)
            if self._follows:
                flight = Flight(self, b, self.step + 1, follows=True, written=done[b.index].next_written)
                flight.to(OPEN)
                following[b.index] = flight
        for flight in done.values():
            flight.wait_sent()  # when step() returns this rank may leave: its neighbors have what they need
        self.flights, self.step, self.skip = following, None, 0.0

    def end(self) -> None:
        """Ends a step in which there is nothing to send and nothing to combine."""
        for flight in self.flights.values():
            flight.close()
        self.flights, self.step, self.skip = {}, None, 0.0

    def check_whole(self) -> None:
        """Raises RuntimeError if an earlier attempt at the present step failed, see `Flight.to`."""
        for flight in self.flights.values():
            if flight.failure:
                flight.to(DONE)

    # -- between steps -----------------------------------------------------------------------------------------------

    def _check_unchanged(self) -> None:
        """Raises RuntimeError if a parameter was changed while its message was in flight."""
        if self.message.is_x and self.flights and self.step is None:
            for b in self.buckets:
                for slot in b.slots:
                    slot.check_unchanged()

    def settle(self) -> None:
        """Waits for what was started for the next step, without using it. All ranks must call it.

        Afterwards x may be read and written, but must be restored before the next step.
        """
        if self.message.is_x and self.step is None:
            for flight in self.flights.values():
                flight.wait()

    def forget(self) -> None:
        """Ends what was started for the next step and drops it: that step exchanges anew. On all ranks.

        Raises RuntimeError if an attempt at a step failed, for nothing can be dropped then.
        """
        self.check_whole()
        if self.step is None:
            for b in self.buckets:
                if b.index in self.flights:
                    self.flights[b.index].drop()
            self.flights = {}

    # -- what a flight asks ------------------------------------------------------------------------------------------

    def flight(self, b: Bucket) -> Flight:
        """A bucket's flight in the present step."""
        if b.index not in self.flights:
            assert self.step is not None
            self.flights[b.index] = Flight(self, b, self.step)
        return self.flights[b.index]

    def peers(self, step: int) -> Peers:
        if not self.gossips:
            return NOBODY
        exactly = self.topology.n > 2 and self.topology.averages_exactly(step)
        return EVERYBODY if exactly else self.topology.peers(self.place.workers.rank, step)

    def passes_of(self, b: Bucket) -> Passes:
        return self.passes[b.group][b.x.device, b.x.dtype]

    def sends_as_it_lies(self, b: Bucket) -> bool:
        """Whether the message is a buffer that is there already."""
        return self.message.is_x and self.message_dtype in (None, b.x.dtype)

    def next_message(self, flight: Flight) -> tuple[torch.Tensor, ...]:
        """Where the next step's message goes, if that is the new x in another type: the pass that computes x writes
        it."""
        b = flight.b
        if not (self._follows and self.message.is_x) or self.sends_as_it_lies(b):
            return ()
        peers = self.peers(flight.step + 1)
        due = peers is not EVERYBODY and (peers.sources or peers.destinations)
        return (b.messages[0],) if due else ()

    def before(self, b: Bucket) -> list[tuple[Layer, dict[str, Any], Scalar]]:
        """The layers that see a bucket's gradient before the rule, its group, and the gradient's scale."""
        return [(layer, self._groups[b.group], self._scales[b.group]) for layer in self._before]

    def after(self, b: Bucket) -> list[tuple[Layer, dict[str, Any]]]:
        """The layers that see a bucket's parameters after the rule."""
        return [(layer, self._groups[b.group]) for layer in self._after]

    def buffers(self, b: Bucket) -> Mapping[str, torch.Tensor]:
        """A bucket's flat buffers that make up the optimizer's state, by name."""
        named = dict(zip(self.rule.state, b.state, strict=True)) | b.extra
        return named if b.low is None else {**named, "master": b.x}
