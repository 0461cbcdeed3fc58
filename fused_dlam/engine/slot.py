"""One parameter in flat memory."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..comm import sharded


class Slot:
    """One parameter's place in a bucket."""

    def __init__(self, p: torch.Tensor, offset: int):
        self.p = p
        self.apart = sharded.is_sharded(p)
        here = sharded.local(p)
        self.offset = offset
        self.shape = here.shape
        self.numel = here.numel() * (2 if here.is_complex() else 1)
        # Dense layouts (channels-last too) keep their strides; holes and overlaps become contiguous.
        self.stride = torch.empty_like(here, memory_format=torch.preserve_format).stride()
        self.span = slice(offset, offset + self.numel)
        self.data = here  # what this rank holds of it: the view in the bucket, once it is built, or FSDP's shard
        self.address = 0  # where that is
        self.grad: torch.Tensor | None = None  # the view in the flat gradient
        self.installed: torch.Tensor | None = None  # what p.grad is then: the view, or a DTensor over it
        self.grad_address = 0  # where that is
        self.arrived_at: int | None = None  # the gradient's version when autograd had accumulated it, in this step
        # What arrived and its version then, while it is still to be copied into the view.
        self.fresh: tuple[weakref.ref[torch.Tensor], int] | None = None
        self.stream: torch.cuda.Stream | None = None  # on which it was accumulated
        self.hook: Any = None  # by which autograd tells of its gradient
        self.steps = 0  # local steps it has taken
        self.shown: dict[str, torch.Tensor] = {}  # the optimizer's state of it, as scripts see it
        self.published_at = -1  # the parameter's version when this package last wrote it

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This slot of a flat real buffer, in the parameter's shape (and complex if the parameter is)."""
        run = flat[self.span]
        if self.p.is_complex():
            run = torch.view_as_complex(run.view(-1, 2))
        return run.as_strided(self.shape, self.stride)

    def storage(self, flat: torch.Tensor) -> torch.Tensor:
        """The same view, over a storage of its own that ends where this slot ends, on the same memory.

        `torch.save` writes whole storages: an adapter's 8 kB came with the 4 MB of its bucket. And it refuses a complex
        and a real tensor on one storage.
        """
        size, memory = flat.element_size(), flat.untyped_storage()
        if memory.device.type == "meta":  # has no memory
            return self.view(flat)
        memory = memory[self.offset * size : (self.offset + self.numel) * size]
        dtype = flat.dtype.to_complex() if self.p.is_complex() else flat.dtype
        return torch.empty(0, dtype=dtype, device=flat.device).set_(memory, 0, self.shape, self.stride)

    def lay_gradient(self, flat: torch.Tensor) -> None:
        """Makes the view in the flat gradient."""
        # `.data` gives it a version counter of its own: writing the flat buffer does not move that, autograd and the
        # user do. So the counter tells whether this parameter got a gradient.
        self.grad = self.view(flat).data
        self.grad_address = self.grad.data_ptr()
        self.installed = sharded.like(self.p, self.grad) if self.apart else self.grad

    def keep_gradient(self, flat: torch.Tensor) -> None:
        """Makes it anew if a script has given the view other memory: `p.grad.data = t`, or `model.to("cpu:0")`. What
        was `p.grad` is then a gradient like any other, to be copied into the view."""
        if self.grad is not None and self.grad.data_ptr() != self.grad_address:
            self.lay_gradient(flat)
            if self.arrived_at is not None:
                self.arrived_at = -1  # what left in the backward pass was the old view

    def stateful(self, flat: torch.Tensor) -> torch.Tensor:
        """The view as others are to see it in the optimizer's state: of a sharded parameter, a DTensor over it."""
        return sharded.like(self.p, self.view(flat)) if self.apart else self.view(flat)
