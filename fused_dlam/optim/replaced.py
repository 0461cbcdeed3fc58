"""Parameters of a model that were replaced by other objects, while the optimizer goes on with the old ones.

A new layer, `load_state_dict(assign=True)`, `torch.__future__.set_overwrite_module_params_on_conversion`: torch's
optimizers train the old objects without a word. An optimizer knows no names; where it is given a model it can see them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..engine.rehoming import lives_in_a_bucket


class Seen:
    """Which models hold an optimizer's parameters, and under which names, as far as `averaged` was given them."""

    def __init__(self) -> None:
        self.models: WeakKeyDictionary[torch.nn.Module, dict[str, int]] = WeakKeyDictionary()

    def replaced(self, model: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[str]:
        """The names of trainable parameters that were the optimizer's, and are other objects now.

        That is known of a model that was here before, and of one of which other parameters have the names that the
        optimizer was given (`named_parameters()`) and are the same.
        """
        ours = {id(p) for group in groups for p in group["params"]}
        named = {name: id(p) for group in groups
                 for name, p in zip(group.get("param_names", ()), group["params"], strict=False)}  # fmt: skip
        now = dict(model.named_parameters(remove_duplicate=False))
        known = self.models.get(model, {})
        if any(id(p) == named.get(name) for name, p in now.items()):
            known = {**named, **known}
        found = [name for name, p in now.items() if id(p) not in ours and p.requires_grad and known.get(name) in ours]
        if not found:
            self.models[model] = {name: id(p) for name, p in now.items() if id(p) in ours}
        return found


def forgets(model: torch.nn.Module, params: Iterable[torch.Tensor]) -> list[str]:
    """The names of trainable parameters that are in no flat buffer, of a model that has some of the optimizer's."""
    ours = {id(p) for p in params}
    if not any(id(p) in ours for p in model.parameters()):
        return []
    others = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    return [name for name, p in others if not lives_in_a_bucket(p)]


def untrained(model: torch.nn.Module, params: Iterable[torch.Tensor]) -> bool:
    """Whether gradients go to a model that has none of the optimizer's parameters, and to none of those."""
    return any(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in params)
