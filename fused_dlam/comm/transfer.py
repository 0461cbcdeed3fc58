"""One bucket's message in flight: to neighbors and back (`Transfer`), or the mean over everybody (`Mean`).

streams.py tells who waits for whom where the tensors are on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..topology import Peers, Topology
from . import breaks
from .lookout import LOOK, Lookout, why
from .streams import Errand, host_like, to_host
from .unrecorded import unrecorded

if TYPE_CHECKING:
    from .group import Group


class Transfer:
    """Messages to and from the neighbors.

    The receives, one row for each source, are posted at once, for gloo moves nothing until they are; `send` posts the
    sends. Neither rows nor message may be touched before `wait_received` and `wait_sent`: nothing is copied. `tag` (a
    bucket's number) keeps messages of one pair apart on gloo, which would take any message for any other, of whatever
    length; NCCL has no tags.

    What cannot be posted raises when it is waited for: the receives of the next step are posted in advance, perhaps to
    a peer that has ended its training like this rank, and the next step never comes.
    """

    def __init__(
        self,
        group: Group,
        rows: Sequence[torch.Tensor],
        peers: Peers,
        step: int | None,
        tag: int = 0,
    ):
        self.group, self.peers, self.step, self._tag = group, peers, step, tag
        self._rows = list(rows)
        self._staged = group.stages and self.on_device(rows)
        self._host_rows = [host_like(row) for row in self._rows] if self._staged else self._rows
        self._to_copy = set(range(len(self._rows))) if self._staged else set()  # to the device, once they are there
        self._receives: list[tuple[int | None, dist.Work | _Unposted]] = []
        self._sends: list[tuple[int | None, dist.Work | _Unposted]] = []
        self._posting: Errand | None = None
        self._long = False  # whether what is sent is
        if group.backend != "nccl":
            self._receive(range(len(self._rows)))

    @staticmethod
    def on_device(tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the host has to copy before it can send."""
        return any(t.is_cuda for t in tensors)

    @property
    def readable(self) -> list[torch.Tensor] | None:
        """The received rows where the host reads them without waiting for a device, once `wait_delivered` returned.

        None over NCCL, which delivers to the device alone.
        """
        return None if self.group.backend == "nccl" else self._host_rows

    def send(self, message: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """Starts sending `message` to the destinations, or to each its own. Once it was sent (`wait_sent`), another one
        may follow.

        Over NCCL an exchange is a whole: sending again also receives again, on all ranks.
        """
        group, peers, ranks = self.group, self.peers, self.group.ranks
        each = [message] * len(peers.destinations) if isinstance(message, torch.Tensor) else message
        if group.backend == "nccl":
            # Unbatched P2P of a pair serializes and can deadlock on NCCL; a batch completes as a whole.
            ops = [dist.P2POp(dist.irecv, r, ranks[j], group.process_group)
                   for r, j in zip(self._rows, peers.sources, strict=True)]  # fmt: skip
            ops += [dist.P2POp(dist.isend, m, ranks[j], group.process_group)
                    for m, j in zip(each, peers.destinations, strict=True)]  # fmt: skip
            try:
                self._receives = [(None, work) for work in (dist.batch_isend_irecv(ops) if ops else [])]
            except RuntimeError as error:
                self._receives = [(None, _Unposted(error))]
        elif not (self._staged or (group.stages and self.on_device(each))):
            self._post(each)
        elif each:
            hosts = {id(m): host_like(m).copy_(m, non_blocking=True) for m in each}  # one message to all: one copy
            device = each[0].device
            copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            # The host must wait for the copy, but not this thread, which has the rest of the backward pass to launch.
            staged = [hosts[id(m)] for m in each]
            self._posting = group.courier.run(lambda: self._post(staged, copied))
        for m in each:
            group.count(m, 1)
            self._long |= breaks.is_long(m)

    def receive_again(self, sources: Sequence[int]) -> None:
        """Posts receives anew for these sources, into the same rows, for `wait_received` to wait for. Gloo only."""
        if self.group.backend == "nccl":
            raise RuntimeError("over NCCL an exchange is a whole: nothing is received by itself")
        again = [self.peers.sources.index(j) for j in sources]
        for k in again:
            if self._staged and k not in self._to_copy:
                # A copy of the old one may still be queued on the device: see streams.py.
                self._host_rows[k] = host_like(self._rows[k])
                self._to_copy.add(k)
        self._receive(again)

    def _receive(self, rows: Iterable[int]) -> None:
        group, transport = self.group, self.group.process_group
        for k in rows:
            j = self.peers.sources[k]
            work: dist.Work | _Unposted
            try:
                with unrecorded():
                    work = _work(dist.irecv(self._host_rows[k], group.ranks[j], transport, self._tag))
            except RuntimeError as error:
                work = _Unposted(error)
            group.expects(work)
            self._receives.append((j, work))

    def _post(self, messages: Sequence[torch.Tensor], copied: torch.cuda.Event | None = None) -> None:
        group, transport = self.group, self.group.process_group
        if copied is not None:
            copied.synchronize()
        for message, j in zip(messages, self.peers.destinations, strict=True):
            work: dist.Work | _Unposted
            try:
                with unrecorded():
                    work = _work(dist.isend(message, group.ranks[j], transport, self._tag))
            except RuntimeError as error:
                work = _Unposted(error)
            group.posted(work, j)
            self._sends.append((j, work))

    def take_receives(self) -> list[dist.Work | _Unposted]:
        """What is posted and not waited for. The caller waits for it from now on."""
        works, self._receives = [work for _, work in self._receives], []
        for work in works:
            self.group.taken(work)
        return works

    def take_sends(self) -> list[dist.Work | _Unposted]:
        """The same of what is sent."""
        works, self._sends = [work for _, work in self._sends], []
        for work in works:
            self.group.taken(work)
        return works

    @property
    def arrived(self) -> bool | None:
        """Whether all is there and has gone; None where only a wait tells, over gloo."""
        if self.group.backend != "nccl":
            return None if self._receives or self._sends or self._posting is not None else True
        return all(isinstance(work, _Unposted) or work.is_completed() for _, work in self._receives)

    def wait_delivered(self) -> None:
        """Until the transport has the neighbors' messages; where they pass through the host, they are there alone."""
        long = any(map(breaks.is_long, self._rows))
        for j, work in self._receives:
            with self.group.watched("waiting for a message from", self.step, j):
                self._wait(j, work, long)
                self.group.reach(self._rows[0].device if self._rows else self.group.device)
            self.group.taken(work)
        self._receives = []

    def wait_received(self) -> None:
        """Until the neighbors' messages are in `received` (on CUDA: as seen by the current stream)."""
        self.wait_delivered()
        for k in sorted(self._to_copy):
            self._rows[k].copy_(self._host_rows[k], non_blocking=True)
        self._to_copy = set()

    def wait_sent(self) -> None:
        """Until the message has been read by the transport."""
        if self._posting is not None:
            with self.group.watched("handing a message to the transport", self.step, counts=False):
                self._posting.wait(self.group.timeout)
            self._posting = None
        for j, work in self._sends:
            with self.group.watched("waiting to finish sending to", self.step, j):
                self._wait(j, work, self._long)
            self.group.taken(work)
        self._sends, self._long = [], False

    def _wait(self, j: int | None, work: dist.Work | _Unposted, long: bool) -> None:
        if long and j is not None and isinstance(work, dist.Work) and self.group.backend == "gloo":
            assert self.group.holdings is not None
            breaks.wait(self.group.holdings, self.group.ranks[j], work)
        else:
            work.wait()


class Mean:
    """The mean of a tensor over all workers, in place, bit-equal on all of them: an all-reduce in the background.

    16-bit values are divided before they are summed, as in DDP: a sum of n gradients overflows float16 where their mean
    does not. NCCL divides by itself, in the pass that sums.
    """

    def __init__(self, group: Group, tensor: torch.Tensor, step: int | None, over: dist.ProcessGroup | None = None):
        self.group, self.step, self._tensor = group, step, tensor
        transport = over or group.process_group
        self._host, op, self._over = tensor, dist.ReduceOp.SUM, group.size
        self._backend = group.backend if over is None else group.control_backend
        if self._backend == "nccl":
            op, self._over = dist.ReduceOp.AVG, 1
        elif tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.div_(group.size)
            self._over = 1
        if tensor.is_cuda and self._backend == "gloo":
            self._host = to_host(tensor)
        with group.watched("all-reduce", step):
            self._work: dist.Work | None = _work(dist.all_reduce(self._host, op, transport, async_op=True))
        group.posted(self._work)
        group.count_ring(tensor)

    @property
    def done(self) -> bool:
        """Whether it was waited for."""
        return self._work is None

    @property
    def arrived(self) -> bool:
        """Whether waiting for it would not hold up the host. Over NCCL a wait only orders streams."""
        return self._work is None or not self.group.host_waits or self._work.is_completed()

    def wait_received(self) -> None:
        if self._work is not None:
            with self.group.watched("all-reduce", self.step):
                if self._backend == "nccl":
                    self._work.wait()
                    self.group.reach(self._tensor.device)
                elif self.group.gone is not None:
                    self._wait_in_slices(self._work, self.group.gone)
                else:
                    self._work.wait()
            self.group.taken(self._work)
            self._work = None
            if self._over > 1:
                self._host.div_(self._over)
            if self._host is not self._tensor:
                self._tensor.copy_(self._host, non_blocking=True)

    def _wait_in_slices(self, work: dist.Work, gone: Lookout) -> None:
        """Of several all-reduces that are under way each may wait for a live rank, which waits in another one, in a
        circle. Where one has died no connection closes then: who gave up still holds its own, in the others.
        """
        start = time.monotonic()
        while True:
            try:
                work.wait(timedelta(seconds=LOOK))
                return
            except RuntimeError:
                if work.is_completed():  # after all, or it failed, which this raises
                    work.wait()
                    return
                if time.monotonic() > start + self.group.timeout:
                    raise
            reason = why(gone)
            if reason:
                raise RuntimeError(reason)

    def wait_sent(self) -> None:
        self.wait_received()


def connect(group: Group, topology: Topology, device: torch.device) -> None:
    """Has NCCL connect a device with its neighbors now: it does so at the first message, in mid-training otherwise.

    One number to every peer of a period. The first operation of a communicator must be everybody's.
    """
    if group.backend != "nccl":
        return
    sent = group.messages_sent, group.bytes_sent
    with group.placed() if device == group.device else torch.cuda.device(device):
        Mean(group, torch.zeros(1, device=device), None).wait_received()
        for step in foreseen(topology):
            if not topology.averages_exactly(step):
                peers = topology.peers(group.rank, step)
                rows = torch.zeros(len(peers.sources), 1, device=device)
                transfer = Transfer(group, list(rows), peers, step)
                transfer.send(torch.zeros(1, device=device))
                transfer.wait_received()
    group.messages_sent, group.bytes_sent = sent


def foreseen(topology: Topology) -> range:
    """Steps for which to prepare at construction: a period, or the first of one that is long or never ends."""
    return range(min(topology.period or 32, 32))


class _Unposted:
    """In the place of the work that the transport did not take: it is told of where that would be waited for."""

    def __init__(self, error: RuntimeError):
        # Its frames refer to this object and to the process group, whose connections would stay open until a search.
        self._error = error.with_traceback(None)

    def wait(self, timeout: timedelta | None = None) -> None:
        raise self._error


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:  # torch's way to say that this rank is not in the process group
        raise RuntimeError("this rank is not in the process group of the exchange")
    return work
