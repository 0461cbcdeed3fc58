"""Steps of each parameter, for methods whose scalars depend on their number (Adam's bias corrections).

torch counts them by parameter. Here they are the group's, one number for all, as long as every parameter takes every
step. One whose gradients came later, or were missing, has its own, kept in the group's memory and so in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..engine.engine import Engine
from ..engine.slot import Slot

Arguments = dict[str, Any]  # of `Rule.scalars`, all but memory


class Counter:
    """Counts of one optimizer's parameters. Where a GPU knows whether a step was skipped, the group's count is there,
    and is everybody's."""

    def __init__(self, optimizer: Optimizer, engine: Engine, memory: str = "memory"):
        self.optimizer, self.engine = optimizer, engine
        self.memory = memory  # the entry of a group in which the rule's is

    def begin(self, arguments: Callable[[dict[str, Any]], Arguments]) -> None:
        """Before the groups' memories are those after this step. arguments: of `Rule.scalars`, from a group."""
        rule, groups = self.engine.rule, self.optimizer.param_groups
        if rule.counts is None:
            return
        memories = [dict(group[self.memory]) for group in groups]
        self.engine.local.counts = [memory.get(rule.counts, 0) for memory in memories]
        self.engine.local.scalars_at = lambda g, count: rule.scalars_at(
            count, memory=memories[g], **arguments(groups[g])
        )

    def note(self, unsure: bool = False) -> None:
        """After a step: keeps in the groups' memories which parameters have taken another number of steps.

        unsure: the slots counted a step that a device may have skipped.
        """
        for group, slot, j, count in self._each():
            if unsure and not isinstance(count, Tensor):
                slot.steps = min(slot.steps, count)
            if isinstance(count, Tensor) or slot.steps == count:
                group[self.memory].pop(f"steps of {j}", None)
            else:
                group[self.memory][f"steps of {j}"] = slot.steps

    def restore(self, lacks: Callable[[Slot], bool] = lambda slot: False) -> None:
        """After a checkpoint was loaded. lacks: whether a parameter was frozen, or not there, where it was saved."""
        for group, slot, j, count in self._each():
            slot.steps = 0 if lacks(slot) else int(group[self.memory].get(f"steps of {j}", count))

    def _each(self) -> Iterator[tuple[dict[str, Any], Slot, int, Any]]:
        counts = self.engine.rule.counts
        if counts is None:
            return
        slots = {slot.p: slot for b in self.engine.buckets for slot in b.slots}
        for group in self.optimizer.param_groups:
            for j, p in enumerate(group["params"]):
                if p in slots:
                    yield group, slots[p], j, group[self.memory].get(counts, 0)
