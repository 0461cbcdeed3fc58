"""The values of small fake tensors, for what the host reads of a device: the order of buckets, a scale, a flag.

They are real tensors on the CPU, beside the fake ones; views of them are views, so writing one shows in the other.
"""

from __future__ import annotations

from typing import Any

import torch
from fake_clocks import tensors_in

SMALL = 256  # elements of a tensor whose values are kept


def has_value(t: torch.Tensor) -> bool:
    return getattr(t, "value", None) is not None


def number(t: torch.Tensor) -> Any:
    """What the host reads: its value if it was kept, else zero."""
    if not has_value(t):
        return False if t.dtype == torch.bool else 0.0 if t.is_floating_point() else 0
    with torch._C._DisableTorchDispatch():
        return t.value.item()


def keep_values(func, name, args, kwargs, inputs, out) -> None:
    """What the host reads of a device: the order of buckets, whether gradients are late, a loss scale."""
    outputs = tensors_in(out)
    if name == "lift_fresh" and args[0].numel() <= SMALL and not has_value(args[0]):
        with torch._C._DisableTorchDispatch():
            out.value = args[0].clone() if type(args[0]) is torch.Tensor else None
        out.constant = None  # torch's own, which it would really move to the device
        return
    if not outputs or any(t.numel() > SMALL for t in outputs):
        return
    if name == "copy_" and has_value(args[1]) and not has_value(args[0]):
        with torch._C._DisableTorchDispatch():
            args[0].value = args[1].value.to(args[0].dtype).expand(args[0].shape).clone()
        return
    if not all(has_value(t) for t in inputs):
        for t in outputs:
            t.value = None
        return

    def real(v):
        if isinstance(v, torch.Tensor):
            return v.value
        if isinstance(v, list | tuple):
            return type(v)(real(w) for w in v)
        return torch.device("cpu") if isinstance(v, torch.device) else v

    with torch._C._DisableTorchDispatch():
        try:
            result = tensors_in(func(*map(real, args), **{k: real(v) for k, v in kwargs.items()}))
        except Exception:  # noqa: BLE001 -- then nobody may read it
            result = [None] * len(outputs)
    for t, value in zip(outputs, result, strict=True):
        t.value = value
