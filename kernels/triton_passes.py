"""The fused passes: two Triton kernels, generic over the rule, each one launch per bucket.

`_pack_kernel` reads what the message depends on and writes the messages; `_combine_kernel` reads x, g, the state and d
received messages, and writes x and the state in place. Nothing else goes through memory: the own message is
recomputed in registers, the pull is never stored, and loads that a rule's equations do not use are removed by the
compiler. Words of 4 bytes per parameter: DecentLaM 3 and 5 + d, PC-DmSGD 4 and 7 + d. `gate.py` counts them.

Letters: x parameter, g gradient, s state buffers, y messages, r received messages, h scalars, d neighbors.
"""

from __future__ import annotations

import os
from collections import namedtuple

import torch
import triton
import triton.language as tl

from .blocked import Scalars
from .rule import Rule, send_parameter

# Elements per program, four warps. The launch needs no mask where a buffer's length is a multiple of this.
BLOCK = 1024
WARPS = 4
# Consecutive elements per thread and access. Without this cap one bfloat16 operand makes Triton load 8 elements per
# thread and store 4 float32, and convert between the two through shared memory (4 KiB, up to 3 barriers).
VECTOR = 4
# Length of the device tensor that holds every scalar, h and weights together: its address never changes, so that a
# CUDA graph can be replayed with other values. Each neighbor is unrolled in the kernel: past some tens, all-reduce.
CAPACITY = 256

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@triton.jit
def _load(pointer, offsets, n, EVEN: tl.constexpr):
    if EVEN:
        value = tl.load(pointer + offsets)
    else:
        value = tl.load(pointer + offsets, mask=offsets < n, other=0.0)
    # At once: bfloat16 arithmetic is not what a rule means, and in the interpreter it is wrong without a word.
    return value.to(tl.float32)


@triton.jit
def _store(pointer, offsets, value, n, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=offsets < n)


@triton.jit
def _offsets(block, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    return block.to(tl.int64) * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)


@triton.jit
def _scalars(scalars_ptr, H: tl.constexpr):
    h = ()
    for k in tl.static_range(len(H._fields)):
        h = h + (tl.load(scalars_ptr + 1 + k),)
    return H(*h)


@triton.jit
def _state(s_ptrs, offsets, n, STATE: tl.constexpr, EVEN: tl.constexpr):
    s = ()
    for k in tl.static_range(len(s_ptrs)):
        s = s + (_load(s_ptrs[k], offsets, n, EVEN),)
    return STATE(*s)


@triton.jit
def _pack_kernel(
    x_ptr, g_ptr, s_ptrs, y_ptr, y_stride, scalars_ptr, n,
    SEND: tl.constexpr, STATE: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    offsets = _offsets(tl.program_id(0), BLOCK, VECTOR)
    h = _scalars(scalars_ptr, H)
    x = _load(x_ptr, offsets, n, EVEN)
    g = _load(g_ptr, offsets, n, EVEN) * tl.load(scalars_ptr)
    s = _state(s_ptrs, offsets, n, STATE, EVEN)
    y = SEND(x, g, s, h)
    for k in tl.static_range(len(y)):
        _store(y_ptr + tl.cast(y_stride, tl.int64) * k, offsets, y[k], n, EVEN)
