"""Checkpoints: plain tensors out of flat buffers, and back into them."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from .engine import Engine


def check(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError for a checkpoint of another method or topology."""
    for theirs, ours in zip(state_dict["param_groups"], param_groups, strict=False):
        for what in ("method", "topology", "schedule", "slowmo"):
            if what in theirs and theirs[what] != ours[what]:
                raise ValueError(f"the checkpoint is of {what} {theirs[what]!r}, this optimizer of {ours[what]!r}")
        if theirs.get("dampening"):
            raise ValueError("the checkpoint uses dampening, which no method here defines")
        if "nesterov" in theirs and theirs["nesterov"] != ours["method"].startswith("nesterov-"):
            raise ValueError(
                f"the checkpoint is of torch.optim.SGD(nesterov={theirs['nesterov']}): build with the same nesterov="
            )


def by_parameter(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[torch.Tensor, dict]:
    """A checkpoint's state by parameter, uncast: torch rounds state to the parameter's type when it loads, which would
    ruin float32 state of 16-bit parameters."""
    return {
        p: state_dict["state"].get(key, {})
        for theirs, group in zip(state_dict["param_groups"], param_groups, strict=True)
        for key, p in zip(theirs["params"], group["params"], strict=True)
    }


def restore(saved: dict[torch.Tensor, dict], optimizer: Optimizer, engine: Engine) -> None:
    """Copies saved state into the flat buffers and makes the optimizer's state views of them again."""
    with torch.no_grad():
        for b in engine.buckets:
            for slot in b.slots:
                values = optimizer.state[slot.p]
                for name, buffer in engine.buffers(b).items():
                    view, value = slot.view(buffer), saved[slot.p].get(name)
                    if value is not None:
                        view.copy_(value)
                    elif name in ("master", "slow_anchor"):
                        view.copy_(slot.p)
                    else:
                        view.zero_()
                    values[name] = view


def detach(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copies the views, so that a checkpoint holds plain tensors and not whole flat buffers."""
    state = {
        key: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} if isinstance(s, dict) else s
        for key, s in state_dict["state"].items()
    }
    groups = [
        {k: numbers(v) if isinstance(v, dict) else v for k, v in group.items()} for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": state, "param_groups": groups}


def numbers(memory: dict[str, Any]) -> dict[str, Any]:
    """A copy of what a rule remembers of its scalars, without tensors: a checkpoint may be loaded on another device."""
    return {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in memory.items()}
