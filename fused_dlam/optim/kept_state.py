"""The optimizer's state as scripts see it: entries that are views of flat buffers, whatever a script does to them.

With torch's optimizers one starts momentum anew by `opt.state.clear()`, `opt.state = defaultdict(dict)`, or by putting
a tensor in the place of an entry. The passes read flat buffers: what was put there moves into them, what is gone is
zero.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from ..comm.sharded import local
from ..engine.buckets import Bucket
from ..engine.compressed import is_memory
from ..engine.engine import Engine
from ..engine.slot import Slot


def show(state: MutableMapping[torch.Tensor, Any], engine: Engine, b: Bucket, slot: Slot) -> None:
    """Puts views of the flat buffers into a parameter's state."""
    # `.data`: a version counter of its own, which the script moves and passes over the flat buffer do not.
    slot.shown = {name: slot.stateful(t).data for name, t in engine.buffers(b).items()}
    others = {name: value for name, value in (state.get(slot.p) or {}).items() if not is_memory(name)}
    state[slot.p] = {**others, **slot.shown}


@torch.no_grad()
def reclaim(state: MutableMapping[torch.Tensor, Any], engine: Engine) -> bool:
    """Takes over what a script put in the place of the entries since; whether it did.

    Raises ValueError for an entry of another shape.
    """
    found = False
    for b in engine.buckets:
        for slot in b.slots:
            entries = state.get(slot.p) or {}
            for name, view in slot.shown.items():
                if entries.get(name) is not view:
                    break
            else:
                continue
            for name, buffer in engine.buffers(b).items():
                if is_memory(name):  # its neighbors have the same: what a script clears is not to set them apart
                    continue
                put_back(engine, slot, name, slot.view(buffer), entries.get(name))
            show(state, engine, b, slot)
            found = True
    return found


def put_back(engine: Engine, slot: Slot, name: str, view: torch.Tensor, value: Any) -> None:
    """One entry into its flat buffer. None: as at the start."""
    if value is None and name == "master":
        return  # x keeps its digits, and takes over what was written into the parameter
    if value is None:
        view.copy_(slot.data) if name in engine.starting_at_x else view.zero_()
        return
    value = local(value)
    if value.shape != view.shape:
        raise ValueError(
            f"the optimizer's state {name!r} of a parameter of shape {tuple(slot.p.shape)} was replaced by a tensor of"
            f" shape {tuple(value.shape)}"
        )
    view.copy_(value)
