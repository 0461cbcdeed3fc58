"""Which parameters take part: those that are trainable now.

A frozen parameter is neither sent nor given state: of LoRA's model the adapters alone are exchanged. All ranks start
from rank 0's values of it. When it is trainable in a step() it moves into a bucket of its own, on all ranks in the same
step, and its first gradient counts. One that is frozen later keeps its place, and is averaged without a local step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..comm import sharded
from ..engine.buckets import Bucket
from ..engine.engine import Engine
from .overlaps import overlaps_itself


class Frozen:
    """The parameters, group by group, that are not in flat buffers."""

    def __init__(self) -> None:
        self.of_groups: list[list[torch.Tensor]] = []

    def enter(self, params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """A new group's trainable parameters, each once."""
        params = list({id(p): p for p in params}.values())  # torch warns of duplicates, and goes on
        self.of_groups.append([p for p in params if not p.requires_grad])
        return [p for p in params if p.requires_grad]

    def start_equal(self, engine: Engine) -> None:
        """Those of the last group take rank 0's values."""
        with torch.no_grad():
            for p in self.of_groups[-1]:
                here = writable(p)
                flat = here.detach().clone(memory_format=torch.contiguous_format)
                engine.place.start_equal(torch.view_as_real(flat) if flat.is_complex() else flat)
                here.copy_(flat)

    def zero_grad(self, set_to_none: bool) -> None:
        """One that was thawed has a gradient before it has a bucket."""
        for p in (p for params in self.of_groups for p in params):
            if p.grad is not None:
                p.grad = None if set_to_none else torch.zeros_like(p.grad)

    def thawed(self) -> list[tuple[int, list[torch.Tensor]]]:
        """(group, parameters) that are trainable now and were not."""
        found = []
        for number, params in enumerate(self.of_groups):
            now = [p for p in params if p.requires_grad]
            if now:
                found.append((number, now))
        return found

    def enter_late(self, params: list[torch.Tensor], group: int, engine: Engine, step: int) -> list[Bucket]:
        """Moves them into flat buffers, on all ranks in this step. Raises ValueError on all if they differ in which."""
        now = {id(p) for p in params}
        facts = {"which parameters became trainable": pattern(now, self.of_groups[group]), "the step": str(step)}
        shapes = ", ".join(str(tuple(p.shape)) for p in params[:3]) + (", ..." if len(params) > 3 else "")
        engine.place.agree(
            facts,
            cure="Set requires_grad alike on all ranks before the same step.",
            what=f"agreeing on parameters that became trainable here (of shapes {shapes}; all ranks alike)",
        )
        self.of_groups[group] = [p for p in self.of_groups[group] if id(p) not in now]
        new = engine.enter(params, group)
        for b in new:
            b.remember_nothing(engine.place.workers)
        return new


def writable(p: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter. An expanded one cannot be written in its place, and gets another."""
    here = sharded.local(p)
    if overlaps_itself(here):
        p.data = here = here.detach().clone(memory_format=torch.contiguous_format)
    return here


def pattern(now: set[int], of: Iterable[torch.Tensor]) -> str:
    return "".join("1" if id(p) in now else "0" for p in of)
