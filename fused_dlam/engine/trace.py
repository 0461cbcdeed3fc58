"""Named ranges of a profiler's trace: "fused_dlam::pack bucket 3 step 7", and so on for each part of each exchange.

exchange    from the moment a message leaves, mostly within the backward pass, until the neighbors' are there:
            where it lies beside the backward pass's own ranges, communication is hidden
pack, send, wait, combine    what this rank's own thread spends on it
waiting for a message from rank 5    within the last two (comm/watch.py): for whom it waits
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

_NOTHING: AbstractContextManager = nullcontext()


def named(what: str, bucket: int, step: int | None) -> AbstractContextManager:
    """A context that shows in a trace; without a profiler, 0.1 us (a `record_function` of this text, 3 us)."""
    if not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(f"fused_dlam::{what} bucket {bucket} step {step}")


def begun(what: str, bucket: int, step: int | None) -> AbstractContextManager | None:
    """The same, already begun, for one function to begin and another to end: None without a profiler."""
    if not profiler._is_profiler_enabled:
        return None
    span = named(what, bucket, step)
    span.__enter__()
    return span
