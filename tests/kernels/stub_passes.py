"""Passes whose launches are checked, in a process with the stub driver."""

import torch

from fused_dlam.kernels import triton_kernels as kernels
from fused_dlam.kernels.triton_passes import TritonPasses
from fused_dlam.rules.scalars import Scalars

WEIGHTS = (0.3, 0.2, 0.1, 0.1, 0.1)


def buffers(n, count, dtype=torch.float32, odd=False):
    """Flat ones that start at multiples of 64 bytes, as on a GPU, or one element behind them."""
    step = -(-(n + odd) * dtype.itemsize // 64) * 64
    pool = torch.zeros(count * step + 64, dtype=torch.uint8)
    start = -pool.data_ptr() % 64
    rows = pool[start : start + count * step].view(dtype).view(count, -1)
    return tuple(row[odd : odd + n] for row in rows)


class Passes:
    """A rule's passes over buffers of one kind, each launch checked."""

    def __init__(self, stub, rule, n, message=torch.float32, gradient=torch.float32, odd=False, guard=False):
        self.stub, self.rule, self.n = stub, rule, n
        self.x, *state, self.copy = buffers(n, len(rule.state) + 2, odd=odd)
        self.state, (self.g,) = tuple(state), buffers(n, 1, gradient, odd)
        self.rows = buffers(n, 5 * rule.messages, message, odd)
        self.passes = TritonPasses(rule, "cpu", guard=guard)
        self.set(5)

    def set(self, d, lr=0.1, **more):
        self.passes.set(Scalars(self.rule.scalars(lr, 0.9, 0.0, 0.5), WEIGHTS[:d], **more))

    def launched(self, run, rows, copies=(), low=None):
        """Runs a pass, which must launch once, over as many blocks as it takes, with the buffers' addresses."""
        tensors = (self.x, self.g, *self.state, *rows, *copies, *(() if low is None else (low,)), self.passes._values)
        before = self.stub.launches
        given = self.stub.addresses(run, len(tensors))
        assert self.stub.launches == before + 1
        assert self.stub.grid == -(-self.n // kernels.BLOCK)
        assert given == [t.data_ptr() for t in tensors]

    def pack(self, messages=None, low=None):
        rows = self.rows[: self.rule.messages]
        messages = rows if messages is None else messages
        self.launched(lambda: self.passes.pack(self.x, self.g, self.state, messages, low), rows, (), low)

    def combine(self, d, received=None, copies=(), low=None, **more):
        self.set(d, **more)
        k = self.rule.messages
        rows = self.rows[: d * k]
        received = tuple(rows[i * k : i * k + k] for i in range(d)) if received is None else received
        run = lambda: self.passes.combine(self.x, self.g, self.state, received, copies, low)  # noqa: E731
        self.launched(run, rows, copies, low)
