"""`Layer`: something around any rule, such as LARS or SlowMo. A new one is one file, and touches no other.

gradients final -> before(bucket, ...) -> the rule: send, average, update -> after(bucket, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..rules.scalars import Scalar


class Layer:
    """What happens around the rule in every step. Subclass it and override what is needed; pass it as `layers=[...]`.

    A bucket `b` is a run of parameters in flat memory: `b.x` parameters, `b.g` gradients, `b.extra[name]` the layer's
    buffers, each [N]; `b.slots` are the parameters in it, `slot.span` their places. `group` is the parameter group.
    """

    #: Buffers beside the rule's, by name, and what they start as: "zero", or "x", the parameters. In checkpoints.
    state: Mapping[str, str] = {}
    #: Whether it needs whole parameters, so that FSDP's shards are refused.
    whole: bool = False

    def __repr__(self) -> str:
        """By values: ranks compare it, and so does a checkpoint."""
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({values})"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Entries of a parameter group, with defaults: what users may set group by group, and schedule."""
        return {}

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for settings of a group that make no sense."""

    def finishes(self, group: Mapping[str, Any]) -> bool:
        """Whether `before` leaves the gradient scaled and decayed: the rule then runs without scale and decay."""
        return False

    def before(self, b: Any, active: list[bool], group: dict[str, Any], step: int, scale: Scalar) -> None:
        """Runs once per step and bucket, when the gradient is final and before the rule sees it.

        Args:
            active: for each slot, whether its parameter takes a local step.
            scale: what the gradient is to be multiplied by (1/loss scale, clipping, -1 to maximize).
        """

    def after(self, b: Any, group: dict[str, Any], step: int, mean: Callable[[torch.Tensor], None]) -> None:
        """Runs once per step and bucket, when the rule has updated `b.x`. `mean` averages over the workers in place."""

    # -- the same for the simulator, on arrays of all workers, [n, d] ------------------------------------------------

    def gradient(self, x: Any, g: Any, weight_decay: float) -> Any:
        """`before`, where `finishes`: the gradients that the rule sees."""
        return g

    def outer(self, x: Any, state: tuple, step: int, lr: float, memory: dict[str, float]) -> tuple[Any, tuple]:
        """`after`: new x and new state."""
        return x, state


def finishing(layers: Sequence[Layer], group: Mapping[str, Any]) -> bool:
    """Whether one of the layers leaves the final gradient, see `Layer.finishes`."""
    return any(layer.finishes(group) for layer in layers)


def checked(layers: Any) -> tuple[Layer, ...]:
    """`layers=` as a tuple. Raises TypeError for anything but a sequence of `Layer`s."""
    layers = tuple(layers) if isinstance(layers, (list, tuple)) else (layers,)
    for layer in layers:
        if not isinstance(layer, Layer):
            raise TypeError(f"layers must be a list of fused_dlam.layers.Layer, such as SlowMo(12), not of {layer!r}")
    return layers
