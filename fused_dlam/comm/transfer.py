"""One bucket's message in flight: to neighbors and back (`Transfer`), or the mean over everybody (`Mean`).

streams.py tells who waits for whom where the tensors are on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..topology import Peers, Topology
from .streams import Errand, host_like, to_host

if TYPE_CHECKING:
    from .group import Group


class Transfer:
    """Messages to and from the neighbors.

    The receives, one row for each source, are posted at once, for gloo moves nothing until they are; `send` posts the
    sends. Neither rows nor message may be touched before `wait_received` and `wait_sent`: nothing is copied. `tag` (a
    bucket's number) keeps messages of one pair apart on gloo, which would take any message for any other, of whatever
    length; NCCL has no tags.
    """

    def __init__(
        self,
        group: Group,
        rows: Sequence[torch.Tensor],
        peers: Peers,
        step: int,
        tag: int = 0,
    ):
        self.group, self.peers, self.step, self._tag = group, peers, step, tag
        self._rows = list(rows)
        self._staged = group.stages and self.on_device(rows)
        self._host_rows = [host_like(row) for row in self._rows] if self._staged else self._rows
        self._receives: list[tuple[int | None, dist.Work]] = []
        self._sends: list[tuple[int | None, dist.Work]] = []
        self._posting: Errand | None = None
        if group.backend != "nccl":
            for row, j in zip(self._host_rows, peers.sources, strict=True):
                with group.watched("posting a receive from", step, j):
                    self._receives.append((j, _work(dist.irecv(row, group.ranks[j], group.process_group, tag))))

    @staticmethod
    def on_device(tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the host has to copy before it can send."""
        return any(t.is_cuda for t in tensors)

    def send(self, message: torch.Tensor) -> None:
        """Starts sending `message` to the destinations."""
        group, peers, ranks = self.group, self.peers, self.group.ranks
        if group.backend == "nccl":
            # Unbatched P2P of a pair serializes and can deadlock on NCCL; a batch completes as a whole.
            ops = [dist.P2POp(dist.irecv, r, ranks[j], group.process_group)
                   for r, j in zip(self._rows, peers.sources, strict=True)]  # fmt: skip
            ops += [dist.P2POp(dist.isend, message, ranks[j], group.process_group) for j in peers.destinations]
            with group.watched("exchanging with neighbors", self.step):
                self._receives = [(None, work) for work in (dist.batch_isend_irecv(ops) if ops else [])]
        elif not (self._staged or (group.stages and self.on_device([message]))):
            self._post(message)
        else:
            host = host_like(message).copy_(message, non_blocking=True)
            copied = torch.cuda.current_stream(message.device).record_event() if message.is_cuda else None
            # The host must wait for the copy, but not this thread, which has the rest of the backward pass to launch.
            self._posting = group.courier.run(lambda: self._post(host, copied))
        group.count(message, len(peers.destinations))

    def _post(self, message: torch.Tensor, copied: torch.cuda.Event | None = None) -> None:
        if copied is not None:
            copied.synchronize()
        for j in self.peers.destinations:
            with self.group.watched("sending to", self.step, j):
                work = dist.isend(message, self.group.ranks[j], self.group.process_group, self._tag)
                self._sends.append((j, _work(work)))

    def wait_received(self) -> None:
        """Until the neighbors' messages are in `received` (on CUDA: as seen by the current stream)."""
        for j, work in self._receives:
            with self.group.watched("waiting for a message from", self.step, j):
                work.wait()
        if self._staged:
            for row, host in zip(self._rows, self._host_rows, strict=False):  # none, the second time
                row.copy_(host, non_blocking=True)
            self._host_rows = []
        self._receives = []

    def wait_sent(self) -> None:
        """Until the message has been read by the transport."""
        if self._posting is not None:
            with self.group.watched("handing a message to the transport", self.step):
                self._posting.wait(self.group.timeout)
            self._posting = None
        for j, work in self._sends:
            with self.group.watched("waiting to finish sending to", self.step, j):
                work.wait()
        self._sends = []


class Mean:
    """The mean of a tensor over all workers, in place, bit-equal on all of them: an all-reduce in the background.

    16-bit values are divided before they are summed, as in DDP: a sum of n gradients overflows float16 where their mean
    does not. NCCL divides by itself, in the pass that sums.
    """

    def __init__(self, group: Group, tensor: torch.Tensor, step: int | None):
        self.group, self.step, self._tensor = group, step, tensor
        self._host, op, self._over = tensor, dist.ReduceOp.SUM, group.size
        if group.backend == "nccl":
            op, self._over = dist.ReduceOp.AVG, 1
        elif tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.div_(group.size)
            self._over = 1
        if tensor.is_cuda and group.stages:
            self._host = to_host(tensor)
        with group.watched("all-reduce", step):
            self._work: dist.Work | None = _work(dist.all_reduce(self._host, op, group.process_group, async_op=True))
        group.count_ring(tensor)

    @property
    def done(self) -> bool:
        """Whether it was waited for."""
        return self._work is None

    def wait_received(self) -> None:
        if self._work is not None:
            with self.group.watched("all-reduce", self.step):
                self._work.wait()
            self._work = None
            if self._over > 1:
                self._host.div_(self._over)
            if self._host is not self._tensor:
                self._tensor.copy_(self._host, non_blocking=True)

    def wait_sent(self) -> None:
        self.wait_received()


def connect(group: Group, topology: Topology, device: torch.device) -> None:
    """Has NCCL connect a device with its neighbors now: it does so at the first message, in mid-training otherwise.

    One number to every peer of a period. The first operation of a communicator must be everybody's.
    """
    if group.backend != "nccl":
        return
    sent = group.messages_sent, group.bytes_sent
    with torch.cuda.device(device):
        group.mean(torch.zeros(1, device=device))
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


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:  # torch's way to say that this rank is not in the process group
        raise RuntimeError("this rank is not in the process group of the exchange")
    return work
