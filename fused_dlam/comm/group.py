"""Messages between neighbors over plain torch.distributed, each wait with a deadline and a name.

One flat message per peer and bucket, in one order on all ranks, on a process group of its own: sends and receives of a
pair match in the order in which they are posted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from . import process_group as groups

log = logging.getLogger("fused_dlam")


class ExchangeError(RuntimeError):
    """A peer did not answer: it died, was cut off, or takes part in another exchange.

    Over gloo the wait that runs out of time raises it. Over NCCL, on which this has not run yet, a wait only orders
    streams, and what becomes of a dead peer is torch's choice, by its documentation: by default its watchdog ends this
    process once `timeout` has passed, and nothing is raised. With TORCH_NCCL_BLOCKING_WAIT=1 every wait is one of the
    host and raises this error, at the price of the overlap; with TORCH_NCCL_ASYNC_ERROR_HANDLING=2 the process lives on
    and the next exchange raises it, while this rank may have combined what never came: go back to a checkpoint.
    """


class Group:
    """One rank's end of all exchanges within a process group (default: all ranks).

    Args:
        group: the workers; its ranks are the workers' numbers. A new group over the same ranks is made for the
            exchange alone, so that nothing the user does in `group` gets in between. All its ranks must call this.
        timeout: seconds after which a wait fails with `ExchangeError`; every tenth of it a warning is logged.
        ranks: the workers by their global ranks, in place of all of `group`'s.
        device: where the tensors are; everything this does on a device is done there.
        parts: where `ranks` is given and all ranks of the job build an exchange now: the ranks of each of them.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        timeout: float = 600.0,
        ranks: list[int] | None = None,
        device: torch.device = groups.CPU,
        parts: Sequence[Sequence[int]] = (),
    ):
        if timeout <= 0:
            raise ValueError(f"timeout must be positive seconds, not {timeout}")
        self.timeout, self.device = timeout, device
        self.ranks = ranks or dist.get_process_group_ranks(group or dist.group.WORLD)
        self.backend = groups.transport(group, device)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.bytes_sent = 0.0  # payload this rank sent: messages to neighbors, and what a ring all-reduce sends
        self.messages_sent = 0  # to neighbors
        self.watch = Watch(self.timeout)
        self.courier: Any = None  # transfer.courier's, once it is needed
        with self.watched("building the process group", None), self.placed():
            self.group = groups.build(self.ranks, self.backend, timeout, parts or [self.ranks])
            # The first operation of a NCCL group must be one that all its ranks take part in.
            dist.all_reduce(torch.zeros(1, device=self.wire), group=self.group)

    @property
    def stages(self) -> bool:
        """Whether CUDA tensors pass through pinned host memory."""
        return self.backend == "gloo"

    @property
    def wire(self) -> torch.device:
        """Where the transport reads what it sends."""
        return self.device if self.backend == "nccl" else torch.device("cpu")

    def placed(self) -> AbstractContextManager[object]:
        """A context in which "cuda" means the exchange's device: by itself it is GPU 0, on every rank."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

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
        with self.watched("comparing the workers' settings", None), self.placed():
            dist.all_gather_object(gathered, facts, group=self.group)
        for rank, other in enumerate(gathered):
            for name in gathered[0]:
                if other.get(name) != gathered[0][name]:
                    raise ValueError(
                        f"the workers do not agree on {name}: rank 0 has {_shorten(gathered[0][name])}, rank {rank} has"
                        f" {_shorten(other.get(name))}. Build the same model and optimizer on every rank."
                    )

    def watched(self, what: str, step: int | None, peer: int | None = None) -> Watched:
        """A context that names what went wrong in it, and whose long duration is logged."""
        return Watched(self, what, step, peer)


class Watched:
    """One wait. A class, and no text before it is needed: four of these per message cost 10 us as generators."""

    __slots__ = ("exchange", "outer", "peer", "since", "step", "thread", "what")

    def __init__(self, exchange: Group, what: str, step: int | None, peer: int | None):
        self.exchange, self.what, self.step, self.peer = exchange, what, step, peer

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"rank {self.exchange.rank}{at}: {self.what}" + ("" if self.peer is None else f" rank {self.peer}")

    def __enter__(self) -> None:
        self.since, self.thread = time.monotonic(), threading.get_ident()
        current = self.exchange.watch.current
        self.outer = current.get(self.thread)
        current[self.thread] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        current = self.exchange.watch.current
        if self.outer is None:
            current.pop(self.thread, None)
        else:
            current[self.thread] = self.outer
        if isinstance(error, RuntimeError) and not isinstance(error, ExchangeError):
            raise ExchangeError(
                f"{self} failed ({str(error).splitlines()[0][:160]}). That rank, or one it waits for, died, was cut"
                f" off, or calls other exchanges than this one: look at its log first. Every rank must call step()"
                f" equally often; a wait may take {self.exchange.timeout:g} s (timeout=). "
                + (LOST if self.exchange.backend == "nccl" else INTACT)
            ) from error


INTACT = "Some buckets may have taken this step here, none is damaged: restart from a checkpoint, or without that rank."
LOST = "What never came may have been combined on the GPU by now: restart from a checkpoint."


class Watch:
    """Logs a warning while a wait takes long, from a daemon thread that never interferes.

    The main thread, a hook's and the courier's wait at the same time, each in what is outermost for it alone.
    """

    def __init__(self, timeout: float):
        self.every = max(timeout / 10, 0.05)
        self.current: dict[int, Watched] = {}  # by thread
        threading.Thread(target=self._run, daemon=True, name="fused_dlam-watch").start()

    def _run(self) -> None:
        while True:
            time.sleep(self.every)
            for one in list(self.current.values()):
                if time.monotonic() - one.since > self.every:
                    log.warning("%s: still waiting after %.0f s", one, time.monotonic() - one.since)


def _shorten(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
