"""Between a loss and the next step() or call: torch's world stands, with the ranks of before, and carries nothing.

The connections of the broken step are closed, for that is how the others learn of it, and new ones are formed when all
come to the next step() or call. A script asks for its rank in between, to choose a batch or to log.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .errors import ExchangeError

NAME = "fused_dlam_between"
KINDS = ("all", "_all", "barrier", "monitored", "broadcast", "gather", "recv", "reduce", "_reduce", "scatter", "send")
_building = False


class Between(dist.ProcessGroup):
    """A process group that has a rank and a size."""

    def getBackendName(self) -> str:
        return NAME

    def abort(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def _refuse(*arguments: Any, **named: Any) -> Any:
    raise ExchangeError(
        "workers were lost, and process groups are formed anew at the beginning of the next step(), or of another call"
        " of the optimizer: torch.distributed carries nothing in between. What all ranks are to know can be had by"
        " optimizer.mean(), which goes on without those that are lost"
    )


for _operation in [name for name in dir(dist.ProcessGroup) if name.startswith(KINDS)]:
    setattr(Between, _operation, _refuse)


class _Nowhere(dist.Store):
    """In which nobody can be found: a group of another backend would look for the others until its timeout."""

    def set_timeout(self, timeout: timedelta) -> None:
        pass

    set = get = add = append = check = wait = compare_set = multi_get = multi_set = delete_key = _refuse  # type: ignore[assignment]


_nowhere = _Nowhere()  # torch holds its C++ part alone


def _build(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    return Between(rank, size) if _building else _refuse()  # type: ignore[call-arg]  # a script's new_group


def enter(rank: int, size: int) -> None:
    """torch has no world, and has this one from here on."""
    global _building
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _build, devices=["cpu", "cuda"])
    hook, _building = sys.excepthook, True
    try:
        dist.init_process_group(NAME, store=_nowhere, rank=rank, world_size=size)
    finally:
        sys.excepthook, _building = hook, False  # torch wraps it each time


def stands() -> bool:
    """Whether this is torch's world now."""
    return dist.is_initialized() and isinstance(dist.group.WORLD, Between)


def leave() -> None:
    """Gives it up, where it stands."""
    if stands():
        dist.destroy_process_group()
