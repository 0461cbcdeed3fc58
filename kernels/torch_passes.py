"""The reference passes: a rule's equations as torch operations over blocks of flat buffers, in place (replay.py).

Rounding: where the processor has FMA (AVX2, AVX-512) torch rounds a + s * b once, where the text rounds twice. Which
operations compute a message depends on nothing but the text of `send`, and torch treats every element of a buffer
alike, so the message that `combine` recomputes is the one that `pack` wrote, bit for bit, and neither the block nor
the number of threads shows in a result.
"""

from __future__ import annotations

import threading

import torch

from ..rules.rule import Rule
from ..rules.scalars import Scalars
from .replay import replay

# Elements per block. At 25.5M parameters, d = 1: 60, 48, 41, 36, 33, 32 ms for 16k, 32k, 64k, 128k, 256k, 512k: smaller
# blocks fit a nearer cache, but every operation costs 1 to 3 us before its first element.
BLOCK = 1 << 18
# On other devices there is no cache to stay in, and every operation is a kernel to launch: 884 of them in a step of
# DecentLaM at 25.5M parameters with the block above, 22 with this one.
DEVICE_BLOCK = 1 << 24
# Rows for each type, device and stream. A hook's thread may pack while another combines; and a row that was given
# back while another stream still computes in it would be handed out again too early.
_scratch = threading.local()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Blocked:
    """Runs anywhere torch runs: `set` the step's scalars, then `pack` and `combine` any number of buffers.

    Buffers are flat and of one length N: x and the tuple `state` in the master type, g in any floating type, messages
    [messages, N] and received [d, messages, N] in the type of the messages; `messages` and `received` may as well be
    tuples of their rows. With several torch threads each operation is split by torch itself.
    """

    name = "torch"

    def __init__(self, rule: Rule):
        self.rule = rule
        self.scalars = Scalars((), ())

    def set(self, scalars: Scalars) -> None:
        self.scalars = scalars.numbers()

    def pack(self, x, g, state, messages) -> None:
        """Writes this worker's messages."""
        self._check(x, g, state, tuple(messages), self.rule.messages)
        self._run(None, x, g, tuple(state), tuple(messages), messages[0].dtype)

    def combine(self, x, g, state, received, copies=()) -> None:
        """Updates x and state in place from the received messages, the first len(weights) of them.

        copies: the new x is written to each of these [N] too, rounded to nearest even to its type.
        """
        d = len(self.scalars.weights)
        rows = tuple(row for r in (received[:d] if d else ()) for row in r)
        self._check(x, g, state, rows, d * self.rule.messages, copies)
        if self.scalars.skip:
            return
        self._run(d, x, g, tuple(state), rows, rows[0].dtype if rows else x.dtype)
        for c in copies:
            c.copy_(x)

    def warm(self, x, g, state, messages, received, degrees, copies=(), guard: bool = False) -> None:
        """Prepares for steps on these buffers, see `Fused.warm`. Nothing: torch's operations are there."""

    def _check(self, x, g, state, rows, expected: int, copies=()) -> None:
        need, have = (len(self.rule.state), expected), (len(state), len(rows))
        if need != have:
            raise ValueError(f"{self.rule!r} takes {need} buffers of state and rows of messages here, not {have}")
        if x.dim() != 1 or any(t.shape != x.shape for t in (g, *state, *rows, *copies)):
            shapes = [tuple(t.shape) for t in (x, g, *state, *rows, *copies)]
            raise ValueError(f"buffers must be flat and of one length, not {shapes}")

    def _run(self, d, x, g, state, rows, wire) -> None:
        """d: None for `pack`, the number of neighbors for `combine`; rows: messages to write, or received ones."""
        rule, (h, weights, scale, _) = self.rule, self.scalars
        equations = (rule.send.fn, rule.update.fn, rule.state, h._fields, rule.messages)
        run, count = replay(equations, d, g.dtype != x.dtype, wire != x.dtype, scale != 1.0)
        n = max(1, min(BLOCK if x.device.type == "cpu" else DEVICE_BLOCK, x.numel()))
        key = f"{x.dtype} {x.device} {_stream(x.device)}"
        kept = vars(_scratch).get(key)
        if kept is None or len(kept) < count * n:
            kept = vars(_scratch)[key] = x.new_empty(count * n)
        narrow = x.new_empty(n if wire != x.dtype else 0, dtype=wire)
        run(n, h, weights, scale, x, g, state, rows, kept[: count * n].view(count, n), narrow)
