"""The one place that chooses what runs the element-wise passes."""

from __future__ import annotations

import logging

import torch

from ..rules.rule import Rule
from . import numba_passes as compiled
from .torch_passes import Blocked

__all__ = ["Blocked", "choose"]

log = logging.getLogger("fused_dlam")

# Parameters from which compiling for the CPU is worth its second or two: below, a pass costs a millisecond anyway.
WORTH_COMPILING = 1 << 20


def choose(rule: Rule, device: torch.device, dtype: torch.dtype, elements: int, fused: bool | None = None):
    """The passes for a rule's buffers: an object with `set`, `pack`, `combine` and a `name`.

    Args:
        dtype: the type of the master values.
        elements: how many of them there are on all buffers together.
        fused: None takes the best that is available for them, True insists on fused passes, False takes the reference.

    Raises RuntimeError with fused=True if there are none, saying what is missing.
    """
    passes: Blocked | None = None
    missing = None
    if fused is not False:
        passes, missing = _on_gpu(rule, device, dtype) if device.type == "cuda" else _on_cpu(rule, device)
        if fused is None and device.type == "cpu" and elements < WORTH_COMPILING:
            passes, missing = None, f"{elements} parameters are too few to compile for"
    if passes is None:
        if fused:
            raise RuntimeError(f"fused=True: {missing}")
        passes = Blocked(rule)
    log.debug(
        "%s: passes over %d values (%s, %s) run by %r%s",
        rule.name, elements, device, dtype, passes.name, f" ({missing})" if missing else "",
    )  # fmt: skip
    return passes


def _on_gpu(rule: Rule, device: torch.device, dtype: torch.dtype):
    if dtype != torch.float32:
        return None, f"the Triton kernels keep master values in float32, not {dtype}"
    try:
        from .triton_passes import Fused, missing
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    lack = missing(device)
    return (None, lack) if lack else (Fused(rule, device), None)


def _on_cpu(rule: Rule, device: torch.device):
    if device.type != "cpu":
        return None, f"there are no fused passes for {device.type} devices"
    if not compiled.available():
        return None, "numba is not installed; run: pip install 'fused-dlam[cpu]'"
    return compiled.Compiled(rule), None
