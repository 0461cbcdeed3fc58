"""Gradient clipping in mixed precision, under Lightning and Fabric: what their plugins share.

Both refuse to clip for an optimizer that unscales in step() (`_step_supports_amp_scaling`), as torch's fused ones do.
Ours takes gradients that were unscaled before as well. So the plugins that the strategies put in place unscale them as
for any other optimizer, which costs nothing more: a scaler looks for an overflow in the same pass.
"""

from __future__ import annotations

from typing import Any

from torch.amp.grad_scaler import OptState

from .. import Gossip, GossipSGD


def unscale(scaler: Any, optimizer: Any) -> None:
    """Unscales the gradients of an optimizer that gossips, unless that was done since its last step."""
    if scaler is None or not scaler.is_enabled() or not isinstance(optimizer, (GossipSGD, Gossip)):
        return
    if scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
        scaler.unscale_(optimizer)


def check_others(scaler: Any, optimizer: Any) -> None:
    """Before a step: raises RuntimeError if gradients of another optimizer are unscaled, which the scaler forgets."""
    if scaler is None or not scaler.is_enabled():
        return
    states = scaler._per_optimizer_states.items()
    if any(state["stage"] is OptState.UNSCALED and of != id(optimizer) for of, state in states):
        raise RuntimeError(
            "step() of one optimizer between the clipping of another one's gradients and its step(): the loss scale is"
            " updated after every step, and what was unscaled would be unscaled again. Clip each optimizer's gradients"
            " right before its step()"
        )
