"""The trainable parameters of an optimizer as one flat vector beside them: what a step did to them, and new values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..comm.sharded import is_sharded
from .frozen import writable


class FlatParameters:
    """Parameters stay where they are: values are copied.

    The vector is float64 if one of them is, else float32, so that averaging rounds nothing of 16-bit ones away.

    Raises TypeError for complex and sharded parameters, ValueError where they are on several devices, and for none.
    """

    def __init__(self, params: Sequence[torch.Tensor]):
        if not params:
            raise ValueError("no parameter is trainable: there is nothing to average")
        for p in params:
            if p.is_complex() or is_sharded(p):
                what = "complex" if p.is_complex() else "sharded"
                raise TypeError(f"a parameter of shape {tuple(p.shape)} is {what}: GossipSGD and Gossip average those")
        self.params = list(params)
        self.device = params[0].device
        if any(p.device != self.device for p in params):
            raise ValueError(f"parameters are on several devices, {sorted({str(p.device) for p in params})}: use one")
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        self.sizes = [p.numel() for p in params]
        for p in params:
            writable(p)
        self._written = [p.detach().clone() for p in params]  # what they were before the script changed them
        self._moved = torch.empty(sum(self.sizes), dtype=self.dtype, device=self.device)

    def read(self) -> torch.Tensor:
        """Their values, a new vector."""
        return torch.cat([p.detach().reshape(-1).to(self.dtype) for p in self.params])

    def moved(self) -> torch.Tensor:
        """What has been added to them since `write`, by a step or by the script. The same memory each time."""
        for p, old, part in zip(self.params, self._written, self._moved.split(self.sizes), strict=True):
            part.view(p.shape).copy_(p).sub_(old)
        return self._moved

    def write(self, z: torch.Tensor) -> None:
        """Gives them new values."""
        for p, old, part in zip(self.params, self._written, z.split(self.sizes), strict=True):
            p.copy_(part.view(p.shape))
            old.copy_(p)  # as it was rounded

    def restore(self, values: Sequence[torch.Tensor]) -> None:
        """Puts back what was in their places, bit for bit. `moved` goes on from where it was."""
        for p, own in zip(self.params, values, strict=True):
            p.copy_(own)

    def check(self, trainable: Sequence[torch.Tensor]) -> None:
        """Raises RuntimeError for a parameter that is trainable now and was not."""
        mine = {id(p) for p in self.params}
        new = [p for p in trainable if p.requires_grad and id(p) not in mine]
        if new:
            raise RuntimeError(
                f"a parameter of shape {tuple(new[0].shape)} is trainable, and was frozen when this optimizer was"
                " built, or came later. Messages have one form for life, and no rank waits for the others to agree on"
                " another: close() it, and build a new one on all ranks"
            )
