"""The data flow of one step: gradients -> messages -> neighbors -> combined parameters, bucket by bucket.

    begin(step)    scalars and peers of the step are fixed
    send_next()    the next bucket in line: pack, send           (in the backward pass when overlapped, else in step())
                   where gradients are averaged first (over all, or inside a machine), that is started here, and
                   between machines the bucket before it is sent
    complete()     the rest is sent; then bucket by bucket: wait -> combine -> parameters
                   and for the next step: receives are posted (atc), or x itself is sent (awc)

What is sent, to whom and in which order depends on the layout and the step alone, never on what one rank happens to
have (a missing gradient, an overflow): otherwise its neighbors would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch

from ..comm import other_averagers as wrapped
from ..comm.group import Group
from ..comm.place import Machine
from ..comm.transfer import Averaging, Lane, Transfer, average, connect, foreseen
from ..kernels import passes as backend
from ..rules.averaging import send_sent
from ..rules.rule import Rule, send_parameter
from ..rules.scalars import Scalar, Scalars
from ..topology.topology import Peers, Topology
from . import buckets as flat
from .buckets import Bucket
from .trace import begun, named

NOBODY = Peers((), (), ())
EVERYBODY = Peers((-1,), (1.0,), ())  # one "neighbor", the workers' mean, by all-reduce


class Flight:
    """One bucket's exchange of one step."""

    def __init__(self, peers: Peers, received: torch.Tensor, transfer: Transfer | Averaging | None = None):
        self.peers, self.received, self.transfer = peers, received, transfer
        self.message: torch.Tensor | None = None  # [messages, N], once it is sent
        self.active: list[bool] = []  # which parameters take a local step
        self.span: AbstractContextManager | None = None  # in a profiler's trace, from sent to received

    def wait_received(self) -> None:
        if self.transfer is not None:
            self.transfer.wait_received()
        if self.span is not None:
            self.span.__exit__(None, None, None)
            self.span = None

    def wait_sent(self) -> None:
        if self.transfer is not None:
            self.transfer.wait_sent()


class Engine:
    """Flat buffers, passes and flights of all parameter groups. `exchange=None`: one worker, nothing is sent.

    `ahead=True` starts the next step's exchange at the end of this one. With a `machine` the exchange is between
    machines, and every rank carries its shard of the message. `mixing=True`: x is stepped by somebody else and only
    averaged here, gradients are used by a machine alone.
    """

    def __init__(
        self,
        rule: Rule,
        topology: Topology,
        exchange: Group | None,
        machine: Machine | None = None,
        inside: Group | None = None,
        fused: bool | None = None,
        message_dtype: torch.dtype | None = None,
        bucket_mb: float | None = None,
        ahead: bool = True,
        mixing: bool = False,
    ):
        self.rule, self.topology, self.exchange, self.machine = rule, topology, exchange, machine
        self.fused, self.message_dtype, self.ahead = fused, message_dtype, ahead
        self.bucket_bytes = None if bucket_mb is None else max(1, int(bucket_mb * 2**20))
        self.mixing = mixing
        self.inside = inside  # ranks that share a worker's parameters: of its machine, or with its shards
        self.averages_gradient = rule.average == "gradient"
        self.snapshots = rule.send is send_sent  # x is stepped while it is sent: what is sent is a copy
        self.awc = self.snapshots or rule.send is send_parameter
        self.buckets: list[Bucket] = []  # in the one order in which every rank exchanges them
        # Per group, for it has scalars of its own: passes by device and type of the master values.
        self.passes: list[dict[tuple[torch.device, torch.dtype], backend.Blocked]] = []
        self.lanes: dict[torch.device, Lane] = {}
        # Layers around the rule: called once per step and bucket, when its gradient is what the rule will see, and when
        # its parameters are what the rule made of them.
        self.before: Callable[[Bucket, list[bool]], None] | None = None
        self.after: Callable[[Bucket], None] | None = None
        self.prepared: set[int] = set()
        self.unwatched = True  # the first step is still to come
        self.step: int | None = None  # the step that has begun
        self.skip = False  # nobody takes a local step in it: all agree that a gradient overflowed
        # The same as a number on the device, which the passes read: with one worker nothing is to be agreed on, and the
        # host need not know.
        self.skipping: Scalar = 0.0
        self.sent = 0  # buckets in line for which it has begun
        self.posted = 0  # those whose message has left
        # Gradients are averaged over these ranks first: all of them, a machine's, or none but this one.
        self.averager = exchange if self.averages_gradient else None
        if machine is not None and machine.averages:
            self.averager = machine.inside
        self.averages: dict[int, tuple[Averaging, list[bool]]] = {}  # by bucket, with what had gradients here
        self.flights: dict[int, Flight] = {}  # by bucket, of this step
        self.next_flights: dict[int, Flight] = {}  # started early, for the next one

    def add_group(self, params: Iterable[torch.Tensor]) -> list[Bucket]:
        """Moves the parameters into flat buffers. Same parameters in the same order on every rank."""
        group = len(self.passes)
        shards = 1 if self.machine is None else self.machine.size
        gradients = not self.mixing or self.averager is not None
        new = flat.build(params, self._full, len(self.buckets), group, shards, gradients)
        lonely = self.exchange is None or self.averages_gradient
        degree = 0 if lonely else self.topology.most_messages
        for b in new:
            b.watched = self.awc
            b.allocate(len(self.rule.state), self.rule.messages, degree, self.message_dtype, self._sends_x(b))
            if b.x.device not in self.lanes:
                self.lanes[b.x.device] = Lane(b.x.device, sends=not self.silent)
                if degree:
                    connect(self.exchange, self.topology, b.x.device)  # type: ignore[arg-type]
        self.buckets += new
        kinds = {(b.x.device, b.x.dtype) for b in new}
        elements = {kind: sum(b.N for b in new if (b.x.device, b.x.dtype) == kind) for kind in kinds}
        self.passes.append({kind: backend.choose(self.rule, *kind, elements[kind], self.fused) for kind in kinds})
        for kind, passes in self.passes[-1].items():
            self._warm(next(b for b in new if (b.x.device, b.x.dtype) == kind), passes)
        return new

    def _warm(self, b: Bucket, passes: backend.Blocked) -> None:
        """Has kernels built now that steps will launch, for else they are built in mid-training, in a hook.

        But for those that read whether a step is skipped: one worker's first step with a loss scaler builds them.
        """
        peers = [self._peers(step) for step in foreseen(self.topology)]
        degrees = sorted({len(p.sources) for p in peers})
        low = () if b.low is None else (b.low,)
        for copies in (low, (b.messages[0], *low)) if self.awc and len(b.messages) else (low,):
            passes.warm(b.x, b.g, b.state, b.messages, b.received, degrees, copies)
        if EVERYBODY in peers and b.messages.dtype != b.x.dtype:  # exact steps send the full precision
            full = (b.x,) * self.rule.messages
            passes.warm(b.x, b.g, b.state, full, (full,), (1,), low)

    @property
    def silent(self) -> bool:
        """Whether nothing is ever sent: one worker, with gradients of its own."""
        return self.exchange is None and self.averager is None

    def buffers(self, b: Bucket) -> dict[str, torch.Tensor]:
        """A bucket's flat buffers that make up the optimizer's state, by name."""
        named = dict(zip(self.rule.state, b.state, strict=True)) | b.slow
        return named if b.low is None else {**named, "master": b.x}

    def start_equal(self, new: Iterable[Bucket]) -> None:
        """Gives every worker rank 0's parameters. All ranks must call it for the same buckets."""
        for b in new:
            for exchange in (self.inside if self.machine is not None else None, self.exchange):
                if exchange is not None:
                    exchange.broadcast(b.x)
            b.publish()

    def _full(self, total: int) -> int:
        """Bytes from which a bucket is full.

        By default a twelfth of the parameters, between 1 and 32 MiB: small enough that little is left to send when the
        backward pass ends, large enough that latency does not count. Where x itself is sent, a quarter, between 8 and
        32 MiB: there is no backward pass to keep up with, only the next bucket's pass, and one costs 60 us of Python.
        Where nothing is sent, all of them: one pass.
        """
        if self.bucket_bytes is not None:
            return self.bucket_bytes
        if self.silent:
            return total
        share, least = (4, 8 << 20) if self.awc else (12, 1 << 20)
        return min(max(total // share, least), 32 << 20)

    def begin(self, step: int, scalars: Sequence[Scalars]) -> None:
        """Fixes the step's scalars, one entry per group without the weights."""
        for b in self.buckets:
            b.absorb()  # before a message is packed from it, in the backward pass or in step()
        weights = self._peers(step).weights
        for passes, s in zip(self.passes, scalars, strict=True):
            for one in passes.values():
                one.set(s._replace(weights=weights, skip=self.skipping))
        self.step, self.sent, self.posted, self.prepared = step, 0, 0, set()
        self.flights, self.next_flights = self.next_flights, {}

    def send_next(self) -> None:
        """Sends the next bucket in line; between machines, the one before it, whose average is there by now."""
        self.start_average(self.buckets[self.sent])
        self.sent += 1
        self._post_until(self.sent if self.machine is None or self.awc else self.sent - 1)

    def post_all(self) -> None:
        """Sends every message that has not left, where none depends on a gradient."""
        self._post_until(len(self.buckets))

    def _post_until(self, count: int) -> None:
        assert self.step is not None
        while self.posted < count:
            b = self.buckets[self.posted]
            self.posted += 1
            if b.index not in self.flights:
                self.flights[b.index] = self._open(b, self.step)
            if self.flights[b.index].message is None:
                self._snapshot(b)
                self._send(b, self.flights[b.index], self.step)

    def start_average(self, b: Bucket) -> None:
        """Starts averaging a bucket's gradient, where gradients are averaged, once per step."""
        if self.averager is not None and b.index not in self.averages and not self.skip:
            active = b.active()
            with self.lanes[b.x.device].outbound(b.streams):
                b.raise_flags(active)
                self.averages[b.index] = Averaging(self.averager, b.g, self.step), active

    def active(self, b: Bucket) -> list[bool]:
        """Which of a bucket's parameters take a local step: those with a gradient, here or where it is averaged."""
        if self.skip:
            return [False] * len(b.slots)
        if self.averager is None:
            return b.active()
        self.start_average(b)
        average, active = self.averages[b.index]
        if not average.done:
            average.wait_received()
            self.averages[b.index] = average, b.lower_flags(active)
        return self.averages[b.index][1]

    def complete(self) -> None:
        """Sends what is left, then waits for and combines every bucket."""
        assert self.step is not None
        while self.sent < len(self.buckets):
            self.send_next()
        self._post_until(len(self.buckets))
        for b in self.buckets:
            follows = self.ahead and self.exchange is not None and not self.averages_gradient
            written = self._finish(b, self.flights[b.index], follows)
            if follows:
                flight = self._open(b, self.step + 1)
                if self.awc:
                    self._send(b, flight, self.step + 1, written)
                self.next_flights[b.index] = flight
        for flight in self.flights.values():
            flight.wait_sent()  # when step() returns this rank may leave: its neighbors have what they need
        self.flights, self.averages, self.step, self.skip, self.skipping = {}, {}, None, False, 0.0

    def refresh(self) -> None:
        """At the start of a step: parameters and gradients are where they should be, or come there.

        Raises RuntimeError if a parameter was moved, changed while its message was in flight, or, in the first step,
        if the model was wrapped in DDP since.
        """
        for b in self.buckets:
            b.refresh()
        self.check_unchanged()
        if self.unwatched and self.exchange is not None:
            self.unwatched = False
            ddp = wrapped.ddp_ranks(slot.p for b in self.buckets for slot in b.slots)
            wrapped.refuse_ddp(ddp, self.exchange.ranks, self.exchange.ranks[self.exchange.rank])

    def sum_inside(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a number over the ranks that share this worker's parameters."""
        if self.inside is None:
            return value
        total = value.clone()
        average(self.inside, total)
        return total * self.inside.size

    def sum_over_shards(self, value: torch.Tensor) -> torch.Tensor:
        """A number over the whole model from a number over what this rank holds of it."""
        return value if self.machine is not None else self.sum_inside(value)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a parameter was changed while its message was in flight."""
        if not (self.awc and self.next_flights):
            return
        for b in self.buckets:
            for slot in b.slots:
                if slot.p._version != slot.published_at:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(slot.p.shape)} was changed since the last step, while it was"
                        " being sent (schedule='awc'). Call optimizer.synchronize() on all ranks before changing"
                        " parameters, for instance before model.load_state_dict()."
                    )

    def settle(self) -> None:
        """Waits for what was started for the next step, without using it. All ranks must call it.

        Afterwards x may be read and written, but must be restored before the next step.
        """
        if self.awc:
            for flight in self.next_flights.values():
                flight.wait_received()
                flight.wait_sent()

    def forget(self) -> None:
        """Ends what was started for the next step and drops it: that step exchanges anew. On all ranks."""
        for b in self.buckets:
            flight = self.next_flights.get(b.index)
            if flight is None:
                continue
            if flight.message is None and isinstance(flight.transfer, Transfer):
                # Receives are posted and cannot be taken back: they would take the next message for theirs.
                flight.transfer.send(self._part(b.messages))
            flight.wait_received()
            flight.wait_sent()
        self.next_flights = {}

    def _peers(self, step: int) -> Peers:
        if self.exchange is None or self.averages_gradient:
            return NOBODY
        return EVERYBODY if self._averages(step) else self.topology.peers(self.exchange.rank, step)

    def _averages(self, step: int) -> bool:
        return self.topology.n > 2 and self.topology.averages_exactly(step)

    def _sends_x(self, b: Bucket) -> bool:
        return self.awc and self.message_dtype in (None, b.x.dtype)

    def _open(self, b: Bucket, step: int) -> Flight:
        """A bucket's flight with its receives posted."""
        peers = self._peers(step)
        if peers is EVERYBODY or not (peers.sources or peers.destinations):
            return Flight(peers, b.received)
        assert self.exchange is not None
        rows = [self._part(b.received[k]) for k in range(len(peers.sources))]
        return Flight(peers, b.received, Transfer(self.exchange, rows, peers, step, b.index))

    def _part(self, buffer: torch.Tensor) -> torch.Tensor:
        """What this rank carries of a message: all of it, or its shard among the ranks of its machine."""
        return buffer if self.machine is None else self.machine.shard(buffer)

    def _send(self, b: Bucket, flight: Flight, step: int, written: bool = False) -> None:
        """Packs a message, unless it is written already, and sends it."""
        flight.message, peers = b.messages, flight.peers
        if self.exchange is None or not (peers.sources or peers.destinations):
            return
        with self.lanes[b.x.device].outbound(b.streams):
            if not self.awc:  # where x is sent, gradients may come later
                flight.active = self.active(b)
                self._prepare(b, flight.active)
            if self._sends_x(b):
                flight.message = (b.state[0] if self.snapshots else b.x).view(1, -1)
            else:
                if peers is EVERYBODY and b.messages.dtype != b.x.dtype:
                    # A mean of rounded messages would move the workers' mean: exact steps send the full precision.
                    flight.message = b.x.new_empty(b.messages.shape)
                if not written:
                    self._pack(b, flight, step)
            flight.span = begun("exchange", b.index, step)
            with named("send", b.index, step):
                if peers is EVERYBODY:
                    flight.received = flight.message[None].clone()
                    flight.transfer = Averaging(self.exchange, self._part(flight.received), step)
                else:
                    assert isinstance(flight.transfer, Transfer)
                    flight.transfer.send(self._part(flight.message))

    def _pack(self, b: Bucket, flight: Flight, step: int) -> None:
        assert flight.message is not None
        with named("pack", b.index, step):
            for span, active in [(slice(0, b.N), True)] if self.awc else b.runs(flight.active):
                if not active:
                    b.g[span].zero_()
                state, message = tuple(t[span] for t in b.state), flight.message[:, span]
                self._passes(b).pack(b.x[span], b.g[span], state, message)
                if not active:  # no local step: what it sends in the place of the parameters is the parameters
                    message[0].copy_(b.x[span])

    def _finish(self, b: Bucket, flight: Flight, follows: bool) -> bool:
        """Waits for a bucket's messages and combines them. `follows`: the next exchange starts right after it.

        Returns whether the next message is written.
        """
        lane = self.lanes[b.x.device]
        with lane.outbound(b.streams):
            with named("wait", b.index, self.step):
                flight.wait_received()
                if self.awc:
                    flight.wait_sent()  # x is read by the transport until then, or the next message takes its place
            flight.active = [True] * len(b.slots) if self.mixing else flight.active or self.active(b)
            if self.machine is not None:
                for k in range(len(flight.peers.sources)):
                    self.machine.gather(flight.received[k], self.step or 0)
        lane.join()
        if self.mixing and not flight.peers.sources:  # a local step: x is as it was left
            self._snapshot(b)
            b.publish()
            return False
        self._prepare(b, flight.active)
        message = self._next_message(b) if follows else ()
        copies = (*message, *(() if b.low is None else (b.low,)))  # of the new x, in types of their own
        with named("combine", b.index, self.step):
            for span, now in b.runs(flight.active):
                # SlowMo may change x once more: then they are written when it has.
                here = () if self.after is not None else tuple(c[span] for c in copies)
                if now:
                    state = tuple(t[span] for t in b.state)
                    received = flight.received[: len(flight.peers.sources), :, span]
                    self._passes(b).combine(b.x[span], b.g[span], state, received, here)
                else:
                    if flight.peers.sources:
                        self._mix_only(b, span, flight)
                    for c in here:
                        c.copy_(b.x[span])
            if self.after is not None:
                self.after(b)
                for c in copies:
                    c.copy_(b.x)
            b.publish(low=False)
        return bool(message)

    def _next_message(self, b: Bucket) -> tuple[torch.Tensor, ...]:
        """Where the next step's message goes that is the new x in another type: the pass that computes x writes it."""
        assert self.step is not None
        peers = self._peers(self.step + 1)
        due = self.awc and not self._sends_x(b) and peers is not EVERYBODY and (peers.sources or peers.destinations)
        return (b.messages[0],) if due else ()

    def _prepare(self, b: Bucket, active: list[bool]) -> None:
        if self.before is not None and b.index not in self.prepared:
            self.prepared.add(b.index)
            self.before(b, active)

    def _snapshot(self, b: Bucket) -> None:
        if self.snapshots:
            b.state[0].copy_(b.x)

    def _mix_only(self, b: Bucket, span: slice, flight: Flight) -> None:
        """A parameter without a gradient: averaged, and nothing else."""
        assert flight.message is not None
        x, q = b.x[span], flight.message[0, span].to(b.x.dtype, copy=True)
        for k, w in enumerate(flight.peers.weights):
            x.add_(flight.received[k, 0, span].to(x.dtype) - q, alpha=w)

    def _passes(self, b: Bucket) -> backend.Blocked:
        return self.passes[b.group][b.x.device, b.x.dtype]
