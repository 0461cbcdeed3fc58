"""Who takes part in the functions that a user's own loop calls: one party per process group, met at the first call.

All these functions share it. What is sent over it has a tag that is made of the function, its running number, and the
shapes and types of what is sent: messages of different calls never take each other's place, though a call was left out,
or its result not waited for; and one of another length, by which gloo ends the process that receives it, is not taken
at all. Who waits for one that does not come is told so after `timeout`.
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import profiler

from .collectives import refuse_difference
from .errors import calling
from .group import Group
from .place import Layout, Place, alone
from .process_group import transport
from .waiter import Waiter

# One name for all functions: a rank may connect anew in another call than its neighbors, which wait in theirs.
WHAT = "group of neighbor_allreduce() and its kin"
CURE = "Pass the same on every rank."
_parties: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple, Party]] = weakref.WeakKeyDictionary()


class Party:
    """One rank's end of it. timeout: seconds that a rank waits for another, in the calls after an error too."""

    def __init__(self, place: Place, timeout: float):
        self.place, self.timeout = place, timeout
        self._numbers: Counter[object] = Counter()
        self._compared: set[tuple] = set()  # what all ranks were found to pass
        self._lock = threading.Lock()

    @property
    def workers(self) -> Group:
        """The ranks that exchange: those of the process group, or one of each machine."""
        return self.place.workers

    @property
    def broken(self) -> bool:
        return self.workers.broken or self.place.inside.broken

    @cached_property
    def waiter(self) -> Waiter:
        """The thread that waits where nobody else does."""
        return Waiter()

    def tag(self, call: str, facts: str, pair: int | None = None) -> int:
        """Of the next message of this kind: the same at both its ends, another one for every call.

        pair: the other rank, where only two take part and count for themselves.
        """
        with self._lock:
            self._numbers[pair] += 1
            number = self._numbers[pair]
        kind = "all" if pair is None else "pair"
        return zlib.crc32(f"{kind} {number} {call} {facts}".encode()) >> 1  # gloo takes no more than 31 bits

    def gathered(self, call: str, value: Any, what: str) -> dict[int, Any]:
        """Every rank's value, by global rank. All ranks of all workers must call it.

        Raises the same ValueError on all ranks if they are in different calls.
        """
        workers = self.workers
        values = {workers.ranks[workers.rank]: (call, value)}
        for group in (self.place.inside, workers):
            values = {rank: v for part in group.gathered(values, what) for rank, v in part.items()}
        calls = {rank: {"which function is called": f"{name}()"} for rank, (name, _) in sorted(values.items())}
        refuse_difference(calls, CURE)
        return {rank: values[rank][1] for rank in calls}

    def compare(self, call: str, facts: Mapping[str, str]) -> None:
        """Raises the same ValueError on all ranks if they pass different things to a call. Asks once for each."""
        key = (call, *facts.values())
        if key not in self._compared:
            named = {f"the {name} given to {call}()": fact for name, fact in facts.items()}
            refuse_difference(self.gathered(call, named, "comparing what the ranks pass"), CURE)
            self._compared.add(key)


def connect(found: Layout, device: torch.device, timeout: float) -> Party:
    """The party over these ranks for tensors on `device`. All of them must call this where there is none, or it broke.

    Raises what `Layout.connect` raises.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be positive seconds, not {timeout}")
    if found.size == 1 and not found.machines:
        return Party(alone(device), timeout)
    backend = transport(found.process_group, device)
    # One for gloo, whatever the device: ranks may use devices in orders of their own.
    key = (device if backend == "nccl" else backend, *map(tuple, found.machines))
    parties = _parties.setdefault(found.process_group or dist.group.WORLD, {})  # type: ignore[arg-type]
    if key not in parties or parties[key].broken:
        if key in parties:
            timeout = parties[key].timeout  # the first call's
            parties[key].place.close()
        probe = [torch.empty(0, device=device)]
        parties[key] = Party(found.connect(probe, timeout, warn=False, what=WHAT), timeout)
    return parties[key]


@contextmanager
def named(call: str, step: int | None = None) -> Iterator[None]:
    """Errors within it name the call, and a profiler's trace has a span for it."""
    span: Any = None
    if profiler._is_profiler_enabled:
        span = profiler.record_function(f"fused_dlam::{call}" + ("" if step is None else f" step {step}"))
        span.__enter__()
    try:
        with calling(f"{call}()"):
            yield
    finally:
        if span is not None:
            span.__exit__(None, None, None)
