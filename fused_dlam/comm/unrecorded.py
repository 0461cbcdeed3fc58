"""Messages that a profiler's trace does not show, for they may still be on their way when it stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import profiler


@contextmanager
def unrecorded() -> Iterator[None]:
    """Keeps gloo's own span of a message out of a profiler's trace, which has this package's (engine/trace.py).

    A message that is on its way when the profiler stops ends its span in memory that is the profiler's no more (torch
    2.11 to 2.13), and the process dies of it: so would every step whose successor's receives are posted.
    """
    if not profiler._is_profiler_enabled:
        yield
        return
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)
