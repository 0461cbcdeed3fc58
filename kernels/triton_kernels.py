"""The two Triton kernels, generic over the rule: they take its equations as constants.

`_pack_kernel` writes the messages. `_combine_kernel` reads x, g, the state and d received messages, and writes x and
the state in place. Nothing else goes through memory: the kernel recomputes the own message in registers and never
stores the pull, and the compiler removes loads of buffers that a rule's equations do not use. Words of 4 bytes per
parameter in pack and combine: DecentLaM 3 and 5 + d, PC-DmSGD 4 and 7 + d. `gate/` counts them.

With GUARD, what is not finite in the gradient or in a message counts for nothing: three instructions for each, in
registers. low_ptrs is empty, or holds the 16-bit parameters whose master is x: x follows where somebody wrote them.
With TRAVELED, g_ptr holds the parameters y to which an inner optimizer came from x, and g is x - y.

Letters: x parameter, g gradient, s state buffers, y messages, r received messages, h scalars, d neighbors.

No parameter has a default. Triton 3.6, the oldest supported, wraps numbers that are defaults of nested functions and
leaves text bare, so that a default of `""` failed to compile in every kernel.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

# Elements per program. A buffer whose length is a multiple of it is read and written without a mask.
BLOCK = 1024
WARPS = 4
# Elements per thread and access. Without this cap one bfloat16 operand makes Triton load 8 elements per thread, store 4
# float32, and convert between the two through shared memory (4 KiB and up to 3 barriers per program).
VECTOR = 4
# Triton's default contracts multiply and add. Then pack and combine could round the same message differently, and a
# difference of one unit in a bfloat16 message does not cancel between workers. Uncontracted arithmetic costs nothing:
# these kernels wait for memory.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


@dataclass(frozen=True)
class Fields:
    """A constant of a kernel that makes a named tuple inside it.

    The named tuple's class itself will not do. Triton's launcher fails on a class among the constants. And it keys its
    cache on the text of a constant, so that a rule with the same scalars in another order could get another's kernel.
    """

    names: tuple[str, ...]

    def __call__(self, *values: Any) -> Any:
        return _tuple_class(self.names)(*values)


@functools.cache
def _tuple_class(names: tuple[str, ...]) -> Any:
    return namedtuple("Fields", names)  # type: ignore[misc]


@triton.jit
def _load(ptr, offsets, n, EVEN: tl.constexpr):
    if EVEN:
        value = tl.load(ptr + offsets)
    else:
        value = tl.load(ptr + offsets, mask=offsets < n, other=0.0)
    return value.to(tl.float32)  # at once: arithmetic in bfloat16 would round, and the interpreter gets it wrong


@triton.jit
def _store(ptr, offsets, value, n, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptr + offsets, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=offsets < n)


@triton.jit
def _finite(value, GUARD: tl.constexpr):
    """value, or 0 where it is infinite or NaN. 3.4028234663852886e38 is the largest float32. NaN compares false."""
    if GUARD:
        value = tl.where(tl.abs(value) <= 3.4028234663852886e38, value, 0.0)
    return value


@triton.jit
def _inputs(x_ptr, g_ptr, s_ptrs, low_ptrs, scalars_ptr, n, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
            VECTOR: tl.constexpr, EVEN: tl.constexpr, GUARD: tl.constexpr, TRAVELED: tl.constexpr):  # fmt: skip
    """This program's offsets, and x, g, s, h as an equation takes them."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    x = _load(x_ptr, offsets, n, EVEN)
    for k in tl.static_range(len(low_ptrs)):
        low = _load(low_ptrs[k], offsets, n, EVEN)
        x = tl.where(low == x.to(low_ptrs[k].dtype.element_ty).to(tl.float32), x, low)
    g = _load(g_ptr, offsets, n, EVEN)
    if TRAVELED:  # from x as the inner optimizer found it, which for 16-bit parameters was rounded
        g = x.to(g_ptr.dtype.element_ty).to(tl.float32) - g
    g = _finite(g * tl.load(scalars_ptr), GUARD)
    s = ()
    for k in tl.static_range(len(S.names)):
        s = s + (_load(s_ptrs[k], offsets, n, EVEN),)  # type: ignore[assignment]
    h = ()
    for k in tl.static_range(len(H.names)):
        h = h + (tl.load(scalars_ptr + 1 + k),)  # type: ignore[assignment]
    return offsets, x, g, S(*s), H(*h)


@triton.jit
def _pack_kernel(x_ptr, g_ptr, s_ptrs, y_ptrs, low_ptrs, scalars_ptr, n, SEND: tl.constexpr, HALFWAY: tl.constexpr,
                 S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
                 GUARD: tl.constexpr, TRAVELED: tl.constexpr):  # fmt: skip
    """y = SEND(x, g, s, h), or halfway between x and that"""
    offsets, x, g, s, h = _inputs(x_ptr, g_ptr, s_ptrs, low_ptrs, scalars_ptr, n, S, H, BLOCK, VECTOR, EVEN, GUARD,
                                  TRAVELED)  # fmt: skip
    y = SEND(x, g, s, h)
    if HALFWAY:
        y = (h.theta * (x + y[0]),)
    for k in tl.static_range(len(y_ptrs)):
        _store(y_ptrs[k], offsets, y[k], n, EVEN)


@triton.jit
def _combine_kernel(x_ptr, g_ptr, s_ptrs, r_ptrs, copy_ptrs, low_ptrs, scalars_ptr, n, SEND: tl.constexpr,
                    HALFWAY: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
                    EVEN: tl.constexpr, UPDATE: tl.constexpr, GUARD: tl.constexpr, SKIP: tl.constexpr,
                    TRAVELED: tl.constexpr):  # fmt: skip
    """x, s = UPDATE(x, g, s, pull, h) in place, pull[m] = sum_k w[k] (r[k, m] - q[m]).

    r_ptrs are the messages of the first neighbor, of the second, and so on. The new x is written to copy_ptrs too, in
    the type of each. SKIP is the place of a flag among the scalars, 0 for none: a flag that is not 0 leaves everything
    as it is.
    """
    if SKIP:
        if tl.load(scalars_ptr + SKIP) != 0.0:
            return
    offsets, x, g, s, h = _inputs(x_ptr, g_ptr, s_ptrs, low_ptrs, scalars_ptr, n, S, H, BLOCK, VECTOR, EVEN, GUARD,
                                  TRAVELED)  # fmt: skip
    y = SEND(x, g, s, h)
    if HALFWAY:
        y = (h.theta * (x + y[0]),)
    w = ()
    for k in tl.static_range(len(r_ptrs) // len(y)):
        w = w + (tl.load(scalars_ptr + 1 + len(H.names) + k),)  # type: ignore[assignment]
    pull = ()
    for m in tl.static_range(len(y)):
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(len(w)):
            r = _load(r_ptrs[k * len(y) + m], offsets, n, EVEN)
            q = y[m].to(r_ptrs[0].dtype.element_ty).to(tl.float32)  # my message as it was sent
            if k == 0:
                total = w[k] * _finite(r - q, GUARD)
            else:
                total += w[k] * _finite(r - q, GUARD)
        pull = pull + (total,)  # type: ignore[assignment]
    x, s = UPDATE(x, g, s, pull, h)
    _store(x_ptr, offsets, x, n, EVEN)
    for k in tl.static_range(len(S.names)):
        _store(s_ptrs[k], offsets, s[k], n, EVEN)
    for k in tl.static_range(len(copy_ptrs)):
        _store(copy_ptrs[k], offsets, x, n, EVEN)


INTERPRETED = not isinstance(_pack_kernel, triton.JITFunction)  # TRITON_INTERPRET=1
if INTERPRETED:  # the interpreter patches functions, and forgets this method
    tl.tensor.sqrt = lambda value: tl.sqrt(value)
