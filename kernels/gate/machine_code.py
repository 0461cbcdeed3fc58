"""Reads machine code: how many memory accesses of which width, registers, spills, shared memory, loops, FMAs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # Triton's wheels bring them
SASS_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
AMD_WIDTH = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}


class Code(NamedTuple):
    """What one thread of a compiled kernel does."""

    loads: Counter  # bytes of one access -> number of instructions
    stores: Counter
    registers: int
    spills: int  # bytes or instructions: any is too many
    shared: int  # bytes
    barriers: int
    loops: int
    atomics: int
    fma: int


def read(kernel: Any, target: Any) -> Code:
    return _read_sass(kernel) if target.backend == "cuda" else _read_amdgcn(kernel)


def _read_sass(kernel: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", "-ndf", file.name)
    accesses: dict[str, Counter[int]] = {"LD": Counter(), "ST": Counter()}
    for op, modifiers in re.findall(r"\b(LD|ST)G?\b((?:\.\w+)*)", sass):
        accesses[op][next((SASS_WIDTH[m] for m in modifiers.split(".") if m in SASS_WIDTH), 4)] += 1
    return Code(
        loads=accesses["LD"],
        stores=accesses["ST"],
        registers=_number(r"REG:(\d+)", usage),
        spills=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage) + _count(r"\b(?:LDL|STL)\b", sass),
        shared=max(_number(r"SHARED:(\d+)", usage), kernel.metadata.shared),
        barriers=_count(r"\bBAR\.\w+", sass),
        loops=_backward_branches(sass),
        atomics=_count(r"\b(?:ATOM|ATOMG|RED|REDG)\b", sass),
        # `HFMA2 R1, -RZ, RZ, ...` is how ptxas loads a constant.
        fma=_count(r"\b[FHD]FMA2?\b(?!\S*\s+\w+, -RZ, RZ,)", sass),
    )


def _backward_branches(sass: str) -> int:
    """Branches to a label already passed; the branch to itself that closes every kernel is not one."""
    passed, last_is_empty, last, count = set(), False, None, 0
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            last, last_is_empty = label[1], True
            passed.add(last)
            continue
        branch = re.search(r"\bBRA\S*\s.*?`\((\.L_\w+)\)", line)
        if branch and branch[1] in passed and not (last_is_empty and branch[1] == last):
            count += 1
        if re.search(r"/\*[0-9a-f]{4,}\*/", line):
            last_is_empty = False
    return count


def _run(tool: str, *args: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def _read_amdgcn(kernel: Any) -> Code:
    text = kernel.asm["amdgcn"]
    accesses: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for op, width in re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", text, re.M):
        accesses[op][AMD_WIDTH.get(width, 2)] += 1  # ushort, short_d16_hi, b16 ...
    spilled = _number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.sgpr_spill_count:\s+(\d+)", text)
    return Code(
        loads=accesses["load"],
        stores=accesses["store"],
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=spilled + _count(r"\bscratch_(?:load|store)", text),
        shared=kernel.metadata.shared,
        barriers=_count(r"\bs_barrier", text),
        loops=_count(r"\bs_cbranch", text),  # straight-line code has no branch at all
        atomics=_count(r"\b(?:global|buffer|flat)_atomic", text),
        fma=_count(r"\bv_(?:pk_)?(?:fma|fmac|mac|mad|dot\d\w*)_(?:mix\w*_)?f\d+", text),
    )


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _number(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[0])
