"""Over NCCL nobody hears that a peer died: its kernel spins for ever, and a wait orders streams, not the host.

With on_failure="continue" three things are different there, and with "raise" none of them:

    the host waits    for each message before it is combined, so what never came is never used
    a lookout         asks, while a wait lasts, why it should (a beacon that refuses, others that agree on who is left,
                      `timeout`), and aborts the group's operations: the wait ends, and raises (watch.py)
    a control group   over gloo carries what is asked for in the script's order, which so raises by itself

By torch's documentation aborts are for ASYNC_ERROR_HANDLING=0: its watchdog ends the process otherwise. This has run on
no GPU yet; tests/faults (the oracle of recoveries, the table) run it over a stand-in that does what is documented,
streamed_transport.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist

LOOK = 0.2  # seconds between two looks
HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
# The watchdog's other threads would look for signals of the dead in the store, and end the process too.
OTHERS = {"TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}

Lookout = Callable[[], str]  # why nobody should wait any more, "" if nothing is known


def why(gone: Lookout) -> str:
    """What it says; nothing where the store in which workers agree does not answer."""
    try:
        return gone()
    except RuntimeError:
        return ""


def patience(timeout: float) -> float:
    """torch's own timeout, in seconds, where the lookout has this one: it must never be the first."""
    return 2 * timeout + 60


def prepare() -> None:
    """Before groups are built over NCCL: torch is to leave errors to the lookout.

    Raises ValueError where the script has chosen otherwise, or torch would connect while it forms a world.
    """
    chosen = os.environ.get(HANDLING, "0")
    if chosen != "0":
        raise ValueError(
            f"{HANDLING} is {chosen}: with on_failure='continue' torch's watchdog must not act when a worker is lost."
            " Unset it, or set it to 0"
        )
    if dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is not None:
        raise ValueError(
            "init_process_group(device_id=...) has NCCL connect at once, which a worker that dies meanwhile would hold"
            " up for ever: leave device_id out with on_failure='continue'"
        )
    os.environ[HANDLING] = "0"
    for name, value in OTHERS.items():
        os.environ.setdefault(name, value)
