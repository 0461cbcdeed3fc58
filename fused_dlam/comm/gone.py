"""Which ranks are certainly gone, by what is known of their processes on the machine on which they run. No guess.

A connection that closes does not tell whether its end died or gave up because another one did. So who gives up leaves
a note in the default store first. A process that is gone and has left none has died; one on the same machine sees it,
and tells the others in the store.

Best effort, as in last_words.py: nothing here raises, and a store that does not answer is not waited for. Where it has
gone, or a machine has no other rank to tell of it, nobody is named.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from . import last_words

PATIENCE = 1.0  # seconds between the end of a process's connections and its own, and for other machines to tell
LOOK = 0.02  # seconds between two looks


class Process(NamedTuple):
    """What a rank tells of itself."""

    machine: str  # and its numbers of processes; "" where that is not known
    pid: int


def own() -> Process:
    """This process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Process(f"{boot} {os.stat('/proc/self/ns/pid').st_ino}", os.getpid())
    except OSError:  # not Linux
        return Process("", os.getpid())


def began(pid: int) -> str:
    """When the process with this number began, in the system's clock; "" if none runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def neighbors(processes: Mapping[int, Process]) -> dict[int, tuple[int, str]]:
    """Of ranks' processes those that are seen from here, all alive: (number, when it began)."""
    me = own()
    near = {rank: p.pid for rank, p in processes.items() if me.machine and p.machine == me.machine and p != me}
    return {rank: (pid, start) for rank, pid in near.items() if (start := began(pid))}


def died(name: str, me: int, ranks: Sequence[int], near: Mapping[int, tuple[int, str]]) -> list[int]:
    """The ranks that are known to have died; and leaves word that this one gives up.

    Args:
        name: of what failed, the same on all ranks and used once.
        me: this rank.
        ranks: all that took part.
        near: see `neighbors`.
    """

    def look(store: dist.Store, found: list) -> None:
        store.set(f"{me} gives up", "")
        end = time.monotonic() + PATIENCE
        while not found:
            for rank, (pid, start) in near.items():  # its note is older than its end, so it is looked for afterwards
                if began(pid) != start and not store.check([f"{rank} gives up"]):
                    store.set(f"{rank} died", "")
            found += [rank for rank in ranks if store.check([f"{rank} died"])]
            if time.monotonic() > end:
                return
            time.sleep(LOOK)

    return last_words.asking(name, look)
