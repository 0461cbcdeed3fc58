"""One parameter in flat memory."""

from __future__ import annotations

import weakref

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
        self.zeroed_at = -1  # the gradient view's version when it was last zeroed
        self.arrived_at: int | None = None  # and when autograd had accumulated it, in this step
        # What arrived and its version then, while it is still to be copied into the view.
        self.fresh: tuple[weakref.ref[torch.Tensor], int] | None = None
        self.stream: torch.cuda.Stream | None = None  # on which it was accumulated
        self.graphed = False  # a CUDA graph may write it, and moves no version counter
        self.published_at = -1  # the parameter's version when this package last wrote it

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """This slot of a flat real buffer, in the parameter's shape (and complex if the parameter is)."""
        run = flat[self.span]
        if self.p.is_complex():
            run = torch.view_as_complex(run.view(-1, 2))
        return run.as_strided(self.shape, self.stride)

    def stateful(self, flat: torch.Tensor) -> torch.Tensor:
        """The view as others are to see it in the optimizer's state: of a sharded parameter, a DTensor over it."""
        return sharded.like(self.p, self.view(flat)) if self.apart else self.view(flat)

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the parameter was written since this package last wrote it."""
        if self.p._version != self.published_at:
            raise RuntimeError(
                f"a parameter of shape {tuple(self.p.shape)} was changed since the last step, while it was being sent"
                " (schedule='awc'). Call optimizer.synchronize() on all ranks before changing parameters, for instance"
                " before model.load_state_dict()."
            )

    def version(self, grad: torch.Tensor) -> int:
        """Moves whenever a gradient is written: a DTensor counts what is done to it, its shard what FSDP adds."""
        return grad._version + sharded.local(grad)._version if self.apart else grad._version
