"""Layers by the names that they had as options. For one release these work, with a FutureWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lars import Lars
from .layer import Layer
from .slowmo import SlowMo

PACKAGE = str(Path(__file__).parents[1])


def from_old_names(options: dict[str, Any], layers: Sequence[Layer]) -> Sequence[Layer]:
    """Takes lars= and slowmo= out of `options` and adds them to the layers.

    Raises TypeError or ValueError for values that the old names did not take.
    """
    for name, kind in (("lars", Lars), ("slowmo", SlowMo)):
        value = options.pop(name, None)
        if value is None:
            continue
        if name == "slowmo" and not isinstance(value, SlowMo):
            raise TypeError(f"slowmo must be a fused_dlam.SlowMo(every=...), not {type(value).__name__}")
        value = value if isinstance(value, kind) else kind(value)
        warn(f"{name}=", f"layers=[fused_dlam.layers.{value}]")
        layers = (*(layers if isinstance(layers, (list, tuple)) else (layers,)), value)
    return layers


def warn(old: str, new: str) -> None:
    """A FutureWarning that points at the line outside of the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{old} will go in the next release: write {new}", FutureWarning, stacklevel=level)
