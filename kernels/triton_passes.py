"""The fused passes: two Triton kernels, generic over the rule, one launch each per bucket.

`_pack_kernel` writes the messages; `_combine_kernel` reads x, g, the state and d received messages and writes x and
the state in place. Nothing else goes through memory: the own message is recomputed in registers, the pull is never
stored, and loads of buffers that a rule's equations do not use are removed by the compiler. Words of 4 bytes per
parameter in pack and combine: DecentLaM 3 and 5 + d, PC-DmSGD 4 and 7 + d. `gate.py` counts them.

Letters: x parameter, g gradient, s state buffers, y messages, r received messages, h scalars, d neighbors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import namedtuple
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .blocked import Scalars
from .rule import Rule, send_parameter

# Elements per program. A buffer whose length is a multiple of it is read and written without a mask.
BLOCK = 1024
WARPS = 4
# Elements per thread and access. Without this cap one bfloat16 operand makes Triton load 8 elements per thread and
# store 4 float32, and convert between the two through shared memory (4 KiB and up to 3 barriers per program).
VECTOR = 4
# With multiply and add contracted, as is the default, pack and combine could round the same message differently, and
# a 1-ulp difference of bfloat16 messages does not cancel between workers. These kernels wait for memory, not for math.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}
# Scalars at most, weights included, in the device tensor that holds them. Neighbors are unrolled in the kernel.
CAPACITY = 256

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what gradients and messages may be


@dataclass(frozen=True)
class Fields:
    """Makes a named tuple inside a kernel, whose constant it is.

    Not the named tuple's class itself: Triton's launcher fails on one among the constants, and keys its cache on the
    text of a constant, so that a rule which lists the same scalars in another order could get another's kernel.
    """

    names: tuple[str, ...]

    def __call__(self, *values):
        return _tuple_class(self.names)(*values)


@functools.cache
def _tuple_class(names):
    return namedtuple("Fields", names)


@triton.jit
def _load(ptr, offsets, n, EVEN: tl.constexpr, EVICT: tl.constexpr = ""):
    if EVEN:
        value = tl.load(ptr + offsets, eviction_policy=EVICT)
    else:
        value = tl.load(ptr + offsets, mask=offsets < n, other=0.0, eviction_policy=EVICT)
    return value.to(tl.float32)  # at once: arithmetic in bfloat16 would round, and the interpreter gets it wrong


@triton.jit
def _store(ptr, offsets, value, n, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptr + offsets, value.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=offsets < n)


@triton.jit
def _inputs(x_ptr, g_ptr, s_ptrs, scalars_ptr, n, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
            VECTOR: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr = ""):  # fmt: skip
    """This program's offsets, and x, g, s, h as an equation takes them."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    x = _load(x_ptr, offsets, n, EVEN)
    g = _load(g_ptr, offsets, n, EVEN, EVICT) * tl.load(scalars_ptr)
    s = ()
    for k in tl.static_range(len(S.names)):
        s = s + (_load(s_ptrs[k], offsets, n, EVEN),)  # type: ignore[assignment]
    h = ()
    for k in tl.static_range(len(H.names)):
        h = h + (tl.load(scalars_ptr + 1 + k),)  # type: ignore[assignment]
    return offsets, x, g, S(*s), H(*h)


@triton.jit
def _pack_kernel(x_ptr, g_ptr, s_ptrs, y_ptrs, scalars_ptr, n, SEND: tl.constexpr, S: tl.constexpr,
                 H: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """y = SEND(x, g, s, h)"""
    offsets, x, g, s, h = _inputs(x_ptr, g_ptr, s_ptrs, scalars_ptr, n, S, H, BLOCK, VECTOR, EVEN)
    y = SEND(x, g, s, h)
    for k in tl.static_range(len(y_ptrs)):
        _store(y_ptrs[k], offsets, y[k], n, EVEN)


@triton.jit
def _combine_kernel(x_ptr, g_ptr, s_ptrs, r_ptrs, next_ptrs, scalars_ptr, n, SEND: tl.constexpr,
                    UPDATE: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
                    EVEN: tl.constexpr, EVICT: tl.constexpr = ""):  # fmt: skip
    """x, s = UPDATE(x, g, s, pull, h) in place, pull[m] = sum_k w[k] (r[k, m] - q[m]).

    r_ptrs are pointers to the messages of the first neighbor, of the second, and so on. next_ptrs is empty, or one
    pointer: the new x is written there too, in the type of the messages. EVICT: how L2 treats what is read for the
    last time here, gradients and received messages.
    """
    offsets, x, g, s, h = _inputs(x_ptr, g_ptr, s_ptrs, scalars_ptr, n, S, H, BLOCK, VECTOR, EVEN, EVICT)
    y = SEND(x, g, s, h)
    w = ()
    for k in tl.static_range(len(r_ptrs) // len(y)):
        w = w + (tl.load(scalars_ptr + 1 + len(H.names) + k),)  # type: ignore[assignment]
    pull = ()
    for m in tl.static_range(len(y)):
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(len(w)):
            r = _load(r_ptrs[k * len(y) + m], offsets, n, EVEN, EVICT)
            q = y[m].to(r_ptrs[0].dtype.element_ty).to(tl.float32)  # my message as it was sent
            if k == 0:
                total = w[k] * (r - q)
            else:
                total += w[k] * (r - q)
        pull = pull + (total,)  # type: ignore[assignment]
    x, s = UPDATE(x, g, s, pull, h)
    _store(x_ptr, offsets, x, n, EVEN)
    for k in tl.static_range(len(S.names)):
        _store(s_ptrs[k], offsets, s[k], n, EVEN)
    for k in tl.static_range(len(next_ptrs)):
        _store(next_ptrs[k], offsets, x, n, EVEN)


if not isinstance(_pack_kernel, triton.JITFunction):  # the interpreter patches functions, and forgets this method
    tl.tensor.sqrt = lambda value: tl.sqrt(value)


def _equation(function):
    # The interpreter calls nested functions only where triton.language is among their globals; an equation needs none.
    return function if isinstance(function, triton.JITFunction) else function.fn


def missing(device: torch.device) -> str | None:
    """What these kernels lack to run on a device, or None if they can."""
    if not isinstance(_pack_kernel, triton.JITFunction):  # TRITON_INTERPRET=1
        return None
    if device.type != "cuda":
        return f"the Triton kernels need a GPU, and the parameters are on {device}"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0 or newer, and {device} has {capability}"
    if capability >= (10, 0) and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        # The ptxas 12.9 it brings contracts packed arithmetic in spite of OPTIONS: 24 FMAs in a pack, 0 in its combine.
        return f"on compute capability {capability} the Triton kernels need triton 3.7, this is {triton.__version__}"
    return None


class Fused:
    """The passes as Triton kernels: the same `set`, `pack` and `combine` as `Blocked`, for float32 x and state.

    Gradients and messages are float32, bfloat16 or float16. Buffers of any length and alignment work; those padded to
    a multiple of BLOCK elements and aligned to 16 bytes run at the memory's speed. All scalars, weights included, are
    read from one device tensor at a fixed address: other values need no compilation and no host synchronization, and
    a captured CUDA graph takes them at its next replay (call `set` outside the capture, on the stream of the replay).

    Raises TypeError for types it does not take, ValueError for shapes that do not fit.
    """

    name = "triton"

    def __init__(
        self,
        rule: Rule,
        device: torch.device | str = "cuda",
        block: int = BLOCK,
        warps: int = WARPS,
        evict: str = "",
    ):
        self.rule, self.device, self.block, self.evict = rule, torch.device(device), block, evict
        self._options = {**OPTIONS, "num_warps": warps}
        self.scalars = Scalars((), ())
        self._send, self._update = _equation(rule.send), _equation(rule.update)
        self._fields = {"S": Fields(rule.state), "H": Fields(rule.H._fields)}
        self._values = torch.zeros(CAPACITY, dtype=torch.float32, device=self.device)
        self._current: tuple[float, ...] = ()
        self._streams: set = set()  # those on which the current values are in place

    def set(self, scalars: Scalars) -> None:
        values = (scalars.grad_scale, *scalars.h, *scalars.weights)
        if len(values) > CAPACITY:
            raise ValueError(
                f"{len(scalars.weights)} neighbors are too many for the Triton kernels, which unroll them"
                f" ({CAPACITY} scalars at most): use a sparser topology, or fused=False"
            )
        self.scalars = scalars
        late = {i: v for i, v in enumerate(values) if isinstance(v, torch.Tensor)}  # on a device: not read by the host
        values = tuple(math.nan if i in late else v for i, v in enumerate(values))
        if values == self._current and not late:
            return
        self._current = values
        host = torch.tensor(values, dtype=torch.float64).to(torch.float32)
        if self.device.type != "cuda":
            self._write(host, late)
            return
        stream = torch.cuda.current_stream(self.device)
        for other in self._streams - {stream}:  # a pass there may still read the last step's values
            stream.wait_stream(other)
        # Fresh pinned memory each time: torch gives it out again only after the copy that reads it has ended.
        self._write(host.pin_memory(), late)
        self._streams, self._written = {stream}, stream.record_event()

    def _write(self, host, late) -> None:
        self._values[: len(host)].copy_(host, non_blocking=True)
        for i, value in late.items():
            self._values[i].copy_(value, non_blocking=True)

    def pack(self, x, g, state, messages) -> None:
        """Writes this worker's messages [messages, N]."""
        messages = tuple(messages)
        self._check(x, g, state, messages, self.rule.messages)
        if x.numel():
            with self._ready():
                _pack_kernel[self._grid(x)](
                    x, g, tuple(state), messages, self._values, x.numel(),
                    SEND=self._send, **self._fields, **self._shape(x), **self._options,
                )  # fmt: skip

    def combine(self, x, g, state, received, next_message=None) -> None:
        """Updates x and state in place from the received messages, the first len(weights) of them.

        received is [d, messages, N]: one tensor, or rows anywhere this device can read, such as peers' memory mapped
        here. next_message [1, N], for rules that send x itself: the new x is written there too, in its type.
        """
        d = len(self.scalars.weights)
        if d and isinstance(received, torch.Tensor):
            rows = received[:d].flatten(0, 1).unbind(0)
        else:
            rows = tuple(row for messages in received[:d] for row in messages)
        self._check(x, g, state, rows, d * self.rule.messages)
        emit = () if next_message is None else tuple(next_message)
        if emit:
            if self.rule.send is not send_parameter:
                raise ValueError(f"the next message of {self.rule.name!r} needs the next gradient: use pack")
            self._check(x, g, state, emit, 1)
        if x.numel():
            with self._ready():
                _combine_kernel[self._grid(x)](
                    x, g, tuple(state), rows, emit, self._values, x.numel(),
                    SEND=self._send, UPDATE=self._update, **self._fields, **self._shape(x), EVICT=self.evict,
                    **self._options,
                )  # fmt: skip

    def _grid(self, x):
        return (triton.cdiv(x.numel(), self.block),)

    def _shape(self, x):
        return {"BLOCK": self.block, "VECTOR": VECTOR, "EVEN": x.numel() % self.block == 0}

    def _check(self, x, g, state, messages, count) -> None:
        if not self._current:
            raise RuntimeError("call set before pack and combine")
        for t in (x, *state):
            if t.dtype != torch.float32:
                raise TypeError(f"the Triton kernels keep x and state in float32, got {t.dtype}: use fused=False")
        for t in (g, *messages):
            if t.dtype not in NARROW:
                raise TypeError(f"the Triton kernels take no gradients or messages in {t.dtype}: use fused=False")
        if len(state) != len(self.rule.state) or len(messages) != count:
            raise ValueError(
                f"{self.rule.name!r} has {len(self.rule.state)} state buffers and here {count} messages, got"
                f" {len(state)} and {len(messages)}"
            )
        n = x.numel()
        for t in (x, g, *state, *messages):
            if t.shape != (n,) or not t.is_contiguous():
                raise ValueError(f"buffers must be flat, contiguous and of length {n}, got {tuple(t.shape)}")
        if len({t.dtype for t in messages}) > 1:
            raise ValueError("messages must all have one type")

    @contextlib.contextmanager
    def _ready(self):
        """The kernels' device, on a stream where the values of `set` are in place."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream not in self._streams and not torch.cuda.is_current_stream_capturing():
                stream.wait_event(self._written)
                self._streams.add(stream)
            yield
