"""What a user sets: options of the whole optimizer, settings of a parameter group, and what all ranks must share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..comm.sharded import is_sharded
from ..engine.engine import Engine
from ..layers.layer import Layer, checked
from ..rules import scalars
from ..rules.rule import Rule

FIRST = ("method", "topology", "schedule")  # of a group's entries, those that explain a difference in the others


@dataclass(frozen=True)
class Options:
    """Options of a `GossipSGD` or `Gossip` that hold for all groups, see there. Checked here, once."""

    schedule: str = "atc"
    overlap: bool | str = "auto"
    max_grad_norm: float | None = None
    layers: Any = ()  # a tuple of `Layer`s, once it is checked
    comm_dtype: torch.dtype | None = None
    fused: bool | None = None
    bucket_mb: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "layers", checked(self.layers))
        if self.schedule not in ("atc", "awc"):
            raise ValueError(f"Invalid schedule: {self.schedule!r}, must be 'atc' or 'awc'")
        if self.overlap not in (True, False, "auto"):
            raise ValueError(f"Invalid overlap: {self.overlap!r}, must be True, False or 'auto'")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm: {self.max_grad_norm}")
        if self.bucket_mb is not None and not self.bucket_mb > 0:
            raise ValueError(f"Invalid bucket_mb: {self.bucket_mb}")
        if self.comm_dtype is not None and not isinstance(self.comm_dtype, torch.dtype):
            raise TypeError(f"comm_dtype must be a torch.dtype, such as torch.bfloat16, not {self.comm_dtype!r}")
        if self.comm_dtype is not None and not self.comm_dtype.is_floating_point:
            raise ValueError(f"Invalid comm_dtype: {self.comm_dtype}, must be a floating type")

    @property
    def settings(self) -> dict[str, Any]:
        """Entries of a parameter group for the layers: what they let users set, and which of them keep state."""
        kept = ", ".join(str(layer) for layer in self.layers if layer.state)
        return {"layers": kept, **{k: v for layer in self.layers for k, v in layer.settings.items()}}

    def facts(self) -> dict[str, str]:
        """What all ranks must have in common, as text."""
        names = ("overlap", "max_grad_norm", "comm_dtype", "bucket_mb")
        return {name: str(getattr(self, name)) for name in names}


def check_names(rule: Rule, layers: tuple[Layer, ...]) -> None:
    """Raises ValueError if a method and the layers around it have settings, or buffers, of one name."""
    for what, names in (
        ("settings", [*rule.hyper, *(name for layer in layers for name in layer.settings)]),
        ("buffers", [*rule.state, *(name for layer in layers for name in layer.state)]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"method {rule.name!r} and the layers {list(layers)} share {what}: {', '.join(twice)}")


def check(group: dict[str, Any], rule: Rule, layers: tuple[Layer, ...]) -> None:
    """Raises TypeError or ValueError for a group's setting that makes no sense."""
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
    known = {*rule.hyper, *(name for layer in layers for name in layer.settings)}
    for name in ("lars", "slowmo"):  # options of former releases
        if group.get(name) is not None and name not in known:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group needs the layer: pass layers=[Lars(...)] or [SlowMo(...)]"
            )
    rule.check_hyper({name: group[name] for name in rule.hyper})
    for layer in layers:
        layer.check(group)
        if layer.whole and layer.finishes(group) and any(is_sharded(p) for p in group["params"]):
            raise ValueError(f"{layer} needs the norms of whole layers, but FSDP shards them: build without it")


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
    """What tells whether a setting was changed since. A tensor on a device is known by its version, not read."""
    values = (group[name] for name in names)
    return tuple(
        v if not isinstance(v, torch.Tensor) else float(v) if scalars.on_host(v) else (id(v), v._version)
        for v in values
    )


def facts(group: dict[str, Any], params: list[torch.Tensor], engine: Engine, options: Options) -> dict[str, str]:
    """What all ranks must have in common.

    Also what decides which bytes are sent in which order: gloo ends the process where a message of another length
    arrives, and a rank that enters a collective alone waits for `timeout`.
    """
    shapes = [(tuple(p.shape), tuple(p.stride()), str(p.dtype).removeprefix("torch.")) for p in params]
    split = [(p.placements, p.device_mesh.size()) if is_sharded(p) else "" for p in params]  # type: ignore[attr-defined]
    names = [*FIRST, *(k for k in group if k not in (*FIRST, "params", "memory"))]
    return {
        "the number of parameters": str(len(params)),
        "parameter shapes, strides or types": str(shapes),
        "how the parameters are sharded": str(split),
        **{name: _text(group.get(name)) for name in names},
        "the topology's weights": engine.topology.fingerprint,
        **options.facts(),
    }


def _text(value: object) -> str:
    return str(float(value)) if isinstance(value, torch.Tensor) else str(value)  # a tensor's text names its device
