"""What a user sets: options of the whole optimizer, settings of a parameter group, and what all ranks must share."""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..comm.sharded import is_sharded
from ..engine.compressed import places
from ..engine.engine import Engine
from ..layers import compression, spikes
from ..layers.layer import Layer, checked, finishing
from ..rules import scalars
from ..rules.rule import COMMON, RESERVED, Rule, check_schedule
from ..rules.scalars import among, number
from ..topology import Topology
from .overlaps import overlapping

FIRST = ("method", "topology", "schedule")  # of a group's entries, those that explain a difference in the others

#: What a constructor takes by name beside hyper-parameters: what an unknown name may have been meant to be.
ARGUMENTS = (
    *FIRST, "group", "overlap", "clip", "max_grad_norm", "maximize", "layers", "hierarchical", "comm_dtype", "fused",
    "bucket_mb", "timeout", "on_failure", "min_workers", "admit_every", "on_members_changed", "nonfinite",
    "skip_late", "local_steps", "allow_unstable", "compress",
)  # fmt: skip

MESSAGES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types in which transports add and send
LARGEST_BUCKET = 2**40  # MiB
LONGEST_WAIT = 1e9  # seconds; beyond some 1e11 there is no timedelta
# What torch's schedulers keep in groups. They look like misspelled settings and are none.
SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
OUTSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))  # whose lines are not the user's


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
    nonfinite: str = "skip"
    clip: str | None = None
    skip_late: float | None = None
    local_steps: bool = False
    compress: Any = None  # a `Codec` or None, once it is checked

    def __post_init__(self):
        if not among(self.nonfinite, ("skip", "raise")):
            raise ValueError(f"Invalid nonfinite: {self.nonfinite!r}, must be 'skip' or 'raise'")
        object.__setattr__(self, "layers", checked(self.layers))
        check_schedule(self.schedule)
        spikes.check(self.clip)
        if self.clip is not None and self.max_grad_norm is not None:
            raise ValueError("clip='spikes' and max_grad_norm= both shorten gradients: choose one")
        if not among(self.overlap, (True, False, "auto")):
            raise ValueError(f"Invalid overlap: {self.overlap!r}, must be True, False or 'auto'")
        if self.max_grad_norm is not None and not number("max_grad_norm", self.max_grad_norm) > 0:
            raise ValueError(f"Invalid max_grad_norm: {self.max_grad_norm}, must be above 0, or None")
        if not among(self.local_steps, (True, False)):
            raise TypeError(f"local_steps must be True or False, not {self.local_steps!r}")
        if self.local_steps:
            self._check_local_steps()
        if not among(self.fused, (None, True, False)):
            raise ValueError(f"Invalid fused: {self.fused!r}, must be None, True or False")
        if self.bucket_mb is not None and not 0 < number("bucket_mb", self.bucket_mb) <= LARGEST_BUCKET:
            raise ValueError(
                f"Invalid bucket_mb: {_short(self.bucket_mb)}, must be MiB above 0 and finite, or None; one that is"
                " larger than the model makes one message of it"
            )
        for name in ("max_grad_norm", "bucket_mb"):  # a tensor or a fraction as the number that it is
            if getattr(self, name) is not None:
                object.__setattr__(self, name, number(name, getattr(self, name)))
        if self.comm_dtype is not None and not isinstance(self.comm_dtype, torch.dtype):
            raise TypeError(f"comm_dtype must be a torch.dtype, such as torch.bfloat16, not {self.comm_dtype!r}")
        if self.comm_dtype is not None and self.comm_dtype not in MESSAGES:
            known = ", ".join(map(str, MESSAGES))
            raise ValueError(f"Invalid comm_dtype: {self.comm_dtype}, must be a floating type, one of {known}")

        object.__setattr__(self, "compress", compression.get(self.compress))
        if self.compress is not None and self.comm_dtype is not None:
            raise ValueError(
                f"compress={self.compress} and comm_dtype={self.comm_dtype} both say what messages are made of: choose"
                " one"
            )
        if self.skip_late is not None and not 0 < number("skip_late", self.skip_late) <= LONGEST_WAIT:
            raise ValueError(f"Invalid skip_late: {_short(self.skip_late)}, must be seconds above 0, or None")
        if self.skip_late is not None and self.overlap is True:
            raise ValueError(
                "skip_late= sends in step() alone, for what is left out cannot be recalled: no overlap=True"
            )

    def check_compression(self, rule: Rule, topology: Topology) -> None:
        """Raises ValueError where there are no messages to be compressed, or too much of them to be remembered."""
        if self.compress is not None and rule.average == "gradient":
            raise ValueError(f"compress= is for messages to neighbors, and {rule.name!r} averages gradients over all")
        if topology.n > 1:
            places(self.compress, topology)

    def _check_local_steps(self) -> None:
        if self.overlap is True:
            raise ValueError(
                "local_steps=True sends in step(), where ranks agree on the weights of their steps: overlap=True cannot"
                " be had, take 'auto' or False"
            )
        if self.layers:
            raise ValueError(f"local_steps=True works without layers, which see step() alone: {list(self.layers)}")
        if self.nonfinite == "raise":
            raise ValueError("local_steps=True works with nonfinite='skip': nobody hears of a local step that raises")
        object.__setattr__(self, "overlap", False)

    @property
    def settings(self) -> dict[str, Any]:
        """Entries of a parameter group for the layers: what they let users set, and which of them keep state."""
        kept = ", ".join(str(layer) for layer in self.layers if layer.state)
        return {"layers": kept, **{k: v for layer in self.layers for k, v in layer.settings.items()}}

    def facts(self) -> dict[str, str]:
        """What all ranks must have in common, as text."""
        names = (  # local_steps= changes overlap=, and is to be named
            "local_steps", "overlap", "max_grad_norm", "comm_dtype", "bucket_mb", "nonfinite", "clip", "skip_late",
            "compress",
        )  # fmt: skip
        return {name: str(getattr(self, name)) for name in names}


def check_place(timeout: Any, group: Any, hierarchical: Any) -> None:
    """Raises TypeError or ValueError for places and waits that make no sense, also where one worker needs none."""
    if not 0 < number("timeout", timeout) <= LONGEST_WAIT:
        raise ValueError(f"Invalid timeout: {_short(timeout)}, must be seconds, above 0 and at most {LONGEST_WAIT:g}")
    if group is not None and dist.is_available():
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this rank is not in the given process group")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed.ProcessGroup (dist.new_group(...), mesh.get_group(...)) or None,"
                f" not {type(group).__name__}"
            )
    if hierarchical is None or isinstance(hierarchical, bool):
        return
    mesh = getattr(hierarchical, "mesh", None)
    if not isinstance(mesh, torch.Tensor) or mesh.dim() != 2:
        raise ValueError(f"hierarchical must be True, False or a DeviceMesh of two dimensions, not {hierarchical!r}")


def check_names(rule: Rule, layers: tuple[Layer, ...]) -> None:
    """Raises ValueError if a method and the layers around it have settings, or buffers, of one name."""
    for what, names in (
        ("settings", [*rule.hyper, *(name for layer in layers for name in layer.settings)]),
        ("buffers", [*rule.state, *(name for layer in layers for name in layer.state)]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"method {rule.name!r} and the layers {list(layers)} share {what}: {', '.join(twice)}")


def check(group: dict[str, Any], rule: Rule, chosen: Options) -> None:
    """Raises TypeError or ValueError for a group's setting that makes no sense."""
    layers = chosen.layers
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    for name in ("momentum", "weight_decay"):
        if isinstance(group[name], torch.Tensor):
            raise TypeError(f"{name} must be a number; only lr may be a tensor")
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= number("lr", lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {_short(lr)}")
    if not 0.0 <= number("momentum", momentum) < 1.0:
        raise ValueError(f"Invalid momentum value: {_short(momentum)}, must be in [0, 1)")
    if not 0.0 <= number("weight_decay", weight_decay) < math.inf:
        raise ValueError(f"Invalid weight_decay value: {_short(weight_decay)}")
    if not among(group.get("maximize", False), (True, False)):
        raise TypeError(f"maximize must be True or False, not {group['maximize']!r}")
    settings = [name for layer in layers for name in layer.settings]
    known = {*rule.hyper, *settings}
    _warn_of_misspelled(group, (*COMMON, "maximize", *rule.hyper, *settings))
    for name in ("lars", "slowmo"):  # options of former releases
        if group.get(name) is not None and name not in known:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group needs the layer: pass layers=[Lars(...)] or [SlowMo(...)]"
            )
    rule.check_hyper({name: group[name] for name in rule.hyper})
    for name in settings:
        if isinstance(group[name], str) and _is_number(group[name]):
            raise TypeError(f"{name} must be a number, not the text {group[name]!r}")
    if "lars" in settings and group["lars"] is not None:
        number("lars", group["lars"])
    for layer in layers:
        layer.check(group)
        if layer.whole and layer.finishes(group) and any(is_sharded(p) for p in group["params"]):
            raise ValueError(f"{layer} needs the norms of whole layers, but FSDP shards them: build without it")
    if chosen.clip and finishing(layers, group):
        raise ValueError(f"clip={chosen.clip!r} shortens the gradient before the rule, and {layers} replaces it")
    if chosen.clip and any(is_sharded(p) for p in group["params"]):
        raise ValueError(f"clip={chosen.clip!r} needs the norms of whole gradients, but FSDP shards them")


def _warn_of_misspelled(group: dict[str, Any], settable: Sequence[str]) -> None:
    """A UserWarning for entries of a group that are almost a setting. Others are kept without a word, as in torch."""
    for key in group:
        if key in settable or key in RESERVED or key in SCHEDULERS or not isinstance(key, str):
            continue
        near = difflib.get_close_matches(key.lower(), settable, 1, 0.8)
        if near:
            frame, level = sys._getframe(1), 2
            while frame.f_back is not None and frame.f_code.co_filename.startswith(OUTSIDE):
                frame, level = frame.f_back, level + 1
            warnings.warn(
                f"a parameter group has an entry {key!r}, which sets nothing. Did you mean {near[0]!r}?",
                stacklevel=level,
            )


def check_parameters(params: list[torch.Tensor], others: Iterable[torch.Tensor] = ()) -> None:
    """Raises TypeError for parameters that have no place in a flat buffer, ValueError for two on one memory.

    others: the parameters of the groups before.
    """
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
    both = overlapping([*others, *params])
    if both is not None:
        a, b = (tuple(p.shape) for p in both)
        raise ValueError(
            f"two parameters, of shapes {a} and {b}, share memory: in flat buffers they would come apart. Make them one"
            " parameter (decoder.weight = encoder.weight, in the place of decoder.weight.data = encoder.weight.data)"
        )


def snapshot(group: dict[str, Any], names: tuple[str, ...]) -> tuple:
    """What tells whether a setting was changed since. A tensor on a device is known by its version, not read."""
    values = (group[name] for name in names)
    return tuple(_known_by(v) for v in values)


def _known_by(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return float(value) if scalars.on_host(value) and value.numel() == 1 else (id(value), value._version)
    return value.tolist() if isinstance(value, np.ndarray) else value  # for == to be one truth value


#: Entries of a group that ranks may differ in: where each is in a round, whose overflows are its own.
OWN = ("params", "memory", "outer_memory", "gossip_every", "gossip_taken", "gossip_went", "gossip_batches")


def facts(group: dict[str, Any], params: list[torch.Tensor], engine: Engine, options: Options) -> dict[str, str]:
    """What all ranks must have in common.

    Also what decides which bytes are sent in which order: gloo ends the process where a message of another length
    arrives, and a rank that enters a collective alone waits for `timeout`.
    """
    shapes = [(tuple(p.shape), tuple(p.stride()), str(p.dtype).removeprefix("torch.")) for p in params]
    split = [(p.placements, p.device_mesh.size()) if is_sharded(p) else "" for p in params]  # type: ignore[attr-defined]
    names = [*FIRST, *(k for k in group if k not in (*FIRST, *OWN))]
    return {
        "the number of parameters": str(len(params)),
        "parameter shapes, strides or types": str(shapes),
        "how the parameters are sharded": str(split),
        "which parameters are trainable": "".join("1" if p.requires_grad else "0" for p in params),
        **{name: _text(name, group.get(name)) for name in names},
        "the topology's weights": engine.topology.fingerprint,
        **options.facts(),
    }


def _short(value: object) -> object:
    """A value as messages show it: text of an int of more than 4,300 digits is an error of its own."""
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 10**30 else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _text(name: str, value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element")
    return str(float(value))  # a tensor's text names its device


def check_again(group: dict[str, Any], rule: Rule, layers: Sequence[Layer]) -> None:
    """Before every step: one learning rate that is not finite would be the end of all workers' parameters.

    Raises ValueError or TypeError for what the constructor would refuse of what scripts set between steps: rates,
    momentum, hyper-parameters, the layers' settings. A tensor on a device is not read.
    """
    for name in ("lr", "weight_decay"):
        value = group[name]
        if isinstance(value, torch.Tensor) and (value.numel() != 1 or not scalars.on_host(value)):
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
            continue
        if not 0.0 <= number(name, value) < math.inf:
            raise ValueError(f"Invalid {name}: {_short(value)}, must be at least 0 and finite")
    if not 0.0 <= number("momentum", group["momentum"]) < 1.0:
        raise ValueError(f"Invalid momentum value: {_short(group['momentum'])}, must be in [0, 1)")
    if not among(group["maximize"], (True, False)):
        raise TypeError(f"maximize must be True or False, not {group['maximize']!r}")
    rule.check_hyper({name: group[name] for name in rule.hyper})
    for layer in layers:
        layer.check(group)
