"""What a mailbox's message looks like: a tensor, or a list of them one after the other, in host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Values = torch.Tensor | list[torch.Tensor]


class Letter:
    """The form of all messages of one mailbox.

    Raises TypeError for what is no tensor or list of tensors of one floating type on one device, ValueError for none.
    """

    def __init__(self, like: torch.Tensor | Sequence[torch.Tensor]):
        self.single = isinstance(like, torch.Tensor)
        tensors = [like] if isinstance(like, torch.Tensor) else list(like)
        for t in tensors:
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"like must be a torch.Tensor or a list of them, not {type(t).__name__}")
            if t.dtype not in KINDS or t.layout != torch.strided:
                raise TypeError(f"a mailbox sends float16, bfloat16, float32 or float64, not {t.dtype} ({t.layout})")
        if not tensors or not any(t.numel() for t in tensors):
            raise ValueError("like has no numbers: there is nothing to send")
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        if any((t.dtype, t.device) != (self.dtype, self.device) for t in tensors):
            raise TypeError("the tensors of one mailbox must have one type, and be on one device")
        self.shapes = [t.shape for t in tensors]
        self.sizes = [t.numel() for t in tensors]
        self.numbers = sum(self.sizes)
        self.wide = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype

    def host(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Host memory for a message, pinned where the tensors are on a GPU."""
        return torch.empty(self.numbers, dtype=dtype or self.dtype, pin_memory=self.device.type == "cuda")

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a message, in the shapes of its tensors."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def given(self, x: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of a message that is to be sent. Raises TypeError or ValueError where it has another form."""
        tensors = [x] if isinstance(x, torch.Tensor) else list(x)
        if isinstance(x, torch.Tensor) != self.single or not all(isinstance(t, torch.Tensor) for t in tensors):
            one = "one tensor" if self.single else f"a list of {len(self.shapes)} tensors"
            raise TypeError(f"this mailbox sends {one}, as it was built for")
        if [t.shape for t in tensors] != self.shapes:
            theirs = ", ".join(str(tuple(t.shape)) for t in tensors[:8])
            raise ValueError(f"shapes {theirs} are not those that this mailbox was built for: {self.form}")
        wrong = next((t for t in tensors if (t.dtype, t.device) != (self.dtype, self.device)), None)
        if wrong is not None:
            raise TypeError(f"{wrong.dtype} on {wrong.device} is not what this mailbox was built for: {self.form}")
        return tensors

    def taken(self, flat: torch.Tensor) -> Values:
        """What a user gets of a message, on the device of what he has built the mailbox for."""
        parts = self.parts(flat.to(self.device))
        return parts[0] if self.single else parts

    @property
    def form(self) -> str:
        shapes = ", ".join(str(tuple(shape)) for shape in self.shapes[:8]) + (", ..." if len(self.shapes) > 8 else "")
        return f"{shapes} of {str(self.dtype).removeprefix('torch.')} on {self.device}"

    @property
    def facts(self) -> dict[str, str]:
        """What must be equal on all ranks."""
        return {"the shapes": str([tuple(shape) for shape in self.shapes]), "the type": str(self.dtype)}


def add(total: torch.Tensor, message: torch.Tensor) -> None:
    """total += message, by one thread: torch would start a team of them for each thread that listens.

    total: float32 or float64 in host memory; message: of its type, or of 16 bits.
    """
    if message.dtype == torch.bfloat16:  # the upper half of a float32
        widened = message.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        widened <<= 16
        values = widened.view(np.float32)
    else:
        values = message.numpy()
    with np.errstate(all="ignore"):  # as torch
        np.add(total.numpy(), values, out=total.numpy())
