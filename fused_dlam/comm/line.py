"""One neighbor's end of a mailbox: a thread that listens to it, one that reads, and one that sends what is to be sent.

A message is a head, five float64, and a body of a fixed length:

    MESSAGE   number, step, mass, which    a body follows, on a tag of its own
    STATE     round, inside, closing       where the sender stands in what all do together, see post.py
    ASK       -                            to be answered, by the thread that listens, whatever the script does
    ANSWER    -
    BYE       -                            the last head on this line. Whoever hears it says it, too
    HEARD     -                            that the sender had withdrawn from a round has been read

gloo moves nothing before a receive is posted, so one is always posted for the next head and one for the next body.
Messages of one line come in the order in which they were sent. Threads hold a line and its post, not the mailbox: that
is collected while they wait, and takes its leave then.

Heads are listened for while a body is read: the body of a neighbor that dies meanwhile is waited for in vain, and so is
what was being sent to it (breaks.py tells why). Those threads are left behind.
"""

from __future__ import annotations

import queue
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from .errors import kind_of

if TYPE_CHECKING:
    from .post import Post

MESSAGE, STATE, ASK, ANSWER, BYE, HEARD = range(6)
HEAD, BODY = 1, 2  # tags
SOON = 0.5  # seconds in which a body is read that has come
FOREVER = timedelta(days=365)  # a wait of gloo's that runs out closes all connections of its group


class Head(NamedTuple):
    kind: int
    number: int = 0  # of a message on this line, from 1; of a STATE its round
    step: int = 0  # of the sender; of a STATE whether it is inside
    mass: float = 0.0
    which: int = 0  # what kind of message, for who reads them; of a STATE whether the sender closes


class Slot:
    """The place of one message, in host memory, until it has been sent."""

    def __init__(self, values: torch.Tensor, which: int = 0):
        self.values, self.which, self.full = values, which, False
        self.step, self.mass = 0, 0.0
        self.copied: Any = None  # an event of a GPU: the values are there after it


class Line:
    """The threads of one neighbor, and what is known of it.

    Args:
        peer: its number among the ranks.
        place: its number in torch's group.
        bodies: two places for its messages, of which one is being received while the other can be read; none where no
            messages come from it. Heads go both ways.
    """

    def __init__(self, post: Post, peer: int, place: int, bodies: list[torch.Tensor]):
        self.post, self.peer, self.place, self._bodies = post, peer, place, bodies
        self.lost = ""  # why it is, if it is
        self.left = False  # whether it has closed its mailbox after all had come to that
        self.round, self.inside, self.closing = 0, False, False  # where it stands
        self.came = 0  # the largest round that it has entered, if only to give up
        self.unheard = False  # whether it may not know yet that this rank has withdrawn from a round
        self.step, self.arrived = -1, time.monotonic()  # of its last message; of none the step is -1
        self.heard = time.monotonic()  # when its last head came
        self.asked: float | None = None  # since when it has not answered
        self.number = 0  # messages sent
        self._head, self._said = torch.zeros(2, len(Head._fields), dtype=torch.float64)  # that comes, that goes
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        self._in: queue.SimpleQueue = queue.SimpleQueue()  # heads, whose bodies may not be there yet
        self._read_all = threading.Event()
        self._queued: set[int] = set()  # questions and answers that are in there: one of each says it all
        self.threads = [
            threading.Thread(target=work, daemon=True, name=f"fused_dlam-mailbox-{name}-{peer}")
            for work, name in ((self._listen, "from"), (self._read, "read"), (self._send, "to"))
        ]

    @property
    def gone(self) -> bool:
        return bool(self.lost) or self.left

    @property
    def silent(self) -> bool:
        """Whether it was given up though its connection is open: what comes of it all the same does not count."""
        return "silent" in self.lost

    # -- to the peer -----------------------------------------------------------------------------------------------

    def put(self, slot: Slot) -> None:
        """Sends what is in a slot. It was not full, and is now."""
        slot.full = True
        self._out.put(slot)

    def tell(self, state: Head) -> None:
        """Sends where this rank stands, behind what was put here before: what is in flight decides what it means."""
        self._out.put(state)

    def say(self, kind: int) -> None:
        """Sends a head that says all by its kind. Calling this within a collection of garbage is safe for a BYE."""
        if kind != BYE:
            with self.post.changed:
                if kind in self._queued:
                    return
                self._queued.add(kind)
        self._out.put(Head(kind))

    def _send(self) -> None:
        try:
            while True:
                thing = self._out.get()
                if isinstance(thing, Slot):
                    self._send_message(thing)
                    continue
                with self.post.changed:
                    self._queued.discard(thing.kind)
                self._hand_over(thing)
                if thing.kind == BYE:
                    return
        except Exception as error:  # noqa: BLE001 -- whatever it is, this peer is not to be reached
            self._fail(error)
        finally:
            self.post.ended()

    def _send_message(self, slot: Slot) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()
        self.number += 1
        self._hand_over(Head(MESSAGE, self.number, slot.step, slot.mass, slot.which), slot.values)
        with self.post.changed:
            slot.full = False
            self.post.changed.notify_all()

    def _hand_over(self, head: Head, body: torch.Tensor | None = None) -> None:
        """Returns when the peer has begun to take it: what it needs of it is on its way."""
        self._said.copy_(torch.tensor(head, dtype=torch.float64))
        works = [self.post.transport.send([self._said], self.place, HEAD)]
        if body is not None:
            works.append(self.post.transport.send([body], self.place, BODY))
        for work in works:
            work.wait(FOREVER)

    # -- from the peer ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            heads = self._receive(self._head, HEAD)
            while True:
                heads.wait(FOREVER)
                head = Head(*self._head.tolist())
                if head.kind != BYE:
                    heads = self._receive(self._head, HEAD)
                with self.post.changed:
                    self.heard, self.asked = time.monotonic(), None
                if head.kind == ASK:
                    self.say(ANSWER)
                elif head.kind != ANSWER:
                    self._in.put(head)
                if head.kind == BYE:
                    return
        except Exception as error:  # noqa: BLE001
            self._in.put(None)
            self._read_all.wait(SOON)  # what has come before it counts
            self._fail(error)
        finally:
            self.post.ended()

    def _read(self) -> None:
        try:
            bodies = self._receive(self._bodies[0], BODY) if self._bodies else None
            while (head := self._in.get()) is not None:
                if head.kind == MESSAGE:
                    assert bodies is not None
                    bodies.wait(FOREVER)
                    self._bodies.reverse()  # what came is the last one now
                    self.post.reader.came(self, head, self._bodies[1])
                    try:
                        bodies = self._receive(self._bodies[0], BODY)
                    finally:  # where the connection has closed, too
                        self.post.reader.read(self, head, self._bodies[1])
                        self._note(head)
                else:
                    self._note(head)
                if head.kind == BYE:
                    return
        except Exception as error:  # noqa: BLE001
            self._fail(error)
        finally:
            self._read_all.set()
            self.post.ended()

    def _receive(self, memory: torch.Tensor, tag: int) -> dist.Work:
        return self.post.transport.recv([memory], self.place, tag)

    def _note(self, head: Head) -> None:
        """After what the head announces is done: who sees its step, or its round, sees the messages before it."""
        withdrew = False
        with self.post.changed:
            if head.kind == MESSAGE and not self.silent:  # else nobody has got it
                self.step, self.arrived = int(head.step), time.monotonic()
            elif head.kind == HEARD:
                self.unheard = False
            elif head.kind == STATE:
                withdrew = head.number < self.round
                self.round, self.inside, self.closing = int(head.number), bool(head.step), bool(head.which)
                self.came = max(self.came, self.round)
            self.post.changed.notify_all()
        if withdrew:
            self.say(HEARD)  # behind where this rank stands, if it has entered that round
        if head.kind == BYE:
            self.post.lose(self, "has left")

    def _fail(self, error: BaseException) -> None:
        text = (str(error).splitlines() or [""])[0]
        closed = kind_of(text) == "closed"
        self.post.lose(self, "closed its connection" if closed else f"cannot be reached: {error!r}"[:200])
