"""Several tensors in one message: those of one type side by side in flat memory, and all of it as bytes.

tensors   float32 (2, 3), float64 (), float32 (4,)      what the user gave
flats     float64 [1]; float32 [10]                     one for each type, the widest elements first
message   8 + 40 bytes                                  so that each flat begins where its type may begin
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .sharded import is_sharded

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of `dtype` are summed: float32 for 16 bits, else itself."""
    return WIDE.get(dtype, dtype)


def listed(x: Any, call: str) -> list[torch.Tensor]:
    """What a user gave to be exchanged, as a list.

    Raises TypeError for what cannot be sent, ValueError for tensors on two devices.
    """
    tensors = list(x) if isinstance(x, (list, tuple)) else [x]
    for t in tensors:
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{call}() takes a torch.Tensor, or a list of them, not a {type(t).__name__}")
        if is_sharded(t):
            raise TypeError(f"{call}() takes plain tensors: of a DTensor pass what this rank holds, x.to_local()")
        if t.layout != torch.strided or t.is_quantized:
            raise TypeError(f"{call}() takes dense tensors, not {'quantized ones' if t.is_quantized else t.layout}")
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise ValueError(f"{call}() sends one message from one device, and was given tensors on {', '.join(devices)}")
    return tensors


def averaged(x: Any, call: str) -> list[torch.Tensor]:
    """The same for what is multiplied by weights: floating-point or complex, of 16 bits at least."""
    tensors = listed(x, call)
    for t in tensors:
        if not (t.is_floating_point() or t.is_complex()):
            raise TypeError(f"{call}() averages floating-point tensors, not {t.dtype}")
        if t.element_size() == 1:
            raise TypeError(f"{t.dtype} cannot be averaged by {call}(): convert it to a wider floating-point type")
    return tensors


def alike(x: Any, tensors: list[torch.Tensor]) -> Any:
    """The tensors as the user gave his: one, a list or a tuple."""
    if isinstance(x, (list, tuple)):
        return tuple(tensors) if isinstance(x, tuple) else tensors
    return tensors[0]


def device_of(tensors: Sequence[torch.Tensor]) -> torch.device:
    """An empty list is anywhere."""
    return tensors[0].device if tensors else torch.device("cpu")


def shapes(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors) or "none"


def types(tensors: Sequence[torch.Tensor]) -> str:
    return ", ".join(str(t.dtype) for t in tensors) or "none"


class Bundle:
    """A list of tensors as one flat buffer for each type. Those of a single contiguous tensor are its own memory."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._shapes = [t.shape for t in tensors]
        self._members: dict[torch.dtype, list[int]] = {}
        for k, t in enumerate(tensors):
            self._members.setdefault(t.dtype, []).append(k)
        size = {dtype: tensors[where[0]].element_size() for dtype, where in self._members.items()}
        self._members = dict(sorted(self._members.items(), key=lambda item: (-size[item[0]], str(item[0]))))
        self.flats = [flat([tensors[k].detach() for k in where]) for where in self._members.values()]

    def opened(self, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Buffers of this form as a list of tensors, each with memory of its own."""
        out: list[Any] = [None] * len(self._shapes)
        for whole, where in zip(flats, self._members.values(), strict=True):
            parts = whole.split([self._shapes[k].numel() for k in where])
            for k, part in zip(where, parts, strict=True):
                out[k] = (part.clone() if len(where) > 1 else part).view(self._shapes[k]).detach()
        return out


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one type side by side in memory without holes: of a single contiguous one its own memory."""
    flats = [t.resolve_conj().resolve_neg().reshape(-1) for t in tensors]
    # A tensor of one element counts as contiguous whatever its stride is, and is then not to be viewed as bytes.
    return flats[0] if len(flats) == 1 and flats[0].stride(0) == 1 else torch.cat(flats)


def as_bytes(flats: Sequence[torch.Tensor]) -> torch.Tensor:
    """One message, uint8: of one flat buffer its own memory."""
    if len(flats) == 1:
        return flats[0].view(torch.uint8)
    return torch.cat([flat.view(torch.uint8) for flat in flats]) if flats else torch.empty(0, dtype=torch.uint8)


def from_bytes(message: torch.Tensor, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A message of the same form as flat buffers: views of it."""
    lengths = [flat.numel() * flat.element_size() for flat in flats]
    return [part.view(flat.dtype) for part, flat in zip(message.split(lengths), flats, strict=True)]
