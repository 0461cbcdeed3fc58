"""8-bit messages in two Triton kernels: what layers/compression.py and engine/compressed.py do in a dozen operations.

    quantize     v = y + e  ->  codes, scales                          reads 8 bytes a parameter, writes 1
    dequantize   rows y + (D(data_k) - D(data)),  e' = v - D(data)     reads 9 + d, writes 4 (d + 1)

One launch each for a bucket (for each part of a machine), bit for bit what torch gives: every operation is rounded by
itself, and the order is the same. D(data) is never stored.

In pack and combine 12 + 8 d bytes a parameter more would stay in registers: y and the rows. But those run over slices
of a bucket where a parameter has no gradient, whose ends lie within a scale's block, and a message that is recalled is
encoded anew from y. And 8 bits are for networks that take far longer than this: at 10 Gbit/s a byte takes 0.8 ns, at
4 TB/s the 20 bytes of a parameter with one neighbor 0.005 ns.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .triton_kernels import BLOCK, OPTIONS, _finite


@triton.jit
def _load_code(codes_ptr, scales_ptr, program, BLOCK: tl.constexpr, QUANTUM: tl.constexpr):
    """D(data). -128 is a value that is not finite."""
    BLOCKS: tl.constexpr = BLOCK // QUANTUM
    code = tl.load(codes_ptr + program * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    scale = tl.load(scales_ptr + program * BLOCKS + tl.arange(0, BLOCKS))
    scale = tl.reshape(tl.broadcast_to(tl.expand_dims(scale, 1), [BLOCKS, QUANTUM]), [BLOCK])
    return tl.where(code == -128.0, float("nan"), code * scale)


@triton.jit
def _quantize_kernel(y_ptr, e_ptr, codes_ptr, scales_ptr, used, BLOCK: tl.constexpr, QUANTUM: tl.constexpr):
    """The codes and scales of y + e. What lies from `used` on is padding, and counts as zero."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(y_ptr + offsets) + tl.load(e_ptr + offsets)
    v = tl.reshape(tl.where(offsets < used, v, 0.0), [BLOCK // QUANTUM, QUANTUM])
    good = tl.abs(v) <= 3.4028234663852886e38  # NaN compares false
    scale = tl.max(tl.where(good, tl.abs(v), 0.0), axis=1) * (1.0 / 127.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    inverse = tl.where(scale > 0.0, tl.div_rn(1.0, tl.where(scale > 0.0, scale, 1.0)), 0.0)
    whole = tl.reshape(v * tl.expand_dims(inverse, 1), [BLOCK])
    whole = (whole + 12582912.0) - 12582912.0  # to nearest, ties to even: 1.5 * 2^23 has no digits after the point
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    code = tl.where(tl.reshape(good, [BLOCK]), whole, -128.0)
    tl.store(codes_ptr + offsets, code.to(tl.int8))
    places = program * (BLOCK // QUANTUM) + tl.arange(0, BLOCK // QUANTUM)
    tl.store(scales_ptr + places, scale)


@triton.jit
def _dequantize_kernel(y_ptr, e_ptr, codes_ptr, scales_ptr, heard_ptrs, heard_scales_ptrs, row_ptrs, used,
                       BLOCK: tl.constexpr, QUANTUM: tl.constexpr):  # fmt: skip
    """A row for each message that was heard, and e'."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    y, e = tl.load(y_ptr + offsets), tl.load(e_ptr + offsets)
    own = _load_code(codes_ptr, scales_ptr, program, BLOCK, QUANTUM)
    for k in tl.static_range(len(row_ptrs)):
        heard = _load_code(heard_ptrs[k], heard_scales_ptrs[k], program, BLOCK, QUANTUM)
        tl.store(row_ptrs[k] + offsets, (heard - own) + y)
    left = _finite((e + y) - own, True)
    tl.store(e_ptr + offsets, tl.where(offsets < used, left, 0.0))


def fits(n: int, block: int) -> bool:
    """Whether the kernels take n numbers with a scale for every `block`."""
    return n % BLOCK == 0 and 16 <= block <= BLOCK and BLOCK % block == 0


def quantize(y: Tensor, e: Tensor, codes: Tensor, scales: Tensor, used: int, block: int) -> None:
    """y, e float32 [n]; writes codes, int8 [n], and scales, float32 [n / block]. n and block as `fits` says."""
    _quantize_kernel[(y.numel() // BLOCK,)](y, e, codes, scales, used, BLOCK, block, **OPTIONS)


def dequantize(
    y: Tensor,
    e: Tensor,
    own: tuple[Tensor, Tensor],
    heard: Sequence[tuple[Tensor, Tensor]],
    rows: Sequence[Tensor],
    used: int,
    block: int,
) -> None:
    """Writes rows, float32 [n] each, and e in place. own, heard: codes and scales."""
    codes, scales = (tuple(pair[i] for pair in heard) for i in (0, 1))
    _dequantize_kernel[(y.numel() // BLOCK,)](
        y, e, *own, codes, scales, tuple(rows), used, BLOCK, block, **OPTIONS
    )  # fmt: skip
