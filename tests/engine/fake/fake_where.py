"""Where the package is at: the line that does something, and the thread."""

from __future__ import annotations

import os
import sys
import threading

import fused_dlam
from fused_dlam import kernels

ROOTS = tuple(os.path.dirname(os.path.abspath(m.__file__)) + os.sep for m in (fused_dlam, kernels))


def ours(line: str) -> bool:
    """Whether a line that `where` returned is in the package."""
    return line != "outside" and not line.startswith("test_")


def where() -> str:
    """The innermost line of the package that runs, or of anything else if it is not in the package."""
    frame = sys._getframe(1)
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the room of the tests that use it
    outside = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOTS):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        if not outside and name.startswith(here) and not os.path.basename(name).startswith("fake_"):
            outside = f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return outside or "outside"


def thread_name() -> str:
    # Not current_thread(): a thread that is just starting is not registered, and would become another's double.
    thread = threading._active.get(threading.get_ident())  # type: ignore[attr-defined]
    return "that starts" if thread is None else thread.name
