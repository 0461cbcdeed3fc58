"""The fused passes: a rule's two Triton kernels over flat buffers, one launch each per bucket."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ..rules.rule import Rule
from ..rules.scalars import Scalars
from .triton_kernels import BLOCK, INTERPRETED, OPTIONS, WARPS, Fields, _combine_kernel, _pack_kernel
from .triton_launch import Buffers, Launcher, parts, rows_of

if TYPE_CHECKING:
    from .passes import Received, Rows

# The device tensor of scalars has room for this many, weights included. The kernel unrolls the neighbors.
CAPACITY = 256
SKIP = CAPACITY - 1  # the place of the flag of a step that nobody takes

NARROW = (torch.float32, torch.bfloat16, torch.float16)  # what gradients, messages, copies and low may be
# Slices of a bucket start at multiples of this many elements and are multiples of it: 16 bytes for every type.
SLICE = 16


def _equation(function: Callable) -> Callable:
    # The interpreter calls nested functions only if triton.language is among their globals, and an equation's has none.
    return function.fn if INTERPRETED else function  # type: ignore[attr-defined]


def missing(device: torch.device) -> str | None:
    """What these kernels lack to run on a device, or None if they can."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the Triton kernels need a GPU, and the parameters are on {device}"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0 or newer, and {device} has {capability}"
    if capability >= (10, 0) and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        # Its ptxas 12.9 contracts packed arithmetic in spite of OPTIONS: 24 FMAs in a pack, 0 in its combine.
        return f"on compute capability {capability} the Triton kernels need triton 3.7, this is {triton.__version__}"
    return None


class TritonPasses:
    """The passes, see `Passes`, as one launch of a Triton kernel each.

    x and state are float32. Gradients, messages, copies and low parameters are float32, bfloat16 or float16. Any length
    and alignment works; buffers padded to a multiple of BLOCK elements and aligned to 16 bytes run at the memory's
    speed.

    The kernels read all scalars, weights included, from one device tensor at a fixed address. Other values need no
    compilation and no host synchronization, and a captured CUDA graph takes them at its next replay: call `set` outside
    the capture, on the stream of the replay. Where the scalars' `skip` is a tensor, the kernel reads it.

    Raises TypeError for types it does not take, ValueError for shapes that do not fit.
    """

    name = "triton"

    def __init__(
        self,
        rule: Rule,
        device: torch.device | str = "cuda",
        block: int = BLOCK,
        warps: int = WARPS,
        guard: bool = False,
    ):
        self.rule, self.device, self.block = rule, torch.device(device), block
        self.scalars = Scalars((), ())
        self._values = torch.zeros(CAPACITY, dtype=torch.float32, device=self.device)
        self._index = self._values.device.index if self.device.type == "cuda" else None
        self._current: tuple[float, ...] = ()
        self._streams: set = set()  # those that have waited for the current values
        options = {**OPTIONS, "num_warps": warps}
        constants = {
            "SEND": _equation(rule.whole), "HALFWAY": rule.halfway, "S": Fields(rule.state),
            "H": Fields(rule.H._fields), "GUARD": guard, "TRAVELED": rule.traveled,
        }  # fmt: skip
        self._packing = Launcher(_pack_kernel, constants, block, options, self._check)
        constants.update(UPDATE=_equation(rule.update))
        self._combining = Launcher(_combine_kernel, constants, block, options, self._check)

    def set(self, scalars: Scalars) -> None:
        values = (scalars.grad_scale, *scalars.h, *scalars.weights)
        if len(values) > SKIP:
            raise ValueError(
                f"{len(scalars.weights)} neighbors are too many for the Triton kernels, which unroll them"
                f" ({SKIP} scalars at most): use a sparser topology, or fused=False"
            )
        self.scalars = scalars
        late = {i: v for i, v in enumerate(values) if isinstance(v, Tensor)}  # on a device: the host must not read them
        values = tuple(math.nan if i in late else v for i, v in enumerate(values))
        if isinstance(scalars.skip, Tensor):
            late[SKIP] = scalars.skip
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
        # The pinned memory is fresh each time: torch gives it out again only after the copy that reads it has ended.
        self._write(host.pin_memory(), late)
        self._streams, self._written = {stream}, stream.record_event()

    def _write(self, host: Tensor, late: dict[int, Tensor]) -> None:
        self._values[: len(host)].copy_(host, non_blocking=True)
        for i, value in late.items():
            self._values[i].copy_(value, non_blocking=True)

    @property
    def _flagged(self) -> bool:
        return isinstance(self.scalars.skip, Tensor)

    def pack(self, x: Tensor, g: Tensor, state: Sequence[Tensor], messages: Rows, low: Tensor | None = None) -> None:
        lows = () if low is None else (low,)
        self._launch(self._packing, Buffers(x, g, tuple(state), parts(messages), (), lows, self.rule.messages))

    def combine(
        self,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        received: Received,
        copies: Sequence[Tensor] = (),
        low: Tensor | None = None,
    ) -> None:
        if not self._flagged and self.scalars.skip:
            return
        d = len(self.scalars.weights)
        heard, lows = parts(received[:d]) if d else (), () if low is None else (low,)
        b = Buffers(x, g, tuple(state), heard, tuple(copies), lows, d * self.rule.messages)
        self._launch(self._combining, b, SKIP if self._flagged else 0)

    def warm(
        self,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        messages: Rows,
        received: Received,
        degrees: Iterable[int],
        copies: Sequence[Tensor] = (),
        low: Tensor | None = None,
        skips: bool = False,
    ) -> None:
        """Builds kernels, which else takes 0.1 to 0.2 s each at their first launch.

        Those for slices would else be built in mid-training, in a hook of the backward pass, when a parameter gets no
        gradient for the first time.
        """
        k, n = self.rule.messages, x.numel()
        rows = [row for part in parts(received) for row in rows_of(part)]
        # Triton tells apart multiples of a block, slices that end within one, and the whole.
        for m in {n, *(length for length in (self.block, SLICE) if length < n)}:
            local = x[:m], g[:m], tuple(t[:m] for t in state)
            lows = () if low is None else (low[:m],)
            with torch.cuda.device(self._index) if self._index is not None else contextlib.nullcontext():
                sent = tuple(t[..., :m] for t in parts(messages) if t.numel())
                if sent:
                    self._packing.warm(Buffers(*local, sent, (), lows, k), self._values)
                for d in degrees:
                    heard = tuple(row[:m] for row in islice(cycle(rows), d * k))
                    b = Buffers(*local, heard, tuple(t[:m] for t in copies), lows, d * k)
                    self._combining.warm(b, self._values, SKIP if skips else 0)

    def _launch(self, launcher: Launcher, b: Buffers, skip: int = 0) -> None:
        """Launches on the kernels' device, after the values of `set` are in place."""
        if not self._current:
            raise RuntimeError("call set before pack and combine")
        if self._index is None:
            launcher(b, self._values, skip)
            return
        stream = torch.cuda.current_stream(self._index)
        if stream not in self._streams:
            self._join(stream)
        if torch.cuda.current_device() == self._index:  # the context manager costs more than this question
            launcher(b, self._values, skip)
        else:
            with torch.cuda.device(self._index):
                launcher(b, self._values, skip)

    def _join(self, stream: torch.cuda.Stream) -> None:
        with torch.cuda.device(self._index):
            if not torch.cuda.is_current_stream_capturing():
                stream.wait_event(self._written)
                self._streams.add(stream)

    def _check(self, b: Buffers) -> None:
        for t in (b.x, *b.state):
            if t.dtype != torch.float32:
                raise TypeError(f"the Triton kernels keep x and state in float32, got {t.dtype}: use fused=False")
        rows = b.rows
        for t in (b.g, *rows, *b.copies, *b.low):
            if t.dtype not in NARROW:
                raise TypeError(f"the Triton kernels take no gradients or messages in {t.dtype}: use fused=False")
        if len(b.state) != len(self.rule.state) or len(rows) != b.messages:
            raise ValueError(
                f"{self.rule.name!r} has {len(self.rule.state)} state buffers and here {b.messages} messages, got"
                f" {len(b.state)} and {len(rows)}"
            )
        n = b.x.numel()
        for t in (b.x, b.g, *b.state, *rows, *b.copies, *b.low):
            if t.shape != (n,) or not t.is_contiguous():
                raise ValueError(f"buffers must be flat, contiguous and of length {n}, got {tuple(t.shape)}")
            if t.device.type != self._values.device.type:
                raise ValueError(f"buffers must be on {self._values.device}, got one on {t.device}")
        if len({t.dtype for t in rows}) > 1:
            raise ValueError("messages must all have one type")
