"""Launching a kernel over flat buffers: what depends only on the form of the buffers is done once for each form.

A step launches two kernels per bucket. Triton's own way from arguments to a launch takes 13 us of the host's time for
ours: it looks at every argument, and makes a text of the options, to find the compiled kernel. With checks, the
unbinding of received rows and keyword arguments a pass took 29 to 50 us. Here the types, shapes, strides and alignments
of the buffers are one key. Under it lies the compiled kernel with all arguments but the addresses: 10 to 15 us.

The key must hold all that a kernel is specialized on. It holds what Triton 3.6 to 3.9 look at, and more: each length is
a form of its own, though Triton compiles only a few kinds. Buffers that do not fit make another key, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from operator import attrgetter, or_
from typing import Any, NamedTuple

import torch

from .triton_kernels import INTERPRETED, VECTOR

# Forms kept for a kernel. The number must have a bound: slices of a bucket are forms of their own, and a model that
# leaves out other parameters in every step makes new ones without end.
FORMS = 4096

_address, _stride = torch.Tensor.data_ptr, torch.Tensor.stride
_dtype, _shape, _is_cuda = attrgetter("dtype"), attrgetter("shape"), attrgetter("is_cuda")


class Form(NamedTuple):
    run: Callable  # the compiled kernel over its grid
    rows: list[tuple[int, int]]  # for each message, which buffer holds it and how many bytes from that buffer's start
    rest: tuple  # the arguments that follow the addresses


class Buffers(NamedTuple):
    """What a pass works on. parts: all messages in order, each a row or a tensor of rows. messages: how many rows."""

    x: torch.Tensor
    g: torch.Tensor
    state: tuple[torch.Tensor, ...]
    parts: tuple[torch.Tensor, ...]
    copies: tuple[torch.Tensor, ...]
    low: tuple[torch.Tensor, ...]  # one or none
    messages: int

    @property
    def rows(self) -> list[torch.Tensor]:
        return [row for part in self.parts for row in rows_of(part)]


def rows_of(part: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows of a tensor, or itself if it is one. All are views: flattening [d, messages, N] could make a copy."""
    if part.dim() < 2:
        yield part
    else:
        for inner in part.unbind(0):
            yield from rows_of(inner)


def parts(messages: Any) -> tuple[torch.Tensor, ...]:
    """The messages of one tensor, of a tuple of rows, or of a tuple of tuples of rows."""
    if isinstance(messages, torch.Tensor):
        return (messages,)
    flat: list[torch.Tensor] = []
    for m in messages:
        if isinstance(m, torch.Tensor):
            flat.append(m)
        else:
            flat.extend(m)
    return tuple(flat)


class Launcher:
    """One kernel with its constants. `check` gets the buffers of every new form, and raises if they do not fit.

    A kernel's arguments are x, g, the tuple of state, the tuple of messages, the tuple of copies if it has `copy_ptrs`,
    the tuple of low parameters, the scalars, the length and the constants.
    """

    def __init__(self, kernel: Any, constants: dict, block: int, options: dict, check: Callable[[Buffers], None]):
        self.kernel, self.block, self.options, self.check = kernel, block, options, check
        self.constants = {**constants, "BLOCK": block, "VECTOR": VECTOR}
        self._order = kernel.arg_names[kernel.arg_names.index("n") + 1 :]
        self._copies = "copy_ptrs" in kernel.arg_names
        self._forms: dict[tuple, Form] = {}

    def __call__(self, b: Buffers, values: torch.Tensor, skip: int = 0) -> None:
        """Launches on the current device and stream."""
        if INTERPRETED:  # takes tensors, not addresses
            self.check(b)
            if b.x.numel():
                self.kernel[self._grid(b)](*self._arguments(b, values, skip), **self.options)
            return
        tensors = (b.x, b.g, *b.state, *b.parts, *b.copies, *b.low)
        addresses = tuple(map(_address, tensors))
        odd = reduce(or_, addresses) & 15
        key = (
            skip, b.messages, len(b.state), len(b.parts), len(b.low), odd and tuple([a & 15 for a in addresses]),
            *map(_dtype, tensors), *map(_shape, tensors), *map(_stride, tensors), *map(_is_cuda, tensors),
        )  # fmt: skip
        form = self._forms.get(key)
        if form is None:
            form = self._prepare(b, values, skip)
            if len(self._forms) >= FORMS:
                self._forms.clear()
            self._forms[key] = form
        middle, end = 2 + len(b.state), len(addresses) - len(b.low)
        messages = tuple([addresses[i] + offset for i, offset in form.rows])
        copies = (addresses[middle + len(b.parts) : end],) if self._copies else ()
        form.run(addresses[0], addresses[1], addresses[2:middle], messages, *copies, addresses[end:], *form.rest)

    def warm(self, b: Buffers, values: torch.Tensor, skip: int = 0) -> None:
        """Compiles and loads what a launch over such buffers needs, and launches nothing."""
        if not INTERPRETED:
            self._prepare(b, values, skip)

    def _prepare(self, b: Buffers, values: torch.Tensor, skip: int) -> Form:
        self.check(b)
        first = 2 + len(b.state)
        rows: list[tuple[int, int]] = []
        for i, part in enumerate(b.parts):
            rows += [(first + i, row.data_ptr() - part.data_ptr()) for row in rows_of(part)]
        arguments = self._arguments(b, values, skip)
        run = _nothing
        if b.x.numel():
            # Indexing loads the machine code. Under Triton 3.6 it also compiles a launcher in C (0.1 s per signature).
            run = self.kernel.warmup(*arguments, grid=self._grid(b), **self.options)[self._grid(b)]
        return Form(run, rows, (values.data_ptr(), *arguments[-1 - len(self._order) :]))

    def _arguments(self, b: Buffers, values: torch.Tensor, skip: int) -> tuple:
        n = b.x.numel()
        late = {"EVEN": n % self.block == 0, "SKIP": skip}
        constants = (late[name] if name in late else self.constants[name] for name in self._order)
        copies = (b.copies,) if self._copies else ()
        return (b.x, b.g, b.state, tuple(b.rows), *copies, b.low, values, n, *constants)

    def _grid(self, b: Buffers) -> tuple[int, int, int]:
        return (-(-b.x.numel() // self.block), 1, 1)


def _nothing(*arguments) -> None:
    """The launch over buffers of length 0."""
