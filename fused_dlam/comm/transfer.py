"""One bucket's exchange in one step: with neighbors (`Transfer`) or with everybody (`Averaging`).

Who waits for whom, with CUDA tensors (on CPU there are no streams and the same calls run in order):

    main stream    backward ... g ready ---+                            +--> combine --> next forward
                                           |                            |
    lane stream                            +--> pack --> [NCCL] --wait--+        NCCL: `wait` orders streams only
                                                  |                     |
    gloo instead                                  +--> copy to host     +<-- copy to device
                                                         |  event              ^
    courier thread                                       +--> isend            |
    main thread, in step()                                        irecv.wait --+

The lane stream waits for the main stream before pack and the main stream for the lane before combine; so a message
buffer is packed anew only after it was sent, and x is written only after every reader is done.

Host memory is taken anew for every copy. A copy to the device is queued behind the whole backward pass and the host
goes on: a kept buffer would be posted for the next step's message while the last one was still to be read from it.
torch's caching allocator gives pinned memory out again only after the copies that read it have run, in microseconds.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..topology.topology import Peers, Topology
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
        exchange: Group,
        rows: Sequence[torch.Tensor],
        peers: Peers,
        step: int,
        tag: int = 0,
        staged: bool = False,
    ):
        self.exchange, self.peers, self.step, self._tag = exchange, peers, step, tag
        self._rows = list(rows)
        self._staged = staged or (exchange.stages and any(row.is_cuda for row in rows))
        self._host_rows = [host_like(row) for row in self._rows] if self._staged else self._rows
        self._receives: list[tuple[int | None, dist.Work]] = []
        self._sends: list[tuple[int | None, dist.Work]] = []
        self._posting: Errand | None = None
        if exchange.backend != "nccl":
            for row, j in zip(self._host_rows, peers.sources, strict=True):
                with exchange.watched("posting a receive from", step, j):
                    self._receives.append((j, _work(dist.irecv(row, exchange.ranks[j], exchange.group, tag))))

    def send(self, message: torch.Tensor) -> None:
        """Starts sending `message` to the destinations."""
        exchange, peers, ranks = self.exchange, self.peers, self.exchange.ranks
        if exchange.backend == "nccl":
            # Unbatched P2P of a pair serializes and can deadlock on NCCL; a batch completes as a whole.
            ops = [dist.P2POp(dist.irecv, r, ranks[j], exchange.group)
                   for r, j in zip(self._rows, peers.sources, strict=True)]  # fmt: skip
            ops += [dist.P2POp(dist.isend, message, ranks[j], exchange.group) for j in peers.destinations]
            with exchange.watched("exchanging with neighbors", self.step):
                self._receives = [(None, work) for work in (dist.batch_isend_irecv(ops) if ops else [])]
        elif not (self._staged or (message.is_cuda and exchange.stages)):
            self._post(message)
        else:
            host = host_like(message).copy_(message, non_blocking=True)
            copied = torch.cuda.current_stream(message.device).record_event() if message.is_cuda else None
            # The host must wait for the copy, but not this thread, which has the rest of the backward pass to launch.
            self._posting = courier(exchange).run(lambda: self._post(host, copied))
        exchange.messages_sent += len(peers.destinations)
        exchange.bytes_sent += len(peers.destinations) * message.numel() * message.element_size()

    def _post(self, message: torch.Tensor, copied: torch.cuda.Event | None = None) -> None:
        if copied is not None:
            copied.synchronize()
        for j in self.peers.destinations:
            with self.exchange.watched("sending to", self.step, j):
                work = dist.isend(message, self.exchange.ranks[j], self.exchange.group, self._tag)
                self._sends.append((j, _work(work)))

    def wait_received(self) -> None:
        """Until the neighbors' messages are in `received` (on CUDA: as seen by the current stream)."""
        for j, work in self._receives:
            with self.exchange.watched("waiting for a message from", self.step, j):
                work.wait()
        if self._staged:
            for row, host in zip(self._rows, self._host_rows, strict=False):  # none, the second time
                row.copy_(host, non_blocking=True)
            self._host_rows = []
        self._receives = []

    def wait_sent(self) -> None:
        """Until the message has been read by the transport."""
        if self._posting is not None:
            with self.exchange.watched("handing a message to the transport", self.step):
                self._posting.wait(self.exchange.timeout)
            self._posting = None
        for j, work in self._sends:
            with self.exchange.watched("waiting to finish sending to", self.step, j):
                work.wait()
        self._sends = []


class Averaging:
    """The mean of a tensor over all workers, in place, bit-equal on all of them: an all-reduce in the background.

    16-bit values are divided before they are summed, as in DDP: a sum of n gradients overflows float16 where their mean
    does not. NCCL divides by itself, in the pass that sums.
    """

    def __init__(self, exchange: Group, tensor: torch.Tensor, step: int | None):
        self.exchange, self.step, self._tensor = exchange, step, tensor
        self._host, op, self._over = tensor, dist.ReduceOp.SUM, exchange.size
        if exchange.backend == "nccl":
            op, self._over = dist.ReduceOp.AVG, 1
        elif tensor.dtype in (torch.float16, torch.bfloat16):
            tensor.div_(exchange.size)
            self._over = 1
        if tensor.is_cuda and exchange.stages:
            self._host = to_host(tensor)
        with exchange.watched("all-reduce", step):
            self._work: dist.Work | None = _work(dist.all_reduce(self._host, op, exchange.group, async_op=True))
        share = 2 * (exchange.size - 1) / exchange.size  # what a ring sends
        exchange.bytes_sent += share * tensor.numel() * tensor.element_size()

    @property
    def done(self) -> bool:
        """Whether it was waited for."""
        return self._work is None

    def wait_received(self) -> None:
        if self._work is not None:
            with self.exchange.watched("all-reduce", self.step):
                self._work.wait()
            self._work = None
            if self._over > 1:
                self._host.div_(self._over)
            if self._host is not self._tensor:
                self._tensor.copy_(self._host, non_blocking=True)

    def wait_sent(self) -> None:
        self.wait_received()


def average(exchange: Group, tensor: torch.Tensor, step: int | None = None) -> None:
    """The mean over all workers, in place; returns when it is there."""
    if exchange.backend == "nccl" and not tensor.is_cuda:  # a step counter that an optimizer keeps on the host, say
        device = tensor.to(exchange.device)
        Averaging(exchange, device, step).wait_received()
        tensor.copy_(device)
    else:
        Averaging(exchange, tensor, step).wait_received()


def connect(exchange: Group, topology: Topology, device: torch.device) -> None:
    """Has NCCL connect a device with its neighbors now: it does so at the first message, in mid-training otherwise.

    One number to every peer of a period. The first operation of a communicator must be everybody's.
    """
    if exchange.backend != "nccl":
        return
    sent = exchange.messages_sent, exchange.bytes_sent
    with torch.cuda.device(device):
        average(exchange, torch.zeros(1, device=device))
        for step in foreseen(topology):
            if not topology.averages_exactly(step):
                peers = topology.peers(exchange.rank, step)
                rows = torch.zeros(len(peers.sources), 1, device=device)
                transfer = Transfer(exchange, list(rows), peers, step)
                transfer.send(torch.zeros(1, device=device))
                transfer.wait_received()
    exchange.messages_sent, exchange.bytes_sent = sent


def foreseen(topology: Topology) -> range:
    """Steps for which to prepare at construction: a period, or the first of one that is long or never ends."""
    return range(min(topology.period or 32, 32))


def host_like(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor, pinned if that is on a GPU. New every time: see above."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CUDA tensor's values on the host, once they are there: waits for what is queued on the current stream."""
    host = host_like(tensor).copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


class Lane:
    """A CUDA stream beside the main one for pack and transport; on CPU, or if nothing is sent, nothing.

    Of high priority: what a neighbor waits for is not queued behind this rank's backward pass.
    """

    def __init__(self, device: torch.device, sends: bool = True):
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" and sends else None

    @contextmanager
    def outbound(self, writers: Iterable[torch.cuda.Stream] = ()) -> Iterator[None]:
        """Work in the body runs on the lane, after what was launched so far on the current stream and on `writers`."""
        if self._stream is None:
            yield
        else:
            for stream in {torch.cuda.current_stream(self._stream.device), *writers}:
                self._stream.wait_stream(stream)
            with torch.cuda.stream(self._stream):
                yield

    def join(self) -> None:
        """What is launched from now on on the current stream runs after the lane's work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Errand:
    """Something a courier does; `wait` raises what it raised."""

    def __init__(self, job: Callable[[], object]):
        self._job, self._done = job, threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._job()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self._done.set()

    def wait(self, timeout: float) -> None:
        if not self._done.wait(timeout):
            raise RuntimeError(f"no copy from the device within {timeout:g} s")
        if self._error is not None:
            raise self._error


class Courier:
    """One thread that posts sends in the order it is given them, as every rank must."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Errand] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="fused_dlam-courier").start()

    def run(self, job: Callable[[], object]) -> Errand:
        errand = Errand(job)
        self._queue.put(errand)
        return errand

    def _work(self) -> None:
        while True:
            self._queue.get().run()


def courier(exchange: Group) -> Courier:
    """The exchange's courier, started when it is first needed."""
    if exchange.courier is None:
        exchange.courier = Courier()
    return exchange.courier


def _work(work: dist.Work | None) -> dist.Work:
    if work is None:  # torch's way to say that this rank is not in the group
        raise RuntimeError("this rank is not in the process group of the exchange")
    return work
