"""Mixed precision with a loss scaler: a step in which any rank's gradients overflow is nobody's local step.

A scaler leaves out `step()` where it finds an infinity. A rank that did so would send nothing, and its neighbors would
wait for it; so the optimizer takes `step()` over (`_step_supports_amp_scaling`), unscales in its passes, and always
exchanges. Whether there was an overflow is agreed on by an all-reduce of 4 bytes, in steps with a scaler only: then all
parameters are averaged as those without a gradient are, and momentum and corrections stay as they were, on all ranks.

Where gradients are averaged (over all workers, or inside a machine) they are averaged as they are, scaled: unscaled in
float16, 2e-8 is zero. Ranks may have scales of their own, so there 4 bytes more agree on the smallest, to which every
rank brings its gradients before they are averaged. The passes unscale by it.

    torch.amp.GradScaler     every rank steps, or none; a rank's scale follows its own overflows alone
    fused_dlam.GradScaler    the same, and scales and growth trackers are equal on all ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..comm.group import Group
from ..comm.place import Place
from ..comm.watch import log
from ..engine.arrivals import Arrivals
from ..engine.engine import Engine
from ..rules.scalars import Scalar, on_host


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose scale is the same on all ranks: each learns of every rank's overflow.

    For a `GossipSGD`, or a `Gossip` that exchanges in every step; others are scaled as by torch's: with every=H an
    inner step is a rank's own, and so are its overflow and its scale. With hierarchical= they are a machine's, and
    equal on its ranks. Every rank must use one, and call `step` (or `unscale_`) equally often. Costs an all-reduce of 4
    bytes per step (8 where gradients are averaged), where torch's costs the same.
    """

    _by_hand = False  # whether the gradients are being unscaled for good, by a script's unscale_

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self._by_hand = True
        try:
            super().unscale_(optimizer)
        finally:
            self._by_hand = False

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        # Both ways to look for overflows, unscale_ and step, come through here, and update() reads what is returned.
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        agree = getattr(optimizer, "agree_on_overflow", None)
        if agree is not None:
            found = found or {found_inf.device: found_inf}  # no gradient here: this rank takes part all the same
            earlier = getattr(optimizer, "grad_scale", None)
            scale = None if self._by_hand else self._scale if earlier is None else self._scale * earlier
            agree(list(found.values()), scale)
        return found


def unscale(optimizer: Any, engine: Engine, arrivals: Arrivals) -> Scalar:
    """At the start of a step(): not 0 if it is skipped, for a scaler called it that found an overflow.

    With several workers this waits for the GPU, as torch's scaler does for optimizers that do not take it over. With
    one there is nothing to agree on: a number on the device comes back, and the passes read there whether they are to
    do anything, as torch's fused ones.
    """
    engine.factor = 1.0
    if getattr(optimizer, "found_inf", None) is None:
        return 0.0
    arrivals.hold_back("a GradScaler tells in step() whether gradients overflowed")
    if engine.place.alone and not on_host(torch.as_tensor(optimizer.found_inf)):
        optimizer._overflow_agreed = None
        return optimizer.found_inf.detach().reshape(())
    skip = overflowed(optimizer)
    if skip and not optimizer.found_inf:
        log.warning(
            "gradients overflowed on another rank, so no rank takes this local step, and the GradScaler of this one"
            " does not learn of it. fused_dlam.GradScaler keeps the scales of all ranks equal."
        )
    if not skip:
        engine.factor = to_common_scale(optimizer)
    return float(skip)


def to_common_scale(optimizer: Any) -> float:
    """Before gradients are averaged: what those of this rank are to be multiplied by, so that all have one loss scale.

    It is the smallest of all, so that nothing overflows, and is `optimizer.grad_scale` from here on. The rank whose own
    it was multiplies by 1. Where nothing is averaged, ranks keep their own.
    """
    common = optimizer._common_scale
    if common is None:
        return 1.0
    scale = getattr(optimizer, "grad_scale", None)
    optimizer._own_scale = optimizer._moment, scale
    optimizer.grad_scale = None if common == 1.0 else common
    return common / _own(scale)


def alone(optimizer: Any) -> None:
    """This worker is alone until it goes on with others: a step that is tried again has its own loss scale."""
    step, scale = optimizer._own_scale
    if step == optimizer._moment:
        optimizer.grad_scale = scale
    optimizer._own_scale, optimizer._common_scale = (None, None), None


def _own(scale: Any) -> float:
    """A loss scale as it is agreed on: in float32, which scalers keep it in, and 1 where there is none."""
    return 1.0 if scale is None else float(torch.as_tensor(scale, dtype=torch.float32))


def overflowed(optimizer: Any) -> bool:
    """Whether gradients overflowed on any rank, in a step() that a scaler called: agreed on now, unless it was."""
    anywhere = torch.as_tensor(optimizer.found_inf, dtype=torch.float32).clone()
    if optimizer._overflow_agreed != optimizer._moment:
        optimizer._agree_on_overflow([anywhere], getattr(optimizer, "grad_scale", None))
    optimizer._overflow_agreed = None  # a checkpoint may go back to this very step
    return bool(anywhere)


def remembered(before: dict[str, Any], after: dict[str, Any], skipping: torch.Tensor) -> dict[str, Any]:
    """What a rule remembers of its scalars: of a step that the device knows to be skipped or not, nothing or all.

    Numbers that such a step would change become numbers on the device, so that the host need not wait. In the first
    step, before which there is nothing to go back to, it does.
    """
    if after.keys() - before.keys():
        return before if bool(skipping) else after
    kept = {}
    for name, new in after.items():
        old = before[name]
        if isinstance(new, torch.Tensor) or isinstance(old, torch.Tensor) or new != old:
            new = torch.where(skipping != 0, _number(old, skipping), _number(new, skipping))
        kept[name] = new
    return kept


def _number(value: Scalar, like: torch.Tensor) -> torch.Tensor:
    """On the device of `like`, without a copy from the host."""
    return value if isinstance(value, torch.Tensor) else torch.full_like(like, value, dtype=torch.float64)


def agree(
    place: Place | Group, found: Sequence[torch.Tensor], step: int, scale: Any = None, scales: bool = False
) -> Any:
    """Sets every tensor of `found` to the largest of all of them on all ranks of a place, or of a machine.

    scales: also returns the smallest of all ranks' loss scales, of which this rank's is `scale`; else None.
    """
    worst = torch.stack([f.detach().reshape(()).to(found[0].device) for f in found]).amax().reshape(1)
    if scales:
        own = torch.as_tensor(1.0 if scale is None else scale, dtype=worst.dtype, device=worst.device)
        worst = torch.cat([worst, -own.detach().reshape(1)])
    worst = place.largest(worst, "agreeing on an overflow (found_inf)", step)
    for f in found:
        f.fill_(worst[0]) if f.device == worst.device else f.fill_(float(worst[0]))
    return -float(worst[1]) if scales else None
