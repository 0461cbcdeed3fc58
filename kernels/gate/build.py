"""Compiles a pass for a GPU that need not be there, and judges its machine code by the rule's floor."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from ..triton_kernels import BLOCK, OPTIONS, VECTOR, WARPS, Fields, _combine_kernel, _pack_kernel
from ..triton_passes import SKIP
from .cases import Case
from .floor import SIZE
from .machine_code import Code, read

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ALIGNED = [["tt.divisibility", 16]]  # what Triton's launcher says of a pointer or a length that is a multiple of 16
# FMAs that make a division on AMD GPUs, the same wherever it is computed. (NVIDIA's has none.)
HIP_DIVISION = 5


def build(
    case: Case,
    architecture: str,
    kernel: Any = None,
    update: Any = None,
    block: int = BLOCK,
    vector: int = VECTOR,
    even: bool = True,
    aligned: tuple[bool, bool] = (True, True),
    guard: bool = True,
    **options: Any,
) -> Any:
    """The case compiled as `TritonPasses` launches it where there are several workers.

    Only the negative controls, in tests/, pass more arguments.

    aligned: whether pointers, and whether the length, are known to be multiples of 16.
    """
    rule, d = case.rule, case.d
    kernel = kernel or (_pack_kernel if case.packs else _combine_kernel)
    message = f"*{case.message}"
    types = {
        "x_ptr": "*fp32",
        "g_ptr": f"*{case.gradient}",
        "s_ptrs": ("*fp32",) * len(rule.state),
        "y_ptrs": (message,) * rule.messages,
        "r_ptrs": (message,) * (d * rule.messages),
        "copy_ptrs": (message,) * (case.pass_ in ("emit", "follow")),
        "low_ptrs": (message,) * case.follows,
        "scalars_ptr": "*fp32",
        "n": "i32",
    }
    constants = {
        "SEND": rule.whole, "HALFWAY": rule.halfway, "UPDATE": update or rule.update,
        "S": Fields(rule.state), "H": Fields(rule.H._fields),
        "BLOCK": block, "VECTOR": vector, "EVEN": even,
        "GUARD": guard, "TRAVELED": rule.traveled,
        "SKIP": SKIP if case.pass_ == "skips" else 0,
    }  # fmt: skip
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {}
    for i, type_ in enumerate(signature.values()):
        if type_ != "constexpr" and aligned[type_ == "i32"]:
            paths = [(i, k) for k in range(len(type_))] if isinstance(type_, tuple) else [(i,)]
            attributes.update(dict.fromkeys(paths, ALIGNED))
    source = ASTSource(kernel, signature, {k: v for k, v in constants.items() if k in signature}, attributes)
    return compile(source, target=TARGETS[architecture], options={**OPTIONS, **options})


class Verdict(NamedTuple):
    code: Code
    bytes: float  # moved per parameter
    loads: str  # `8x128+2x64`: accesses of how many bits, for 8 elements
    stores: str
    failures: list[str]


def judge(case: Case, architecture: str, kernel: Any, block: int = BLOCK) -> Verdict:
    """Every way in which compiled code misses the floor; none, if it meets it."""
    target, floor = TARGETS[architecture], case.floor
    code = read(kernel, target)
    elements = block // (WARPS * target.warp_size)  # for each thread
    # Scalars are one 4-byte load each. AMD GPUs load them through the scalar unit, which is not counted.
    scalars = Counter({4: floor.scalars if target.backend == "cuda" else 0})
    seen = {"loads": code.loads - scalars, "stores": code.stores}
    moved = sum(width * n for accesses in seen.values() for width, n in accesses.items()) / elements
    failures = []
    if moved != floor.bytes:
        failures.append(f"traffic: {moved:g} bytes per parameter, floor {floor.bytes}")
    shown = {}
    for what, buffers in (("loads", floor.loads), ("stores", floor.stores)):
        shown[what] = _widths(Counter({width: 8 * n // elements for width, n in seen[what].items()}))
        wanted: Counter[int] = Counter()
        for type_, n in buffers.items():
            wanted[VECTOR * SIZE[type_]] += 8 * n // VECTOR
        if shown[what] != _widths(wanted):
            failures.append(f"width: {what} {shown[what]}, not {_widths(wanted)}")
    for what in ("spills", "shared", "barriers", "loops", "atomics", "fma"):
        count = getattr(code, what)
        if what == "fma" and target.backend == "hip":
            divisions, other = divmod(count, HIP_DIVISION * elements)
            count = count if other or divisions > floor.divisions else 0
        if count:
            failures.append(f"{what}: {count}")
    if code.registers > case.ceiling(architecture):
        failures.append(f"registers: {code.registers}, ceiling {case.ceiling(architecture)}")
    return Verdict(code, moved, **shown, failures=failures)


def _widths(accesses: Counter) -> str:
    return "+".join(f"{n}x{8 * width}" for width, n in sorted(accesses.items(), reverse=True) if n) or "none"
