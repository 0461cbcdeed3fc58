"""A rule's graph (trace.py) as torch operations in place, replayed block by block.

Evaluated as they stand, the equations make a fresh temporary for every + - * /. A replay runs
`torch.add(a, b, alpha=s, out=...)` instead: it computes equal expressions once (what `update` shares with `send`), puts
a product with a scalar inside the addition that takes it, and writes results over operands that are no longer needed,
else into a few scratch rows. DecentLaM's 17 operations become 7.

With one thread, 8.4M parameters and d = 1, DecentLaM's pack and combine take 22 + 75 ms as the equations stand, 11 + 24
ms replayed and 5 + 8 ms by numba; at 100k parameters 260 + 790, 178 + 164 and 131 + 63 us. With numba as a dependency
(207 MB, and 0.9 s of compiling in each process) and without replay, models too small to compile would run 3 times
slower, and GPUs that the Triton kernels do not serve would launch twice as many kernels (22 against 11).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .trace import Equations, Guard, Value, trace

# How an operation is written. {0}, {1}: operands, {s}: a scalar of the prologue, {out}: where the result goes.
_SOURCE = {
    "add": "add({0}, {1}, alpha={s}, out={out})",
    "shift": "add({0}, {s}, out={out})",
    "scale": "mul({0}, {s}, out={out})",
    "mul": "mul({0}, {1}, out={out})",
    "div": "div({0}, {1}, out={out})",
    "part": "div({0}, {s}, out={out})",
    "inverse": "div({0}.new_tensor({s}), {0}, out={out})",
    "sqrt": "sqrt({0}, out={out})",
    "finite": "nan_to_num({0}, nan=0.0, posinf=0.0, neginf=0.0, out={out})",
    "follow": "follow({0}, {1}, out={out})",
    "narrowed": "{out}.copy_({0}.to({1}.dtype))",
    "copy": "{out}.copy_({0})",
    "fill": "{out}.fill_({s})",
    "round": "{out}.copy_(narrow_.copy_({0}))",  # to the type of the messages (to nearest even) and back
}


def _sqrt(a: torch.Tensor, out: torch.Tensor) -> None:
    """Rounded once. On CPUs torch takes MKL's, which is off by a rounding for every fifth value of float32."""
    if a.device.type == "cpu" and a.dtype != torch.bfloat16:  # numpy has no bfloat16, and there MKL's error rounds away
        np.sqrt(a.numpy(), out=out.numpy())
    else:
        torch.sqrt(a, out=out)


def _follow(x: torch.Tensor, low: torch.Tensor, out: torch.Tensor) -> None:
    """x, or low where low is not x rounded to its type.

    Nearly always nobody wrote into low. On CPUs numpy finds that out in an eighth of the time of torch's comparison and
    choice (0.05 ms against 0.4 for a block); on other devices the answer would have to be waited for.
    """
    rounded = x.to(low.dtype)
    if low.device.type == "cpu" and low.dtype.itemsize == 2:
        if np.array_equal(low.view(torch.int16).numpy(), rounded.view(torch.int16).numpy()):
            if out is not x:
                out.copy_(x)
            return
    torch.where(low == rounded, x, low, out=out)


@lru_cache(maxsize=256)
def replay(
    equations: Equations, d: int | None, cast_g: bool, cast_wire: bool, scaled: bool, guard: Guard, low: bool
) -> tuple[Callable, int]:
    """A function that runs the pass block by block, and the number of scratch rows it needs. Arguments: see `trace`."""
    homes = _homes(trace(equations, d, cast_g=cast_g, cast_wire=cast_wire, scaled=scaled, guard=guard, low=low))
    order, last = _order(list(homes.values()))
    lines, scalars, scratch = _place(homes, order, last, full=d is not None)

    # x, g, low, s0, s1, r0, ... are whole buffers, x_ and so on a block of each; t0_, ... are scratch rows.
    blocks = sorted({f"{name}_" for name in (*(v.scalar for v in last if v.op == "buffer"), *homes)})
    source = [
        "def replay(block, h, w, scale, x, g, s, r, low, t, narrow):",
        *(f"    {name} = {text}" for text, name in scalars.items()),
        *(f"    {name[:-1]} = {name[0]}[{name[1:-1]}]" for name in blocks if name[0] in "sr"),
        *(f"    {name} = t[{name[1:-1]}]" for name in scratch),
        "    narrow_ = narrow",
        f"    for {', '.join(blocks)}, in zip({', '.join(f'{name[:-1]}.split(block)' for name in blocks)}):",
        f"        if (n := {blocks[0]}.shape[0]) < block:  # the last one",
        *(f"            {name} = {name}[:n]" for name in (*scratch, "narrow_")),
        *(f"        {line}" for line in lines),
    ]
    names = ("add", "mul", "div", "nan_to_num")
    namespace: dict[str, Any] = {"sqrt": _sqrt, "follow": _follow, **{name: getattr(torch, name) for name in names}}
    exec("\n".join(source), namespace)
    return namespace["replay"], len(scratch)


def _homes(results: list[tuple[str, Value]]) -> dict[str, Value]:
    """Buffer -> the operation that writes it, each buffer by one of its own.

    A constant, one value for two buffers, and a buffer handed on as another need a `fill` or a `copy` for that.
    """
    homes: dict[str, Value] = {}
    for name, v in results:
        if v.op == "scalar":
            v = Value(v.table, "fill", scalar=v.scalar)
        elif v in homes.values() or (v.op == "buffer" and v.scalar != name):
            v = Value(v.table, "copy", (v,))
        homes[name] = v
    return homes


def _order(results: list[Value]) -> tuple[list[Value], dict[Value, float]]:
    """The operations needed, in the order of the text (messages, pulls, update), and each value's last use."""
    last: dict[Value, float] = {}

    def visit(v: Value) -> None:
        if v not in last:
            last[v] = 0
            for operand in v.operands:
                visit(operand)

    for v in results:
        visit(v)
    written = {v: k for k, v in enumerate(dict.fromkeys([*results[0].table.values(), *results]))}
    order = sorted((v for v in last if v.op != "buffer"), key=written.__getitem__)
    for i, v in enumerate(order):
        last.update((operand, i) for operand in v.operands)
    last.update((v, float("inf")) for v in results)
    return order, last


def _place(
    homes: dict[str, Value], order: list[Value], last: dict[Value, float], full: bool
) -> tuple[list[str], dict[str, str], list[str]]:
    """The source of the operations, the scalars that they take, and the scratch rows.

    A result goes into its own buffer if what is there is no longer needed, else over an operand that ends here
    (2.7 ms per operation of 25.5M elements, 4.2 ms into a third row), else into a scratch row. full: the buffers to
    be written hold values at the start.
    """
    leaves = {v.scalar: v for v in last if v.op == "buffer"}
    place = {v: f"{name}_" for name, v in leaves.items()}
    held = {f"{name}_": leaves.get(name) if full else None for name in homes}  # what may be overwritten, what it holds
    home = {v: f"{name}_" for name, v in homes.items()}
    lines: list[str] = []
    scalars: dict[str, str] = {}
    scratch: list[str] = []
    for i, v in enumerate(order):
        ends = [place[o] for o in v.operands if last[o] == i and held.get(place[o]) is o]
        free = [*ends, *(p for p, o in held.items() if o is None or last[o] < i)]
        if home.get(v) in free:
            out = home[v]
        elif v not in home and any(p not in scratch for p in ends):
            out = next(p for p in ends if p not in scratch)
        elif any(p in scratch for p in free):
            out = next(p for p in free if p in scratch)
        else:
            out = f"t{len(scratch)}_"
            scratch.append(out)
        s = scalars.setdefault(v.scalar, f"k{len(scalars)}") if v.scalar else ""
        lines.append(_SOURCE[v.op].format(*(place[o] for o in v.operands), s=s, out=out))
        held[out], place[v] = v, out
    lines += [f"{name}_.copy_({place[v]})" for name, v in homes.items() if place[v] != f"{name}_"]
    return lines, scalars, scratch
