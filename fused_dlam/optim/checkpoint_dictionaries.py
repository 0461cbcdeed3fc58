"""Dictionaries through a checkpoint: DCP would give them back with other keys, or not at all.

It makes an entry of its own of everything in a dictionary, by a path of text. So an empty one is lost, and the number 2
comes back as "2": a `MultiStepLR`, which counts its milestones by step, would never lower the rate again. DCP keeps a
tuple as it is, and goes into a list where it holds tensors, which are to stay tensors of the checkpoint.

    {}, {2: 1}            ("fused_dlam dictionary", {2: 1})
    {2: tensor}           ["fused_dlam pairs", [2, tensor]]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

WHOLE, PAIRS = "fused_dlam dictionary", "fused_dlam pairs"


def packed(value: Any) -> Any:
    """A state in which every dictionary that DCP would change has another form."""
    if isinstance(value, Mapping):
        if value and all(isinstance(key, str) for key in value):
            return {key: packed(inner) for key, inner in value.items()}
        if _holds_tensors(value):
            return [PAIRS, *([key, packed(inner)] for key, inner in value.items())]
        return WHOLE, Counter(value) if isinstance(value, Counter) else _plain(value)
    return [packed(inner) for inner in value] if isinstance(value, list) else value


def unpacked(value: Any) -> Any:
    """What `packed` was given."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and value[0] == WHOLE:
        return value[1]
    if isinstance(value, list) and value and isinstance(value[0], str) and value[0] == PAIRS:
        return {key: unpacked(inner) for key, inner in value[1:]}
    if isinstance(value, dict):
        return {key: unpacked(inner) for key, inner in value.items()}
    return [unpacked(inner) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Dictionaries of other kinds as dictionaries, which a checkpoint can be read with."""
    if isinstance(value, Mapping) and not isinstance(value, Counter):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(inner) for inner in value.values())
    return isinstance(value, torch.Tensor) or (isinstance(value, list) and any(map(_holds_tensors, value)))
