"""The source of numba's loops, with neighbors, messages and state buffers unrolled.

A loop over `range(len(weights))` inside cost a factor of 3.

`pack` writes past the cache. A plain store first reads the line that it overwrites: pack reached 54% of the in-place
axpy rate with plain stores and 83% with non-temporal ones. `combine` needs none of that, since it has read what it
overwrites. It reads as fast as axpy does, which bounds it where many neighbors make it read more to the byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .trace import Equations

# Elements between bursts of non-temporal stores: 32 to 256 are alike (84% to 82% of axpy); 16, one line, halves it.
LINE = 64
# Bytes of a message, per thread, from which its stores pass the cache by. With the transport reading the message right
# afterwards: 64 KiB 0.52 ns per element against 0.38 with plain stores, 256 KiB 0.61 against 0.73, 16 MiB 0.76 : 0.94.
STREAM = 1 << 18

_SHORT = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  # what numba_tools.py converts, from and to
_NUMPY = {torch.float32: "np.float32", torch.float64: "np.float64"}


class Types(NamedTuple):
    """Of the buffers: x and the state, the gradient, the messages, and the low parameters if there are any."""

    x: torch.dtype
    g: torch.dtype
    wire: torch.dtype
    low: torch.dtype | None = None


def loop(equations: Equations, d: int | None, types: Types, guard: bool) -> str:
    """Source of `run(c, x, g, s0, s1, ..., r0, r1, ..., low)`: `pack` if d is None, else `combine` over d neighbors.

    c holds the scalars: h, the gradient's scale, the weights. s are the state buffers and r the messages. The names
    H, State, send and update must be there, and those of numba_tools.py.
    """
    _, _, state, fields, messages, halfway, traveled = equations
    real = _NUMPY[types.x]

    def read(element: str, dtype: torch.dtype) -> str:
        return f"{real}({f'from_{_SHORT[dtype]}' if dtype in _SHORT else ''}({element}))"

    def write(value: str, dtype: torch.dtype) -> str:
        return f"to_{_SHORT[dtype]}({value})" if dtype in _SHORT else f"{_NUMPY[dtype]}({value})"

    def finite(name: str) -> list[str]:
        """Comparing with NaN is false, and the largest number is as wide as what it is compared with."""
        largest = f"{real}({torch.finfo(types.x).max!r})"
        return [f"{name} = {name} if abs({name}) <= {largest} else {real}(0.0)"] if guard else []

    rows = [f"r{k}" for k in range(messages if d is None else messages * d)]
    buffers = ["x", "g", *(f"s{k}" for k in range(len(state))), *rows, *([] if types.low is None else ["low"])]
    head = [
        f"def run(c, {', '.join(buffers)}):",
        f"    h = H({', '.join(f'c[{k}]' for k in range(len(fields)))})",
        f"    scale = c[{len(fields)}]",
    ]
    old = ", ".join(f"s{k}[i]" for k in range(len(state)))
    load = ["xi = x[i]"]
    if types.low is not None:  # NaN equals nothing: x follows a low that is NaN, and one that is not where x is
        load += [
            f"li = {read('low[i]', types.low)}",
            f"xi = xi if li == {read(write('xi', types.low), types.low)} else li",
        ]
    g = read("g[i]", types.g)
    if traveled:
        g = f"({read(write('xi', types.g), types.g)} - {g})"
    load += [f"s = {f'State({old})' if state else '()'}", f"gi = {g} * scale", *finite("gi")]
    if d != 0:
        load += ["y = send(xi, gi, s, h)", *(["y = (h.theta * (xi + y[0]),)"] if halfway else [])]
    if d is None:
        return "\n".join(head + _pack_loop(buffers, rows, types.wire, load, write))

    pull, differences = [f"{real}(0.0)"] * messages, []
    for k in range(messages if d else 0):
        own = read(write(f"y[{k}]", types.wire), types.wire)
        for j in range(d):
            row = f"{j * messages + k}"
            differences += [f"d{row} = {read(f'r{row}[i]', types.wire)} - {own}", *finite(f"d{row}")]
        pull[k] = " + ".join(f"d{j * messages + k} * w{j}" for j in range(d))
    lines = [
        *load,
        *differences,
        f"xi, new = update(xi, gi, s, ({', '.join(pull)},), h)",
        "x[i] = xi",
        *(f"s{k}[i] = new[{k}]" for k in range(len(state))),
    ]
    weights = [f"    w{j} = c[{len(fields) + 1 + j}]" for j in range(d)]
    return "\n".join([*head, *weights, "    for i in range(x.size):", *(f"        {line}" for line in lines)])


def _pack_loop(
    buffers: list[str],
    rows: list[str],
    wire: torch.dtype,
    load: list[str],
    write: Callable[[str, torch.dtype], str],
) -> list[str]:
    """The loop of `pack`: the rows' aligned middle goes through a small array and non-temporal stores."""
    size, stages = wire.itemsize, [f"t{k}" for k in range(len(rows))]

    def body(indent: str, targets: list[str], index: str) -> list[str]:
        stores = [f"{t}[{index}] = {write(f'y[{k}]', wire)}" for k, t in enumerate(targets)]
        return [indent + line for line in (*load, *stores)]

    def cut(lo: str, hi: str) -> str:
        return f"{', '.join(buffers)} = {', '.join(f'whole_{b}[{lo}:{hi}]' for b in buffers)}"

    return [
        *(f"    whole_{b} = {b}" for b in buffers),
        "    n = x.size",
        f"    head = (-address(r0) % 64) // {size}",
        f"    if n * {size} < {STREAM}{''.join(f' or (address({r}) - address(r0)) % 64' for r in rows[1:])}:",
        "        head = n",
        f"    tail = head + (n - head) // {LINE} * {LINE}",
        "    for lo, hi in ((0, head), (tail, n)):",
        f"        {cut('lo', 'hi')}",
        "        for i in range(x.size):",
        *body("            ", rows, "i"),
        f"    {cut('head', 'tail')}",
        *(f"    {t} = np.empty({LINE}, {r}.dtype)" for t, r in zip(stages, rows, strict=True)),
        f"    for lo in range(0, x.size, {LINE}):",
        f"        for j in range({LINE}):",
        "            i = lo + j",
        *body("            ", stages, "j"),
        f"        for b in range(0, {LINE * size}, 64):",
        *(
            f"            stream(address({r}) + lo * {size} + b, address({t}) + b)"
            for t, r in zip(stages, rows, strict=True)
        ),
        "    fence()",
    ]
