"""The settings of a parameter group: defaults, checks, and what all ranks must have in common."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..comm.sharded import is_sharded
from ..engine.engine import Engine
from ..rules import scalars
from ..rules.rule import Rule


def defaults(rule: Rule, hyper: dict[str, Any]) -> dict[str, Any]:
    """The entries of a parameter group for a rule's own hyper-parameters: plain numbers, or "auto"."""
    return {
        name: hyper[name] if hyper.get(name) is not None else ("auto" if callable(default) else default)
        for name, default in rule.hyper.items()
    }


def check_exchange(schedule: str, bucket_mb: float | None, comm_dtype: torch.dtype | None) -> None:
    """Raises ValueError or TypeError for options of an exchange that make no sense."""
    if schedule not in ("atc", "awc"):
        raise ValueError(f"Invalid schedule: {schedule!r}, must be 'atc' or 'awc'")
    if bucket_mb is not None and not bucket_mb > 0:
        raise ValueError(f"Invalid bucket_mb: {bucket_mb}")
    if comm_dtype is not None and not isinstance(comm_dtype, torch.dtype):
        raise TypeError(f"comm_dtype must be a torch.dtype, such as torch.bfloat16, not {comm_dtype!r}")
    if comm_dtype is not None and not comm_dtype.is_floating_point:
        raise ValueError(f"Invalid comm_dtype: {comm_dtype}, must be a floating type")


def check(group: dict[str, Any]) -> None:
    """Raises TypeError or ValueError for a setting that makes no sense."""
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    for name in ("momentum", "weight_decay"):
        if isinstance(group[name], torch.Tensor):
            raise TypeError(f"{name} must be a number; only lr may be a tensor")
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= float(momentum) < 1.0:
        raise ValueError(f"Invalid momentum value: {momentum}, must be in [0, 1)")
    if not 0.0 <= float(weight_decay) < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    rate, gain, mu = group.get("correction_rate", "auto"), group.get("correction_gain", 10.0), group.get("mu", "auto")
    if rate != "auto" and not (not isinstance(rate, str) and 0.0 <= float(rate) <= 1.0):
        raise ValueError(f"Invalid correction_rate: {rate!r}, must be 'auto' or in [0, 1]")
    if not float(gain) >= 1.0:
        raise ValueError(f"Invalid correction_gain: {gain}, must be >= 1 (math.inf: no leak)")
    if not 0.0 <= float(group.get("beta2", 0.0)) < 1.0:
        raise ValueError(f"Invalid beta2: {group['beta2']}, must be in [0, 1)")
    if not 0.0 < float(group.get("eps", 1.0)) < math.inf:
        raise ValueError(f"Invalid eps: {group['eps']}, must be above 0")
    if group.get("lars") is not None and not 0.0 < float(group["lars"]) < math.inf:
        raise ValueError(f"Invalid lars: {group['lars']}, must be above 0, or None")
    if mu != "auto" and not 0.0 <= float(mu) < 1.0:
        raise ValueError(f"Invalid mu: {mu!r}, must be in [0, 1)")


def check_parameters(params: list[torch.Tensor]) -> None:
    """Raises TypeError for parameters that have no place in a flat buffer."""
    for p in params:
        kind, what = f"a parameter of shape {tuple(p.shape)}", None
        if p.layout != torch.strided:
            what = f"is sparse ({p.layout}): convert it with to_dense()"
        elif not (p.is_floating_point() or p.is_complex()):
            what = f"is of type {p.dtype}: only floating-point and complex parameters are optimized"
        elif p.is_meta:
            what = "is on the meta device: give the model storage (to_empty) before building the optimizer"
        if what is not None:
            raise TypeError(f"{kind} {what}")


def snapshot(group: dict[str, Any], names: tuple[str, ...]) -> tuple:
    """What tells whether a setting was changed since; a tensor on a device is known by its version, not read."""
    values = (group[name] for name in names)
    return tuple(
        v if not isinstance(v, torch.Tensor) else float(v) if scalars.on_host(v) else (id(v), v._version)
        for v in values
    )


def facts(group: dict[str, Any], params: list[torch.Tensor], engine: Engine) -> dict[str, str]:
    """What all ranks must have in common.

    Also what decides which bytes are sent in which order: gloo ends the process where a message of another length
    arrives, and a rank that enters a collective alone waits for `timeout`.
    """
    shapes = [(tuple(p.shape), tuple(p.stride()), str(p.dtype).removeprefix("torch.")) for p in params]
    split = [(p.placements, p.device_mesh.size()) if is_sharded(p) else "" for p in params]  # type: ignore[attr-defined]
    first = ("method", "topology", "schedule")  # what explains the rest
    names = [*first, *(k for k in group if k not in (*first, "params", "memory"))]
    return {
        "the number of parameters": str(len(params)),
        "parameter shapes, strides or types": str(shapes),
        "how the parameters are sharded": str(split),
        **{name: _text(group.get(name)) for name in names},
        "the topology's weights": engine.topology.fingerprint,
        "comm_dtype": str(engine.message_dtype),
        "bucket_mb": str(None if engine.bucket_bytes is None else engine.bucket_bytes / 2**20),
    }


def _text(value: object) -> str:
    return str(float(value)) if isinstance(value, torch.Tensor) else str(value)  # a tensor's text names its device
