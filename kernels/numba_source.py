"""The source of numba's loops, with neighbors, messages and state buffers unrolled.

A loop over `range(len(weights))` inside cost a factor of 3.

`pack` writes past the cache. A plain store first reads the line that it overwrites: pack reached 54% of the in-place
axpy rate with plain stores and 83% with non-temporal ones. `combine` needs none of that, since it has read what it
overwrites. It reads as fast as axpy does, which bounds it where many neighbors make it read more to the byte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .trace import Equations

# Elements between bursts of non-temporal stores: 32 to 256 are alike (84% to 82% of axpy); 16, one line, halves it.
LINE = 64
# Bytes of a message, per thread, from which its stores pass the cache by. With the transport reading the message right
# afterwards: 64 KiB 0.52 ns per element against 0.38 with plain stores, 256 KiB 0.61 against 0.73, 16 MiB 0.76 : 0.94.
STREAM = 1 << 18

_NUMPY = {torch.float32: "np.float32", torch.float64: "np.float64"}


def loop(equations: Equations, d: int | None, types: tuple[torch.dtype, torch.dtype, torch.dtype]) -> str:
    """Source of `run(c, x, g, s0, s1, ..., r0, r1, ...)`: `pack` if d is None, else `combine` over d neighbors.

    c holds the scalars: h, the gradient's scale, the weights. s are the state buffers and r the messages. The names
    H, State, send and update must be there, and those of numba_tools.py.

    types: of x, of the gradient, of the messages.
    """
    _, _, state, fields, messages = equations
    real = _NUMPY[types[0]]

    def read(element: str, dtype: torch.dtype) -> str:
        name = {torch.bfloat16: "from_bfloat16", torch.float16: "from_float16"}.get(dtype, "")
        return f"{real}({name}({element}))"

    def write(value: str) -> str:
        return f"to_bfloat16({value})" if types[2] == torch.bfloat16 else f"{_NUMPY[types[2]]}({value})"

    rows = [f"r{k}" for k in range(messages if d is None else messages * d)]
    buffers = ["x", "g", *(f"s{k}" for k in range(len(state))), *rows]
    head = [
        f"def run(c, {', '.join(buffers)}):",
        f"    h = H({', '.join(f'c[{k}]' for k in range(len(fields)))})",
        f"    scale = c[{len(fields)}]",
    ]
    old = ", ".join(f"s{k}[i]" for k in range(len(state)))
    load = [f"s = {f'State({old})' if state else '()'}", f"gi = {read('g[i]', types[1])} * scale"]
    if d is None:
        return "\n".join(head + _pack_loop(buffers, rows, types[2].itemsize, load, write))

    pull = [f"{real}(0.0)"] * messages
    for k in range(messages if d else 0):
        own = read(write(f"y[{k}]"), types[2])
        pull[k] = " + ".join(f"({read(f'r{j * messages + k}[i]', types[2])} - {own}) * w{j}" for j in range(d))
    lines = [
        *load,
        *(["y = send(x[i], gi, s, h)"] if d else []),
        f"xi, new = update(x[i], gi, s, ({', '.join(pull)},), h)",
        "x[i] = xi",
        *(f"s{k}[i] = new[{k}]" for k in range(len(state))),
    ]
    weights = [f"    w{j} = c[{len(fields) + 1 + j}]" for j in range(d)]
    return "\n".join([*head, *weights, "    for i in range(x.size):", *(f"        {line}" for line in lines)])


def _pack_loop(
    buffers: list[str], rows: list[str], size: int, load: list[str], write: Callable[[str], str]
) -> list[str]:
    """The loop of `pack`: the rows' aligned middle goes through a small array and non-temporal stores."""
    stages = [f"t{k}" for k in range(len(rows))]

    def body(indent: str, targets: list[str], index: str) -> list[str]:
        stores = [f"{t}[{index}] = {write(f'y[{k}]')}" for k, t in enumerate(targets)]
        return [indent + line for line in (*load, "y = send(x[i], gi, s, h)", *stores)]

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
