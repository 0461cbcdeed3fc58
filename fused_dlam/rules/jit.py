"""`jit` marks an equation of a rule, so that one text runs in a Triton kernel, in numba, on torch tensors and in numpy.

With Triton, `jit` is `triton.jit`: it makes a function that other Triton kernels can call, and keeps the plain function
as `.fn`. Without Triton, `jit` keeps the plain function as `.fn` and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

try:
    from triton import jit
except ImportError:  # Triton does not exist for this platform: the equations run everywhere but in a Triton kernel

    class PlainFunction:
        """Carries the plain function under the name Triton gives it, `.fn`."""

        def __init__(self, fn: Callable):
            self.fn = fn
            self.__name__, self.__doc__, self.__module__ = fn.__name__, fn.__doc__, fn.__module__

    def jit(fn: Callable):  # type: ignore[no-redef]
        return PlainFunction(fn)


class Array(np.ndarray):
    """A numpy array with `.sqrt()`, which equations use and numpy lacks: `array.view(Array)` fits an equation."""

    def sqrt(self):
        return np.sqrt(self)


__all__ = ["Array", "jit"]
