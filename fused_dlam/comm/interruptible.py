"""A call of torch's that waits for others in C++, where nothing reaches it, in a thread that is left behind if need be.

gloo connects all with all in one call. A worker that has said its address and dies before it connects holds up whoever
listens for it until the timeout: 30 s in a recovery of 0.3 s, once in some thirty kills (bench/soak.py --modes kill).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LOOK = 0.1  # seconds between two looks
GRACE = 1.0  # seconds in which the call may still end by itself once somebody is known to be gone: it takes 0.1


def run(call: Callable[[], T], gone: Callable[[], str], too_late: Callable[[], object] = lambda: None) -> T:
    """What `call` returns or raises.

    Args:
        gone: why nobody should wait any more, "" if nothing is known.
        too_late: takes back what a call has done that ends well after it was left behind.

    Raises RuntimeError with that reason where the call does not end by itself.
    """
    ended, lock = threading.Event(), threading.Lock()
    results: list[T] = []
    errors: list[BaseException] = []
    left = False

    def work() -> None:
        try:
            result = call()
            with lock:
                if left:
                    too_late()
                else:
                    results.append(result)
        except BaseException as error:  # noqa: BLE001 -- raised where it is waited for
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True, name="fused_dlam-forming").start()
    while not ended.wait(LOOK):
        why = gone()
        if why and not ended.wait(GRACE):
            with lock:
                left = not results
            if left:
                raise RuntimeError(f"{why} while groups were formed")
    if errors:
        raise errors[0]
    return results[0]
