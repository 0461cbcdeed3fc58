"""What the generated loops call beside the rule: conversions that numba lacks, and stores that pass the cache by.

Importing this needs numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic, overload_method


@overload_method(types.Float, "sqrt")
def _sqrt(value):
    return lambda value: np.sqrt(value)


def _cast(name: str, start: Any, end: Any, llvm: Any) -> Callable:
    """An intrinsic that takes the same 32 bits for a value of another type."""

    def typing(context, value):
        return end(start), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], llvm)

    typing.__name__ = name
    return intrinsic(typing)


as_float = _cast("as_float", types.uint32, types.float32, ir.FloatType())
as_bits = _cast("as_bits", types.float32, types.uint32, ir.IntType(32))


@njit
def from_bfloat16(bits):
    return as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@njit
def to_bfloat16(value):
    """To nearest even, as torch rounds."""
    value = np.float32(value)
    bits = as_bits(value)
    rounded = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return rounded if value == value else np.uint16(0x7FC0)


@njit
def from_float16(bits):
    """Exponent and mantissa in float32's places are the value times 2^-112, subnormals included."""
    bits = np.uint32(bits)
    size = as_bits(as_float(np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112))
    special = np.uint32(0x7F800000) if bits & np.uint32(0x7C00) == np.uint32(0x7C00) else np.uint32(0)
    return as_float(np.uint32(size | special | ((bits & np.uint32(0x8000)) << np.uint32(16))))


@njit
def to_float16(value):
    """To nearest even. The last place of a number below 2^-14 is that of float32 at 0.5: adding 0.5 rounds to it."""
    bits = as_bits(np.float32(value))
    size = bits & np.uint32(0x7FFFFFFF)
    small = np.uint32(as_bits(as_float(size) + np.float32(0.5)) - np.uint32(0x3F000000))
    normal = np.uint32((size + np.uint32(0xFFF) + ((size >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13))
    normal = np.uint32(normal - np.uint32(112 << 10))
    rounded = small if size < np.uint32(113 << 23) else normal
    rounded = rounded if size < np.uint32(143 << 23) else np.uint32(0x7C00)  # 65520 rounds up to it by itself
    rounded = rounded if value == value else np.uint32(0x7E00)
    return np.uint16(rounded | ((bits >> np.uint32(16)) & np.uint32(0x8000)))


@njit
def address(array):
    return np.int64(array.ctypes.data)


@intrinsic
def stream(context, to, start):
    """Copies 64 bytes from `start` to `to`, a multiple of 64, by stores that do not read the line first."""

    def generate(context, builder, signature, arguments):
        line = ir.VectorType(ir.IntType(32), 16).as_pointer()
        to, start = (builder.inttoptr(a, line) for a in arguments)
        store = builder.store(builder.load(start, align=4), to, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fence(context):
    """Non-temporal stores are not ordered with later ones: whoever is told of the message must find it."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
