"""The reference passes: a rule's equations as torch operations over blocks of flat buffers, in place (replay.py).

Where the processor has FMA (AVX2, AVX-512), torch rounds a + s * b once and the text rounds it twice. The message that
`combine` recomputes is still the one that `pack` wrote: both take their operations from nothing but the text of `send`,
and torch treats every element of a buffer alike. For the same reason neither the block nor the number of threads shows
in a result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..rules.rule import Rule
from ..rules.scalars import Scalars
from .replay import replay
from .trace import Equations, Guard

if TYPE_CHECKING:
    from .passes import Received, Rows

# Elements per block. At 25.5M parameters, d = 1: 60, 48, 41, 36, 33, 32 ms for 16k, 32k, 64k, 128k, 256k, 512k. Smaller
# blocks fit a nearer cache, but every operation costs 1 to 3 us before its first element.
BLOCK = 1 << 18
# Other devices have no cache to stay in, and every operation is a kernel to launch: 884 of them in a step of DecentLaM
# at 25.5M parameters with the block above, 22 with this one.
DEVICE_BLOCK = 1 << 24
# Scratch rows for each type, device and stream. Each thread has its own, since a hook's thread may pack while another
# combines. Each stream has its own, since a row given back while another stream still computes in it would be handed
# out again too early.
_scratch = threading.local()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class TorchPasses:
    """The passes, see `Passes`, wherever torch runs. With several torch threads torch itself splits each operation."""

    name = "torch"

    def __init__(self, rule: Rule, guard: bool = False):
        self.rule, self.guard = rule, guard
        self.equations = Equations.of(rule)
        self.scalars = Scalars((), ())

    def set(self, scalars: Scalars) -> None:
        self.scalars = scalars.numbers()

    def pack(self, x: Tensor, g: Tensor, state: Sequence[Tensor], messages: Rows, low: Tensor | None = None) -> None:
        rows = tuple(messages)
        self._check(x, g, state, rows, self.rule.messages, (), low)
        self._run(None, x, g, state, rows, messages[0].dtype, low)

    def combine(
        self,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        received: Received,
        copies: Sequence[Tensor] = (),
        low: Tensor | None = None,
    ) -> None:
        d = len(self.scalars.weights)
        rows = tuple(row for r in (received[:d] if d else ()) for row in r)
        self._check(x, g, state, rows, d * self.rule.messages, copies, low)
        if self.scalars.skip:
            return
        self._run(d, x, g, state, rows, rows[0].dtype if rows else x.dtype, low)
        for c in copies:
            c.copy_(x)

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
        """Does nothing: torch's operations are compiled."""

    def _check(
        self,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        rows: Rows,
        expected: int,
        copies: Sequence[Tensor],
        low: Tensor | None,
    ) -> None:
        need, have = (len(self.rule.state), expected), (len(state), len(rows))
        if need != have:
            raise ValueError(f"{self.rule!r} takes {need} buffers of state and rows of messages here, not {have}")
        buffers = (x, g, *state, *rows, *copies, *(() if low is None else (low,)))
        if x.dim() != 1 or any(t.shape != x.shape for t in buffers):
            shapes = [tuple(t.shape) for t in buffers]
            raise ValueError(f"buffers must be flat and of one length, not {shapes}")

    def _run(
        self,
        d: int | None,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        rows: Sequence[Tensor],
        wire: torch.dtype,
        low: Tensor | None,
    ) -> None:
        """d: None for `pack`, the number of neighbors for `combine`; rows: messages to write, or received ones."""
        h, weights, scale, _ = self.scalars
        # A scale of at most 1 makes no finite gradient infinite. Guarded before it, the gradient's product with it is
        # still one with the scalars of the equations, rounded as without a guard.
        guard: Guard = ("before" if abs(float(scale)) <= 1.0 else "after") if self.guard else ""
        kinds = g.dtype != x.dtype, wire != x.dtype, scale != 1.0
        run, count = replay(self.equations, d, *kinds, guard, low is not None)
        n = max(1, min(BLOCK if x.device.type == "cpu" else DEVICE_BLOCK, x.numel()))
        key = f"{x.dtype} {x.device} {_stream(x.device)}"
        kept = vars(_scratch).get(key)
        if kept is None or len(kept) < count * n:
            kept = vars(_scratch)[key] = x.new_empty(count * n)
        narrow = x.new_empty(n if wire != x.dtype else 0, dtype=wire)
        run(n, h, weights, scale, x, g, state, rows, low, kept[: count * n].view(count, n), narrow)
