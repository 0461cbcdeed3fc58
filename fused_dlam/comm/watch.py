"""Every wait has a deadline and a name: what an error says of it, and what is logged while it lasts."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .group import Group

log = logging.getLogger("fused_dlam")


class ExchangeError(RuntimeError):
    """A peer did not answer: it died, was cut off, or takes part in another exchange.

    Over gloo the wait that runs out of time raises it. Over NCCL, on which this has not run yet, a wait only orders
    streams, and what becomes of a dead peer is torch's choice, by its documentation: by default its watchdog ends this
    process once `timeout` has passed, and nothing is raised. With TORCH_NCCL_BLOCKING_WAIT=1 every wait is one of the
    host and raises this error, at the price of the overlap; with TORCH_NCCL_ASYNC_ERROR_HANDLING=2 the process lives on
    and the next exchange raises it, while this rank may have combined what never came: go back to a checkpoint.
    """


class Watched:
    """One wait. A class, and no text before it is needed: four of these per message cost 10 us as generators."""

    __slots__ = ("group", "outer", "peer", "since", "step", "thread", "what")

    def __init__(self, group: Group, what: str, step: int | None, peer: int | None):
        self.group, self.what, self.step, self.peer = group, what, step, peer

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"rank {self.group.rank}{at}: {self.what}" + ("" if self.peer is None else f" rank {self.peer}")

    def __enter__(self) -> None:
        self.since, self.thread = time.monotonic(), threading.get_ident()
        current = self.group.watch.current
        self.outer = current.get(self.thread)
        current[self.thread] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        current = self.group.watch.current
        if self.outer is None:
            current.pop(self.thread, None)
        else:
            current[self.thread] = self.outer
        if isinstance(error, RuntimeError) and not isinstance(error, ExchangeError):
            raise ExchangeError(
                f"{self} failed ({str(error).splitlines()[0][:160]}). That rank, or one it waits for, died, was cut"
                f" off, or calls other exchanges than this one: look at its log first. Every rank must call step()"
                f" equally often; a wait may take {self.group.timeout:g} s (timeout=). "
                + (LOST if self.group.backend == "nccl" else INTACT)
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
