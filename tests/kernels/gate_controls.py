"""Negative controls: for each thing the gate forbids, a build that does it and must be refused for that reason."""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_dlam import jit, rules
from fused_dlam.kernels.gate.build import Verdict, build, judge
from fused_dlam.kernels.gate.cases import Case
from fused_dlam.kernels.triton_kernels import BLOCK, _combine_kernel


@jit
def update_with_a_loop(x, g, s, pull, h):
    m = g + pull[0]
    for _ in range(1000):
        m = h.momentum * (x + m)
    return x - h.lr * m, (h.weight_decay * m + s.momentum_buffer,)


@jit
def update_with_a_sum(x, g, s, pull, h):
    m = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * m + pull[0], (m * tl.sum(m),)


@triton.jit
def _atomic_kernel(x_ptr, g_ptr, s_ptrs, r_ptrs, copy_ptrs, low_ptrs, scalars_ptr, n, SEND: tl.constexpr,
                   HALFWAY: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
                   VECTOR: tl.constexpr, EVEN: tl.constexpr, UPDATE: tl.constexpr, GUARD: tl.constexpr,
                   SKIP: tl.constexpr,
                   TRAVELED: tl.constexpr):  # fmt: skip
    _combine_kernel(x_ptr, g_ptr, s_ptrs, r_ptrs, copy_ptrs, low_ptrs, scalars_ptr, n, SEND, HALFWAY, S, H, BLOCK,
                    VECTOR, EVEN, UPDATE, GUARD, SKIP, TRAVELED)  # fmt: skip
    tl.atomic_add(scalars_ptr, 1.0)


class Control(NamedTuple):
    what: str
    reason: str  # the failure that must be among those found
    changes: dict  # to Case and to build
    d: int = 3
    types: tuple[str, str] = ("fp32", "fp32")
    nvidia_only: bool = False


CONTROLS = [
    Control("pointers not aligned to 16 bytes", "width", {"aligned": (False, True)}),
    Control("a mask, the length no multiple of 16", "width", {"even": False, "aligned": (True, False)}),
    Control("one more buffer read than declared", "traffic", {"d": 4}),
    Control("an update with a loop", "loops", {"update": update_with_a_loop}),
    Control("an update with a sum over the block", "barriers", {"update": update_with_a_sum}),
    Control("an atomic", "atomics", {"kernel": _atomic_kernel}),
    Control("FMAs on the bfloat16 path", "fma", {"enable_fp_fusion": True}, types=("bf16", "fp32")),
    # With 64 lanes and so 4 elements a thread, an AMD GPU has no wider access to cap; and maxnreg is ptxas's.
    Control("accesses not capped, bfloat16", "shared", {"vector": 1024}, types=("bf16", "fp32"), nvidia_only=True),
    Control("32 registers and no more", "spills", {"maxnreg": 32}, d=6, nvidia_only=True),
    Control("blocks of 4096 elements", "registers", {"block": 4096}),
]


def run(control: Control, architecture: str) -> Verdict:
    """Builds the changed pass and judges it by the floor of the unchanged one."""
    case = Case(rules.dmsgd, "atc", "combine", *control.types, control.d)
    changes = dict(control.changes)
    built = build(case._replace(d=changes.pop("d", case.d)), architecture, **changes)
    return judge(case, architecture, built, changes.get("block", BLOCK))
