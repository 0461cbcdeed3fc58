"""One bucket's way through one step, told in order. The engine says how far a flight may go; it stops there.

OPEN        receives are posted; a message that may leave early has left
AVERAGING   gradients that are averaged first (over all workers, or inside a machine) are on their way
SENT        the message has left
DONE        the neighbors' messages are combined into the parameters

A message that left in the backward pass can turn out not to be what this step sends. Then its sender recalls it, in the
step's last message, which leaves in step() and never before: `again` sends and receives anew.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from ..comm.transfer import Mean, Transfer
from ..rules.scalars import Scalar
from ..topology import Peers
from .buckets import Bucket
from .compressed import Compressed
from .header import Header
from .message import Message
from .observed import Observed
from .spikes import Shortened
from .stepless import average
from .trace import begun, named

if TYPE_CHECKING:
    from .engine import Engine

OPEN, AVERAGING, SENT, DONE = range(1, 5)
NOBODY = Peers((), (), ())
EVERYBODY = Peers((-1,), (1.0,), ())  # one "neighbor", the workers' mean, by all-reduce


class Flight:
    """A bucket's step; `to(stage)` takes it as far as that.

    Args:
        follows: whether this begins right at the end of the step before, with x as that left it.
        written: whether that step has written this one's message.
    """

    def __init__(self, engine: Engine, b: Bucket, step: int, follows: bool = False, written: bool = False):
        self.engine, self.b, self.step = engine, b, step
        self.follows, self.written = follows, written
        self.peers = engine.peers(step)
        self.talks = bool(self.peers.sources or self.peers.destinations)
        self.received = b.received  # [d, messages, N]
        self.message: torch.Tensor | None = None  # [messages, N], once it is sent
        self.transfer: Transfer | Mean | None = None
        self.average: Mean | None = None  # of the gradient
        self.next_written = False
        self.combined = False  # whether the rule has stepped the parameters
        self._active: list[bool] | None = None
        self._shortened: Shortened | None = None  # how the gradient is, once it is there
        self._prepared = self._arrived = False
        self.said: Header | None = None  # in the last bucket's message
        self._sent: Observed | None = None  # the parameters, if they are what is sent
        self._recalled = False  # of the last bucket: whether another rank of the average averages others anew
        self._span: AbstractContextManager | None = None  # in a profiler's trace, from sent to received
        self.stage, self._way = 0, self._fly()
        self.failure = ""  # what went wrong on the way

    def to(self, stage: int) -> None:
        """Raises RuntimeError if an earlier attempt at this step failed, after which peers are out of step."""
        while self.stage < stage:
            if self.failure:
                raise RuntimeError(
                    f"an earlier attempt at step {self.step} failed ({self.failure}), and this rank cannot tell what"
                    " its peers have taken from it: restart all ranks from a checkpoint"
                )
            try:
                self.stage = next(self._way, DONE)
            except BaseException as error:
                if self.engine.silent:  # nothing was sent: the next attempt goes this way again
                    self.stage, self._way = 0, self._fly()
                else:
                    self.failure = f"{type(error).__name__}: {error}"
                raise

    def close(self) -> None:
        """Goes no further. A generator refers to its flight: without this both live until the garbage collector."""
        self._way.close()

    def _fly(self) -> Generator[int, None, None]:
        e, b, peers, message = self.engine, self.b, self.peers, self.engine.message
        lane = e.lanes[b.x.device]

        if self.talks and peers is not EVERYBODY:
            rows = [e.place.part(b.landing[k]) for k in range(len(peers.sources))]
            self.transfer = Transfer(e.place.workers, rows, peers, self.step, b.index)
        if message is Message.COPY and not self.follows:
            b.absorb()
            b.state[0].copy_(b.x)  # not on the lane: the inner optimizer writes x next, on this stream
        if message.leaves_early and self.talks:
            if not self.follows:
                b.absorb()
            with lane.outbound(b.streams):
                self._send()
        if message is Message.PARAMETERS and self.follows and not e.anchored:
            self._sent = Observed(b, values=not b.x.is_cuda, gradients=False)
        yield OPEN  # from here on this step's gradient and scalars are there

        # Also in a skipped step, where another rank's may have left in the backward pass: all take part, none uses it.
        if self._averages and (e.guesses or not e.skipped):
            with lane.outbound(b.streams):
                self._start_average()
        yield AVERAGING

        if not message.leaves_early and self.talks:
            with lane.outbound(b.streams):
                if message is Message.PACKED:
                    self._prepare()
                self._send()
        yield SENT

        self.arrive()
        with lane.outbound(b.streams):
            self._decode()
            if not message.only_averages:
                self.active()
        lane.join()
        if message.only_averages and not peers.sources:  # a local step: x is as the inner optimizer left it
            if message is Message.COPY:
                b.state[0].copy_(b.x)
            b.publish()
            self.combined = True
            return
        self._prepare()
        with named("combine", b.index, self.step):
            self._combine()
            b.publish(low=False)

    # -- the gradient ------------------------------------------------------------------------------------------------

    def active(self) -> list[bool]:
        """Which of the bucket's parameters take a local step: those with a gradient, here or where it is averaged."""
        if self._active is None:
            self._active = self.b.active()
        if self.average is not None and not self.average.done:
            self.average.wait_received()
            if self.engine.guesses and self.engine.recallable and self.b is self.engine.buckets[-1]:
                self._recalled = float(self.b.g[self.b.recalled]) > 0
            self._active = self.b.lower_flags(self._active)
        return [False] * len(self.b.slots) if self.engine.skipped else self._active

    @property
    def factor(self) -> Scalar:
        """What the gradient is multiplied by because it is far longer than usual."""
        if not self.engine.local.clips:
            return 1.0
        if self._shortened is None:
            self._shortened = self.engine.local.shortened(self.b, self.active())
        return self._shortened.factor

    @property
    def averaged(self) -> bool:
        """Whether the gradient is there to be sent without a wait of the host."""
        return self.average is None or self.average.arrived

    @property
    def _averages(self) -> bool:
        return self.engine.averager.size > 1 and not self.engine.averages_inside

    def _start_average(self) -> None:
        e, b = self.engine, self.b
        self._active = b.active()
        if not b.anchored:
            b.set_aside(self._active, e.factor, e.guard)
        elif e.guard:
            b.g.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        b.raise_flags(self._active, e.recalls)
        self.average = e.averager.start_mean(b.g, self.step)

    def average_recalled(self) -> bool:
        """Of the last bucket: whether any rank that gradients are averaged with averages the others' anew."""
        self.active()
        return self._recalled

    def _prepare(self) -> None:
        """The layers' part, once: the gradient is final."""
        if self._prepared:
            return
        self._prepared = True
        if self.average is None and self.b.g is not self.b.grads and not self.b.anchored:
            # Nobody is left to average with, and the passes unscale by the loss scale that was common to all.
            self.b.set_aside(self.active(), self.engine.factor, finite=False)
        for layer, group, scale in self.engine.local.before(self.b):
            layer.before(self.b, self.active(), group, self.step, scale)

    # -- the message -------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        e, b = self.engine, self.b
        if e.sends_as_it_lies(b):
            self.message = (b.state[0] if e.message is Message.COPY else b.x).view(1, -1)
        else:
            self.message = b.messages
            if self.peers is EVERYBODY and b.messages.dtype != b.x.dtype:
                # A mean of rounded messages would move the workers' mean: exact steps send the full precision.
                self.message = b.x.new_empty(b.messages.shape)
            if not self.written:
                self._pack(self.message)
        self._span = begun("exchange", b.index, self.step)
        self._start_exchange()

    def _start_exchange(self) -> None:
        e, b = self.engine, self.b
        assert self.message is not None
        if b is e.buckets[-1]:
            if self.average is not None:  # the machine's ranks are one worker: what one recalls all do
                e.recalls = self.average_recalled()
            self.said = e.hearing.say(self.step)
            if self.coded is None:
                self.said.write(self.message[0, b.header])
        message = self.message
        if self.coded is not None:
            with named("encode", b.index, self.step):
                message = self.coded.encode(self.message, e.memory(self.step))
                if self.said is not None:
                    self.said.write(self.coded.headers)
        with named("send", b.index, self.step):
            if self.peers is EVERYBODY:
                self.received = self.message[None].clone()
                self.transfer = e.place.workers.start_mean(e.place.part(self.received), self.step)
            else:
                assert isinstance(self.transfer, Transfer)
                self.transfer.send(e.place.part(message))

    def _decode(self) -> None:
        """The neighbors' messages out of what they have sent."""
        if self.coded is not None:
            assert self.message is not None
            with named("decode", self.b.index, self.step):
                memory = self.engine.memory(self.step)
                self.coded.decode(self.message, self.received, len(self.peers.sources), memory)

    def headers(self, rows: Iterable[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What the neighbors' messages say of themselves, once they are there. rows: where they are, if not here."""
        place, b, here = self.engine.place, self.b, range(len(self.peers.sources))
        if rows is None:  # for the whole machine, or this rank's part of it
            rows = [self.received[k] if self.coded is None else place.part(b.landing[k]) for k in here]
        if self.coded is not None:
            return [self.coded.header(row) for row in rows]
        return [row.view(self.engine.rule.messages, -1)[0, b.header] for row in rows]

    @property
    def coded(self) -> Compressed | None:
        """What makes bytes of this message, and messages of the neighbors' bytes. An exact average is none."""
        return self.b.compressed if self.talks and self.peers is not EVERYBODY else None

    def _pack(self, message: torch.Tensor) -> None:
        e, b = self.engine, self.b
        with named("pack", b.index, self.step):
            whole = [(slice(0, b.N), True)]
            for span, now in e.local.runs(b, self.active(), self.factor) if e.message.needs_gradient else whole:
                if not now:
                    b.g[span].zero_()
                    b.absorb(span)
                e.local.pack(b, span, message)
                if not now:  # no local step: what it sends in the place of the parameters is the parameters
                    message[0, span].copy_(b.x[span])

    def wait(self) -> None:
        """Until the neighbors' messages are there; where x is sent, which the transport reads, until it has left."""
        if self.transfer is not None:
            self.transfer.wait_received()
        if self._span is not None:
            self._span.__exit__(None, None, None)
            self._span = None
        if self.transfer is not None and self.engine.message.is_x:
            self.transfer.wait_sent()

    def arrive(self) -> None:
        """Until the neighbors' messages are there, whole."""
        if self._arrived:
            return
        self._arrived = True
        with self.engine.lanes[self.b.x.device].outbound(self.b.streams):
            with named("wait", self.b.index, self.step):
                self.wait()
            for k in range(len(self.peers.sources)):
                self.engine.place.gather(self.received[k] if self.coded is None else self.b.landing[k], self.step)

    def wait_sent(self) -> None:
        if self.transfer is not None:
            self.transfer.wait_sent()

    def again(self, recalls: bool, sources: Collection[int]) -> None:
        """Exchanges anew what left too early.

        Args:
            recalls: whether this worker's own message is recalled: it is averaged, packed and sent once more.
            sources: the workers whose messages are.
        """
        e, b = self.engine, self.b
        self._arrived = self._arrived and not (recalls or sources)
        with e.lanes[b.x.device].outbound(b.streams):
            if recalls:
                self.wait_sent()
                self._active, self._prepared, self._shortened = None, False, None
                if self.average is not None:
                    self.average.wait_received()
                    self._start_average()
                if self.message is not None:
                    self._prepare()
                    self._pack(self.message)
            if self.peers is EVERYBODY and sources:
                self.wait()
            if isinstance(self.transfer, Transfer) and sources:
                self.transfer.receive_again([j for j in self.peers.sources if j in sources])
            if self.message is not None and (recalls or (self.peers is EVERYBODY and sources)):
                self._start_exchange()

    def leave_out(self) -> None:
        """Goes on without neighbors: what they send, and this sent, is left to others."""
        self.peers, self.talks, self.transfer = NOBODY, False, None

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a parameter was written while the transport reads it; on GPUs by version counters."""
        if self._sent is not None:
            changed = self._sent.changed(self.b, lambda slot: f"a parameter of shape {tuple(slot.p.shape)}")
            if changed:
                raise RuntimeError(
                    f"{changed} since the last step, while it was being sent (schedule='awc'). Call"
                    " optimizer.synchronize() on all ranks before changing parameters, for instance before"
                    " model.load_state_dict(), or use schedule='atc'."
                )

    def drop(self, begun: bool) -> None:
        """Ends the exchange without using it.

        begun: whether any rank has begun to average or to send for this step; then all do so for every bucket.
        """
        e = self.engine
        if begun and self._averages and self.average is None:
            self.average = e.averager.start_mean(self.b.g, self.step)
        if self.average is not None:
            self.average.wait_received()
        if self.message is None and isinstance(self.transfer, Transfer):
            # Receives are posted and cannot be taken back: they would take the next message for theirs.
            self.transfer.send(e.place.part(self.b.messages if self.coded is None else self.coded.sending))
        elif self.message is None and begun and self.peers is EVERYBODY:
            self.transfer = e.place.workers.start_mean(
                e.place.part(self.b.x.new_zeros(self.b.messages.shape)), self.step
            )
        self.wait()
        self.wait_sent()
        self.close()

    # -- the update --------------------------------------------------------------------------------------------------

    def _combine(self) -> None:
        e, b, d = self.engine, self.b, len(self.peers.sources)
        next_message = e.ahead.message(self)
        self.next_written = bool(next_message)
        copies = (*next_message, *(() if b.low is None else (b.low,)))  # of the new x, in types of their own
        after = e.local.after(b)
        here = () if after else copies  # a layer may change x once more: then they are written when it has
        active = [True] * len(b.slots) if e.message.only_averages else self.active()
        for span, now in e.local.runs(b, active, self.factor):
            out = tuple(c[span] for c in here)
            if now:
                e.local.combine(b, span, self.received[:d, :, span], out)
                continue
            b.absorb(span)
            if d or (e.gossips and e.rule.centered):
                average(e, self, span)
            for c in out:
                c.copy_(b.x[span])
        for slot, now in zip(b.slots, active, strict=True):
            slot.steps += now
        self.combined = True
        if self._shortened is not None:
            e.local.done(b, self._shortened.usual)
        for layer, group in after:
            layer.after(b, group, self.step, e.place.workers.finite_mean)
        for c in copies if after else ():
            c.copy_(b.x)
