"""`jit`: marks a rule's equation so that one text runs in a Triton kernel, in numba, on torch tensors and in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

try:
    from triton import jit
except ImportError:  # no triton on this platform: the equations still run everywhere but in a Triton kernel

    class PlainFunction:
        """Carries the plain function under the name Triton gives it, `.fn`."""

        def __init__(self, fn: Callable):
            self.fn = fn
            self.__name__, self.__doc__, self.__module__ = fn.__name__, fn.__doc__, fn.__module__

    def jit(fn: Callable):  # type: ignore[no-redef]
        return PlainFunction(fn)


class Array(np.ndarray):
    """A numpy array with the one method of equations that numpy's lack: view one as this to hand it to an equation."""

    def sqrt(self):
        return np.sqrt(self)


__all__ = ["Array", "jit"]
