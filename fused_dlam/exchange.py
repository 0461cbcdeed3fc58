"""Messages between neighbors over plain torch.distributed, each wait with a deadline and a name.

One flat message per peer and bucket, in one order on all ranks, on a process group of its own: sends and receives of a
pair match in the order in which they are posted.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger("fused_dlam")


class ExchangeError(RuntimeError):
    """A peer did not answer: it died, was cut off, or takes part in another exchange."""


class Exchange:
    """One rank's end of all exchanges within a process group (default: all ranks).

    Args:
        group: the workers; its ranks are the workers' numbers. A new group over the same ranks is made for the
            exchange alone, so that nothing the user does in `group` gets in between. All its ranks must call this.
        timeout: seconds after which a wait fails with `ExchangeError`; every tenth of it a warning is logged.
        ranks: the workers by their global ranks, in place of all of `group`'s.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: float = 600.0, ranks: list[int] | None = None):
        if timeout <= 0:
            raise ValueError(f"timeout must be positive seconds, not {timeout}")
        self.timeout = timeout
        self.ranks = ranks or dist.get_process_group_ranks(group or dist.group.WORLD)
        self.backend = dist.get_backend(group)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.bytes_sent = 0.0  # payload this rank sent: messages to neighbors, and what a ring all-reduce sends
        self.messages_sent = 0  # to neighbors
        self.watch = Watch(self.timeout)
        self._pinned: dict[tuple, torch.Tensor] = {}
        self.courier: Any = None  # transfer.courier's, once it is needed
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

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's values to all, in place."""
        with self.watched("broadcast from rank 0", None):
            host = tensor.cpu() if tensor.is_cuda and self.stages else tensor
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

    @property
    def stages(self) -> bool:
        """Whether CUDA tensors pass through pinned host memory."""
        return self.backend == "gloo"

    def pinned(self, like: torch.Tensor, use: str) -> torch.Tensor:
        """A host buffer for a tensor, the same one each time."""
        key = (use, like.data_ptr(), like.numel(), like.dtype)
        if key not in self._pinned:
            self._pinned[key] = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        return self._pinned[key]

    def watched(self, what: str, step: int | None, peer: int | None = None) -> Watched:
        """A context that names what went wrong in it, and whose long duration is logged."""
        return Watched(self, what, step, peer)


class Watched:
    """One wait. A class, and no text before it is needed: four of these per message cost 10 us as generators."""

    __slots__ = ("exchange", "outer", "peer", "since", "step", "what")

    def __init__(self, exchange: Exchange, what: str, step: int | None, peer: int | None):
        self.exchange, self.what, self.step, self.peer = exchange, what, step, peer

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"rank {self.exchange.rank}{at}: {self.what}" + ("" if self.peer is None else f" rank {self.peer}")

    def __enter__(self) -> None:
        self.since = time.monotonic()
        self.outer, self.exchange.watch.current = self.exchange.watch.current, self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.exchange.watch.current = self.outer
        if isinstance(error, RuntimeError) and not isinstance(error, ExchangeError):
            raise ExchangeError(
                f"{self} failed ({str(error).splitlines()[0][:160]}). That rank, or one it waits for, died, was cut"
                f" off, or calls other exchanges than this one: look at its log first. Every rank must call step()"
                f" equally often; a wait may take {self.exchange.timeout:g} s (timeout=). The parameters here are"
                " intact: restart from a checkpoint, or with the workers that are left."
            ) from error


class Watch:
    """Logs a warning while one wait takes long, from a daemon thread that never interferes."""

    def __init__(self, timeout: float):
        self.every = max(timeout / 10, 0.05)
        self.current: Watched | None = None
        threading.Thread(target=self._run, daemon=True, name="fused_dlam-watch").start()

    def _run(self) -> None:
        while True:
            time.sleep(self.every)
            current = self.current
            if current is not None and time.monotonic() - current.since > self.every:
                log.warning("%s: still waiting after %.0f s", current, time.monotonic() - current.since)


def _shorten(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
