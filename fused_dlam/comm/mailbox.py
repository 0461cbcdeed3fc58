"""`Mailbox`: messages to neighbors for which nobody waits. What came meanwhile is summed, with its mass."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..topology import TopologyLike
from .asynchronous import Asynchronous, check_seconds
from .errors import calling
from .inbox import Inbox, Message
from .letter import Values
from .line import Line, Slot


class Mailbox(Asynchronous):
    """One rank's end of messages for which nobody waits: asynchronous push-sum, and methods that put or get values.

        x, p = torch.randn(10), 1.0
        box = Mailbox(x, "one-peer-exponential")  # all ranks build it
        for step in range(1000):  # each rank at its own pace
            dx, dp = box.collect()
            x, p = x + dx, p + dp
            if p > 1e-9 and box.push(x, p, step=step):  # half of x and of p, to the next neighbor
                x, p = x / 2, p / 2  # who hears of nobody for long would halve away all that it has
        box.close()
        dx, dp = box.collect()
        mean = (x + dx) / (p + dp)  # all ranks' mean of x, up to how far they have mixed

    Mass is conserved exactly: what `push` was given is on its way and will be in the receiver's sum, or `push` returned
    False and nothing was done. Inside `drained()` and after `close()` p, with what `collect` returns, sums to the
    number of ranks, and x to what it was. (Push-sum: Kempe, Dobra and Gehrke, "Gossip-based computation of aggregate
    information", 2003; where ranks have paces of their own: Assran and Rabbat, "Asynchronous gradient push", 2021.)

    Args:
        like: a tensor, or a list of tensors of one type on one device: the form of all messages. float16, bfloat16,
            float32 or float64; 16-bit messages are summed in float32. CUDA tensors pass through pinned host memory.
        topology: who may send to whom at all: j to i if W[i, j] is not zero in any step of the period (of a topology
            without one, in its first steps). A name, a `Topology` or a function of n. Weights are not used.
        group: the process group, default: all ranks. Ranks here are numbers in it.
        timeout: seconds after which a silent rank is lost, and that building, `drained` and `close` may take.
        on_loss: "continue", or "raise": the next call after a loss raises `ExchangeError`, once for each.

    Memory: two receive buffers for each source, one slot for each destination, one sum. Three threads for each
    neighbor, over a gloo group of the mailbox's own, whatever the backend of `group` is. A rank that ends, or lets go
    of its mailbox, without `close` is lost for the others.

    Raises TypeError or ValueError for bad input, also on all ranks where theirs differ, and ExchangeError if a rank
    does not build it in time. Without a process group, and in one of one rank, nothing is ever pushed.
    """

    what = "mailbox"

    def __init__(
        self,
        like: torch.Tensor | Sequence[torch.Tensor],
        topology: TopologyLike,
        group: dist.ProcessGroup | None = None,
        timeout: float = 600.0,
        on_loss: str = "continue",
    ):
        super().__init__(like, topology, group, timeout, on_loss)
        self._slots = {j: Slot(self._letter.host()) for j in self.destinations}
        self._turn = 0

    def _reader(self) -> Inbox:
        self._inbox = Inbox(self._letter)
        return self._inbox

    def _busy(self) -> bool:
        return any(slot.full and not self._post.lines[j].gone for j, slot in self._slots.items())

    # -- sending -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    @calling("Mailbox.push()")
    def push(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        mass: float = 1.0,
        weight: float = 0.5,
        step: int = 0,
        to: int | None = None,
    ) -> bool:
        """Sends weight * x with the mass weight * mass, and returns True; or does nothing and returns False.

        It does nothing where the last message to this rank has not left yet (its slot is full), where the rank is lost
        or still within a `drained()` that this one has left, and where there is nobody to send to.

        Args:
            x: of the form that the mailbox was built for. It is copied: it may be changed at once.
            step: this rank's, which the receiver sees (`steps`, `latest`, `wait`).
            to: a destination; None: those that are not lost, in turn.

        Raises ValueError for a rank that the topology has no message to, another shape, or a number that is not finite;
        TypeError for another type or device; RuntimeError after `close()` and within `drained()`.
        """
        self._check()
        if self._post.inside:
            raise RuntimeError("push() within drained(), where nothing may be in flight: push after it")
        tensors = self._letter.given(x)
        mass, weight = _finite("mass", mass), _finite("weight", weight)
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an integer of at least 0, not {step!r}")
        if to is not None and (isinstance(to, bool) or to not in self._slots):
            raise ValueError(f"rank {to!r} is none that the topology has this rank send to: {list(self.destinations)}")
        line = self._next() if to is None else self._post.lines[to]
        if line is None or line.gone or self._slots[line.peer].full or self._post.held(line):
            return False
        slot = self._slots[line.peer]
        self._fill(slot, tensors, weight)
        slot.step, slot.mass = step, weight * mass
        line.put(slot)
        return True

    def _next(self) -> Line | None:
        """The next one in turn that is not lost."""
        for _ in self.destinations:
            line = self._post.lines[self.destinations[self._turn % len(self.destinations)]]
            self._turn += 1
            if not line.gone:
                return line
        return None

    def _fill(self, slot: Slot, tensors: list[torch.Tensor], weight: float) -> None:
        for t, place in zip(tensors, self._letter.parts(slot.values), strict=True):
            if t.is_cuda:
                place.copy_(t * weight, non_blocking=True)
            else:
                torch.mul(t, weight, out=place)
        if self._letter.device.type == "cuda":
            slot.copied = torch.cuda.current_stream(self._letter.device).record_event()

    # -- what came ---------------------------------------------------------------------------------------------------

    @calling("Mailbox.collect()")
    def collect(self) -> tuple[Values, float]:
        """(the sum of all that came since the last call, its mass), zeros and 0.0 if nothing did. Waits for nobody.

        In the form of `like`, float32 where that is of 16 bits. Works after `close()`, too.
        """
        self._check(closed=True)
        total, mass = self._inbox.take()
        if total is None:
            total = torch.zeros(self._letter.numbers, dtype=self._letter.wide)
        return self._letter.taken(total), mass

    @calling("Mailbox.latest()")
    def latest(self, source: int) -> Message | None:
        """The last message of a source, whether it was collected or not; None if none has come.

        Raises ValueError for a rank that is no source by the topology.
        """
        self._check(closed=True)
        if source not in self.sources:
            raise ValueError(f"rank {source!r} is none that the topology has send to this rank: {list(self.sources)}")
        with self._inbox.lock:
            if source not in self._inbox.last:
                return None
            head, values = self._inbox.last[source]
            values = values.clone()
        return Message(self._letter.taken(values), head.mass, int(head.step), self.age[source])

    @calling("Mailbox.wait()")
    def wait(self, at_least: int, step: int, deadline: float) -> set[int]:
        """Waits until messages of `at_least` sources have come that were sent at `step` or later: bounded staleness.

        Returns the sources of which that is so: fewer where `deadline` seconds went by, or too many are lost.

        Raises ValueError for more sources than the topology has.
        """
        self._check()
        if isinstance(at_least, bool) or not isinstance(at_least, int) or not 0 <= at_least <= len(self.sources):
            raise ValueError(f"at_least must be a number of sources, from 0 to {len(self.sources)}, not {at_least!r}")
        check_seconds("deadline", deadline, least=0.0)

        def reached() -> set[int]:
            return {j for j in self.sources if self._post.lines[j].step >= step}

        def there() -> bool:
            found = reached()
            return len(found) >= at_least or all(self._post.lines[j].gone for j in self.sources if j not in found)

        self._post.wait(there, deadline)
        self._check()
        return reached()

    @property
    def age(self) -> dict[int, float]:
        """Seconds since the last message of each source came, or since the mailbox was built."""
        now = time.monotonic()
        return {j: now - self._post.lines[j].arrived for j in self.sources}

    @property
    def steps(self) -> dict[int, int]:
        """The step of the last message of each source; -1 before the first."""
        return {j: self._post.lines[j].step for j in self.sources}


def _finite(name: str, value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return value
