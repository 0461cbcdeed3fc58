"""Messages between neighbors over plain torch.distributed, each wait with a deadline and a name.

One flat message per peer and bucket, in one order on all ranks, on a process group of its own. gloo matches sends and
receives of a pair in the order they are posted, so no tags are needed; NCCL has none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .topology import Peers

log = logging.getLogger("fused_dlam")


class ExchangeError(RuntimeError):
    """A peer did not answer: it died, was cut off, or takes part in another exchange."""


class Exchange:
    """One rank's end of all exchanges within a process group (default: all ranks).

    Args:
        group: the workers; its ranks are the workers' numbers. A new group over the same ranks is made for the
            exchange alone, so that nothing the user does in `group` gets in between. All its ranks must call this.
        timeout: seconds after which a wait fails with `ExchangeError`; every tenth of it a warning is logged.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 600.0):
        if timeout <= 0:
            raise ValueError(f"timeout must be positive seconds, not {timeout}")
        self.timeout = timeout
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.backend = dist.get_backend(group)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.bytes_sent = 0.0  # payload this rank sent: messages to neighbors, and what a ring all-reduce sends
        self.messages_sent = 0  # to neighbors
        self._watch = Watch(self.timeout)
        self._pinned: dict[tuple, torch.Tensor] = {}
        with self.watched("building the process group", None):
            self.group = dist.new_group(
                self.ranks,
                timeout=timedelta(seconds=timeout),
                backend=self.backend,
                use_local_synchronization=True,
                group_desc="fused_dlam",
            )
            # The first operation of a NCCL group must be one that all its ranks take part in.
            warm = torch.zeros(1, device="cuda" if self.backend == "nccl" else "cpu")
            dist.all_reduce(warm, group=self.group)

    def post(self, message: torch.Tensor, received: torch.Tensor, peers: Peers, step: int) -> Transfer:
        """Starts sending `message` to the peers' destinations and receiving row k of `received` from source k.

        Neither buffer may be touched before the transfer was waited for: nothing is copied.
        """
        return Transfer(self, message, received, peers, step)

    def average(self, tensor: torch.Tensor, step: int | None = None) -> None:
        """The mean over all workers, in place and bit-equal on all of them, by all-reduce."""
        with self.watched("all-reduce", step):
            host = self._host(tensor, "average")
            dist.all_reduce(host, group=self.group)
            host.div_(self.size)
            self.bytes_sent += 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size()
            if host is not tensor:
                tensor.copy_(host)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's values to all, in place."""
        with self.watched("broadcast from rank 0", None):
            host = self._host(tensor, "average")
            dist.broadcast(host, self.ranks[0], group=self.group)
            if host is not tensor:
                tensor.copy_(host)

    def agree(self, facts: dict[str, str]) -> None:
        """Raises the same ValueError on every rank if the ranks' facts differ, naming the first that does."""
        gathered: list[dict[str, str]] = [{} for _ in range(self.size)]
        with self.watched("comparing the workers' settings", None):
            dist.all_gather_object(gathered, facts, group=self.group)
        for rank, other in enumerate(gathered):
            for name in gathered[0]:
                if other.get(name) != gathered[0][name]:
                    raise ValueError(
                        f"the workers do not agree on {name}: rank 0 has {_shorten(gathered[0][name])}, rank {rank} has"
                        f" {_shorten(other.get(name))}. Build the same model and optimizer on every rank."
                    )

    def global_rank(self, rank: int) -> int:
        return self.ranks[rank]

    def _host(self, tensor: torch.Tensor, use: str) -> torch.Tensor:
        """The tensor itself, or for CUDA tensors over gloo a copy in pinned host memory, safe to read."""
        if self.backend != "gloo" or not tensor.is_cuda:
            return tensor
        host = self.pinned(tensor, use)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return host

    def pinned(self, like: torch.Tensor, use: str) -> torch.Tensor:
        key = (use, like.data_ptr(), like.numel(), like.dtype)
        if key not in self._pinned:
            self._pinned[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        return self._pinned[key]

    @contextmanager
    def watched(self, what: str, step: int | None, peer: int | None = None) -> Iterator[None]:
        """Names what went wrong in the body, and warns in the log while it takes long."""
        at = "" if step is None else f" at step {step}"
        where = f"rank {self.rank}{at}: {what}" + ("" if peer is None else f" rank {peer}")
        try:
            with self._watch.over(where):
                yield
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, ExchangeError):
                raise
            raise ExchangeError(
                f"{where} failed ({str(error).splitlines()[0][:160]}). That rank, or one it waits for, died, was cut"
                f" off, or calls other exchanges than this one: look at its log first. Every rank must call step()"
                f" equally often; a wait may take {self.timeout:g} s (timeout=). The parameters here are intact; restart"
                " from a checkpoint, or with the workers that are left."
            ) from error


class Transfer:
    """One bucket's messages to and from its neighbors in one step."""

    def __init__(self, exchange: Exchange, message, received, peers: Peers, step: int):
        self.exchange, self.peers, self.step = exchange, peers, step
        self.received, self._rows = received, [received[k] for k in range(len(peers.sources))]
        self._message = message
        self._receives: list[tuple[int, dist.Work]] = []
        self._sends: list[tuple[int, dist.Work]] = []
        ranks, group = exchange.ranks, exchange.group
        message = exchange._host(message, "send")
        self._staged = message is not self._message
        rows = [exchange.pinned(row, "receive") for row in self._rows] if self._staged else self._rows
        self._host_rows = rows
        if exchange.backend == "nccl":
            # Unbatched P2P of a pair serializes and can deadlock on NCCL; a batch completes as a whole.
            ops = [dist.P2POp(dist.irecv, r, ranks[j], group) for r, j in zip(rows, peers.sources, strict=True)]
            ops += [dist.P2POp(dist.isend, message, ranks[j], group) for j in peers.destinations]
            works = dist.batch_isend_irecv(ops) if ops else []
            self._receives = [(-1, work) for work in works]
        else:
            # Receives first: gloo moves nothing until the receive is posted.
            for row, j in zip(rows, peers.sources, strict=True):
                with exchange.watched("posting a receive from", step, j):
                    self._receives.append((j, dist.irecv(row, ranks[j], group)))
            for j in peers.destinations:
                with exchange.watched("sending to", step, j):
                    self._sends.append((j, dist.isend(message, ranks[j], group)))
        exchange.messages_sent += len(peers.destinations)
        exchange.bytes_sent += len(peers.destinations) * message.numel() * message.element_size()

    def wait_received(self) -> None:
        for j, work in self._receives:
            with self.exchange.watched("waiting for a message from", self.step, None if j < 0 else j):
                work.wait()
        if self._staged:
            for row, host in zip(self._rows, self._host_rows, strict=True):
                row.copy_(host, non_blocking=True)
        self._receives = []

    def wait_sent(self) -> None:
        for j, work in self._sends:
            with self.exchange.watched("waiting to finish sending to", self.step, j):
                work.wait()
        self._sends = []


class Watch:
    """Logs a warning when one wait takes long. One daemon thread, started by the first wait; it never interferes."""

    def __init__(self, timeout: float):
        self.every = max(timeout / 10, 0.05)
        self._current: tuple[str, float] | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, where: str) -> Iterator[None]:
        outer, self._current = self._current, (where, time.monotonic())
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="fused_dlam-watch")
            self._thread.start()
        try:
            yield
        finally:
            self._current = outer

    def _run(self) -> None:
        while True:
            time.sleep(self.every)
            current = self._current
            if current is not None and time.monotonic() - current[1] > self.every:
                log.warning("%s: still waiting after %.0f s", current[0], time.monotonic() - current[1])


def _shorten(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
