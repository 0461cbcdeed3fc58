"""Mixed precision with a loss scaler: a step in which any rank's gradients overflow is nobody's local step.

A scaler leaves out `step()` where it finds an infinity. A rank that did so would send nothing, and its neighbors would
wait for it; so the optimizer takes `step()` over (`_step_supports_amp_scaling`), unscales in its passes, and always
exchanges. Whether there was an overflow is agreed on by an all-reduce of 4 bytes, in steps with a scaler only: then all
parameters are averaged as those without a gradient are, and momentum and corrections stay as they were, on all ranks.

    torch.amp.GradScaler     every rank steps, or none; a rank's scale follows its own overflows alone
    fused_dlam.GradScaler    the same, and scales and growth trackers are equal on all ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..comm.group import Group, log
from ..engine.arrivals import Overlap
from ..engine.engine import Engine
from ..rules.scalars import Scalar, on_host, scalar


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` whose scale is the same on all ranks: each learns of every rank's overflow.

    For a `GossipSGD`; other optimizers are scaled as by torch's. Every rank must use one, and call `step` (or
    `unscale_`) equally often. Costs an all-reduce of 4 bytes per step, where torch's costs the same.
    """

    def _unscale_grads_(self, optimizer: Any, inv_scale: Any, found_inf: Any, allow_fp16: bool) -> Any:
        # Both ways to look for overflows, unscale_ and step, come through here, and update() reads what is returned.
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        agree = getattr(optimizer, "agree_on_overflow", None)
        if agree is not None:
            found = found or {found_inf.device: found_inf}  # no gradient here: this rank takes part all the same
            agree(list(found.values()))
        return found


def unscale(optimizer: Any, engine: Engine, overlap: Overlap) -> None:
    """At the start of a step() that a scaler called: whether it is skipped.

    With several workers this waits for the GPU, as torch's scaler does for optimizers that do not take it over. With
    one there is nothing to agree on: the passes read on the device whether they are to do anything, as torch's fused
    ones.

    Raises RuntimeError where messages have left in the backward pass.
    """
    overlap.hold_back("a GradScaler tells in step() whether gradients overflowed")
    if engine.silent and engine.inside is None and not on_host(torch.as_tensor(optimizer.found_inf)):
        engine.skipping = optimizer.found_inf.detach().reshape(())
        optimizer._overflow_agreed = None
        return
    engine.skip = overflowed(optimizer)
    if engine.skip and not optimizer.found_inf:
        log.warning(
            "gradients overflowed on another rank, so no rank takes this local step, and the GradScaler of this one"
            " does not learn of it. fused_dlam.GradScaler keeps the scales of all ranks equal."
        )
    if engine.averager is not None and optimizer.grad_scale is not None:  # ranks may have scales of their own
        for b in engine.buckets:
            b.g.mul_(1.0 / scalar(optimizer.grad_scale))
        optimizer.grad_scale = None


def overflowed(optimizer: Any) -> bool:
    """Whether gradients overflowed on any rank, in a step() that a scaler called: agreed on now, unless it was."""
    anywhere = torch.as_tensor(optimizer.found_inf, dtype=torch.float32).clone()
    if optimizer._overflow_agreed != optimizer._step:
        optimizer.agree_on_overflow([anywhere])
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


def agree(engine: Engine, found: Sequence[torch.Tensor], step: int) -> None:
    """Sets every tensor of `found` to the largest of all of them on all ranks."""
    worst = torch.stack([f.detach().reshape(()).to(found[0].device) for f in found]).amax().reshape(1)
    for exchange in (engine.inside, engine.exchange):
        if exchange is not None:
            worst = _largest(exchange, worst, step)
    for f in found:
        f.fill_(worst[0]) if f.device == worst.device else f.fill_(float(worst))


def _largest(exchange: Group, value: torch.Tensor, step: int) -> torch.Tensor:
    host = value.to(exchange.wire)
    with exchange.watched("agreeing on an overflow (found_inf)", step):
        dist.all_reduce(host, op=dist.ReduceOp.MAX, group=exchange.group)
    exchange.bytes_sent += 2 * (exchange.size - 1) / exchange.size * host.numel() * host.element_size()
    return host
