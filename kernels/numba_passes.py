"""The compiled CPU passes: a rule's equations in one loop over flat buffers, by numba, at the speed of the memory.

The equations are compiled as they stand and called from a loop whose source is generated with neighbors, messages and
state buffers unrolled: a loop over `range(len(weights))` inside cost a factor of 3. Everything is computed in the type
of x, one rounding per + - * / and sqrt: without `fastmath` LLVM contracts nothing to FMA, so the message that `combine`
recomputes is the one that `pack` wrote, bit for bit, and equals what plain torch operations on the text give. (The
torch passes use FMA where there is one: theirs may differ in the last bit.)

`pack` writes past the cache: a plain store first reads the line it overwrites, and pack reached 54% of the in-place
axpy rate with plain stores, 83% with non-temporal ones. `combine` needs none of that, it has read what it overwrites;
it reads as fast as axpy does, which for many neighbors (more reading to the byte) is what bounds it.
"""

from __future__ import annotations

import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache

import numpy as np
import torch

from .torch_passes import Blocked

# Elements between bursts of non-temporal stores: 32 to 256 are alike (84% to 82% of axpy); 16, one line, halves it.
LINE = 64
# Bytes of a message, per thread, from which its stores pass the cache by. With the transport reading the message right
# afterwards: 64 KiB 0.52 ns per element against 0.38 with plain stores, 256 KiB 0.61 against 0.73, 16 MiB 0.76 : 0.94.
STREAM = 1 << 18
# Elements per thread at least. Handing a slice to a thread costs 40 us, in which one thread updates 2^17 elements that
# are in the cache; two threads first won at 2^20 elements in all (227 us against 280, DecentLaM at d = 1).
GRAIN = 1 << 19
# Types of buffers that the loop can read and write, by the type that carries them in numpy (which has no bfloat16).
_CARRIERS = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.uint16,
}


@cache
def available() -> bool:
    """Whether numba can be imported here (the optional extra `cpu`)."""
    try:
        import numba  # noqa: F401
    except Exception:  # also a numba that this version of numpy or Python breaks
        return False
    return True


class Compiled(Blocked):
    """The same interface and promises as `Blocked`, compiled at the first use of each pass (0.1 to 0.5 s).

    `warm` does nothing: slices of a bucket use what the bucket does, so all is compiled in the first steps, and no
    timeout or queue of a device runs meanwhile.

    Master type float32 or float64; gradients float32, float64, bfloat16 or float16; messages float32, float64 or
    bfloat16. Other types and buffers that are not contiguous run as in `Blocked`. Threads: as many as torch has. A
    pass may be called from several threads at once, on different buffers.
    """

    name = "numba"

    def _run(self, d, x, g, state, rows, wire) -> None:
        rule, (h, weights, scale, _) = self.rule, self.scalars
        buffers = (x, g, *state, *rows)
        types = (x.dtype, g.dtype, wire)
        if (
            x.dtype not in (torch.float32, torch.float64)
            or wire == torch.float16
            or not all(t.dtype in _CARRIERS and t.is_contiguous() and t.device.type == "cpu" for t in buffers)
            or any(t.dtype != x.dtype for t in state)
            or any(t.dtype != wire for t in rows)
        ):
            return super()._run(d, x, g, state, rows, wire)
        function = _compile(rule.send.fn, rule.update.fn, rule.state, h._fields, rule.messages, d, types)
        # Scalars travel in one array of the master type: no Python float to promote the arithmetic to float64.
        scalars = torch.tensor([*h, scale, *(weights if d else ())], dtype=x.dtype).numpy()
        _parallel(function, scalars, [t.view(_CARRIERS[t.dtype]).numpy() for t in buffers])


def _parallel(function, scalars, arrays) -> None:
    """function over slices of the arrays, one for each of torch's threads. The results do not depend on their number.

    Own threads, not numba's `prange`: its default pool on many machines ("workqueue") aborts the process when two
    threads call it, and packing runs in the hooks of the backward pass.
    """
    n = arrays[0].size
    parts = max(1, min(torch.get_num_threads(), n // GRAIN))
    if parts == 1:
        function(scalars, *arrays)
        return
    step = -(-n // parts // LINE) * LINE
    pool = _threads(torch.get_num_threads())
    pieces = [[a[lo : lo + step] for a in arrays] for lo in range(0, n, step)]
    rest = [pool.submit(function, scalars, *piece) for piece in pieces[1:]]
    function(scalars, *pieces[0])
    for future in rest:
        future.result()


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="fused_dlam")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


@lru_cache(maxsize=256)
def _compile(send, update, state, fields, messages, d, types):
    """The loop of `pack` (d is None) or of `combine` over d neighbors; numba compiles it when it is first called."""
    import numba

    def jit(function, **options):
        # numpy's division: Python's raises on 0, a branch that keeps the loop from being vectorized.
        return numba.njit(function, error_model="numpy", **options)

    namespace = {**_tools(), "H": namedtuple("H", fields), "State": namedtuple("State", state)}
    # Inlined before compilation: 0.13 to 0.35 s for a pass instead of 0.2 to 0.4 s.
    namespace.update(send=jit(send, inline="always"), update=jit(update, inline="always"), np=np)
    exec(_source(state, fields, messages, d, types), namespace)
    return jit(namespace["run"], nogil=True)


def _source(state, fields, messages, d, types) -> str:
    """Source of the loop. c holds the scalars, then x, g, the state s0, s1, ... and the messages r0, r1, ..."""
    numpy_name = {torch.float32: "np.float32", torch.float64: "np.float64"}
    real = numpy_name[types[0]]

    def read(element: str, dtype: torch.dtype) -> str:
        name = {torch.bfloat16: "from_bfloat16", torch.float16: "from_float16"}.get(dtype, "")
        return f"{real}({name}({element}))"

    def write(value: str) -> str:
        return f"to_bfloat16({value})" if types[2] == torch.bfloat16 else f"{numpy_name[types[2]]}({value})"

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


def _pack_loop(buffers, rows, size, load, write) -> list[str]:
    """The loop of `pack`: the rows' aligned middle goes through a small array and non-temporal stores."""
    stages = [f"t{k}" for k in range(len(rows))]

    def body(indent: str, targets, index: str) -> list[str]:
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


@cache
def _tools() -> dict:
    """What the generated loops call beside the rule: conversions that numba lacks, and non-temporal stores."""
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba import njit, types
    from numba.extending import intrinsic, overload_method

    @overload_method(types.Float, "sqrt")
    def _(value):
        return lambda value: np.sqrt(value)

    def cast(name, start, end, llvm):
        """An intrinsic that takes the same 32 bits for a value of another type."""

        def typing(context, value):
            return end(start), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], llvm)

        typing.__name__ = name
        return intrinsic(typing)

    as_float = cast("as_float", types.uint32, types.float32, ir.FloatType())
    as_bits = cast("as_bits", types.float32, types.uint32, ir.IntType(32))

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

    return {
        "from_bfloat16": from_bfloat16,
        "to_bfloat16": to_bfloat16,
        "from_float16": from_float16,
        "address": address,
        "stream": stream,
        "fence": fence,
    }
