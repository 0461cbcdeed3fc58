"""The compiled CPU passes: a rule's equations in one loop over flat buffers, by numba, at the speed of the memory.

numba compiles the equations as they stand, called from a loop whose source is generated (numba_source.py). Everything
is computed in the type of x, with one rounding per + - * / and sqrt. Without `fastmath` LLVM contracts nothing to FMA.
So the message that `combine` recomputes is the one that `pack` wrote, bit for bit, and equals what plain torch
operations on the text give. (The torch passes use FMA where there is one: theirs may differ in the last bit.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rules.rule import named
from .numba_source import LINE, Types, loop
from .torch_passes import TorchPasses
from .trace import Equations

# Elements per thread at least. Handing a slice to a thread costs 40 us, in which one thread updates 2^17 elements that
# are in the cache; two threads first won at 2^20 elements in all (227 us against 280, DecentLaM at d = 1).
GRAIN = 1 << 19
# Types of buffers that the loop can read and write, by the type that carries them in numpy (which has no bfloat16).
_CARRIERS = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.uint16,
}


@cache
def available() -> bool:
    """Whether numba can be imported here (the optional extra `cpu`)."""
    try:
        import numba  # noqa: F401
    except Exception:  # also a numba that this version of numpy or Python breaks
        return False
    return True


class NumbaPasses(TorchPasses):
    """The passes, see `Passes`, each compiled when it is first used (0.1 to 0.2 s, and 0.6 s once for numba's start).

    `warm` does nothing here: a slice of a bucket uses what the bucket does, so the first steps compile everything, and
    no timeout or queue of a device runs meanwhile.

    The master type is float32 or float64. Gradients and low parameters are of any type in `_CARRIERS`, and messages of
    any but float16.
    Other types and buffers that are not contiguous run as torch operations. There are as many threads as torch has.
    Several threads may call a pass at once, on different buffers.
    """

    name = "numba"

    def _run(
        self,
        d: int | None,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        rows: Sequence[Tensor],
        wire: torch.dtype,
        low: Tensor | None,
    ) -> None:
        buffers = (x, g, *state, *rows, *(() if low is None else (low,)))
        if (
            x.dtype not in (torch.float32, torch.float64)
            or wire == torch.float16
            or not all(t.dtype in _CARRIERS and t.is_contiguous() and t.device.type == "cpu" for t in buffers)
            or any(t.dtype != x.dtype for t in state)
            or any(t.dtype != wire for t in rows)
        ):
            return super()._run(d, x, g, state, rows, wire, low)
        h, weights, scale, _ = self.scalars
        types = Types(x.dtype, g.dtype, wire, low if low is None else low.dtype)
        function = _compile(self.equations, d, types, self.guard)
        # Scalars travel in one array of the master type: no Python float promotes the arithmetic to float64.
        scalars = torch.tensor([*h, scale, *(weights if d else ())], dtype=x.dtype).numpy()
        _parallel(function, scalars, [t.view(_CARRIERS[t.dtype]).numpy() for t in buffers])


def _parallel(function: Callable, scalars: np.ndarray, arrays: list[np.ndarray]) -> None:
    """function over slices of the arrays, one for each of torch's threads. The results do not depend on their number.

    The threads are our own, not those of numba's `prange`: its default pool on many machines ("workqueue") aborts the
    process when two threads call it, and packing runs in the hooks of the backward pass.
    """
    n = arrays[0].size
    parts = max(1, min(torch.get_num_threads(), n // GRAIN))
    if parts == 1:
        function(scalars, *arrays)
        return
    step = -(-n // parts // LINE) * LINE
    pool = _threads(torch.get_num_threads())
    pieces = [[a[lo : lo + step] for a in arrays] for lo in range(0, n, step)]
    rest = [pool.submit(function, scalars, *piece) for piece in pieces[1:]]
    function(scalars, *pieces[0])
    for future in rest:
        future.result()


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="fused_dlam")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


@lru_cache(maxsize=256)
def _compile(equations: Equations, d: int | None, types: Types, guard: bool = False) -> Callable:
    """The loop of `pack` (d is None) or of `combine` over d neighbors; numba compiles it when it is first called."""
    import numba

    from . import numba_tools

    def jit(function: Callable, **options: Any) -> Callable:
        # numpy's division: Python's raises on 0, a branch that keeps the loop from being vectorized.
        return numba.njit(function, error_model="numpy", **options)

    namespace = {**vars(numba_tools), "H": named("H", equations.fields), "State": named("State", equations.state)}
    # Inlined before compilation: 0.13 to 0.35 s for a pass instead of 0.2 to 0.4 s.
    namespace.update(send=jit(equations.send, inline="always"), update=jit(equations.update, inline="always"))
    exec(loop(equations, d, types, guard), namespace)
    return jit(namespace["run"], nogil=True)
