"""The rule over buckets: its passes, the present step's scalars, and the layers around it. Nothing here is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..kernels.passes import Passes, choose
from ..layers.layer import Layer, finishing
from ..rules.rule import Rule
from ..rules.scalars import Scalar, Scalars
from .buckets import Bucket
from .spikes import Shortened, key, shortened


class Local:
    """What a worker computes by itself.

    Args:
        guard: whether what is not finite is kept from spreading.
        only_averages: whether an inner optimizer steps x.
        clips: whether gradients far longer than usual are shortened.
    """

    def __init__(
        self,
        rule: Rule,
        layers: tuple[Layer, ...],
        fused: bool | None,
        guard: bool,
        only_averages: bool,
        clips: bool,
    ):
        self.rule, self.layers, self.fused, self.guard, self.only_averages = rule, layers, fused, guard, only_averages
        self.clips = clips
        # Per group, for it has scalars of its own: passes by device and type of the master values.
        self.passes: list[dict[tuple[torch.device, torch.dtype], Passes]] = []
        self._before = [layer for layer in layers if type(layer).before is not Layer.before]
        self._after = [layer for layer in layers if type(layer).after is not Layer.after]
        self._groups: Sequence[dict[str, Any]] = ()
        self._scalars: list[Scalars] = []
        # Of rules that count steps: those each group has taken, and a group's scalars for another number of them.
        self.counts: list[Scalar] = []
        self.scalars_at: Callable[[int, int], Any] = lambda group, count: None

    @property
    def changes_gradients(self) -> bool:
        """Whether layers see the gradient before the rule: then that is a copy of what the script sees."""
        return bool(self._before)

    def choose(self, new: Iterable[Bucket], group: int) -> list[Bucket]:
        """Passes for new buckets of a group. Returns the first of each kind."""
        first: dict[tuple[torch.device, torch.dtype], Bucket] = {}
        elements: dict[tuple[torch.device, torch.dtype], int] = {}
        for b in new:
            kind = b.x.device, b.x.dtype
            first.setdefault(kind, b)
            elements[kind] = elements.get(kind, 0) + b.N
        for kind in first.keys() - self.passes[group].keys():
            new_one = choose(self.rule, *kind, elements[kind], self.fused, guard=self.guard)
            self.passes[group][kind] = new_one
            if group < len(self._scalars):  # in the middle of a step
                new_one.set(self._for_rule(self._scalars[group], self._groups[group]))
        return list(first.values())

    def set(self, scalars: Sequence[Scalars], groups: Sequence[dict[str, Any]]) -> None:
        """The step's scalars, one entry per group, and the parameter groups that layers read."""
        self._scalars, self._groups = list(scalars), groups or [{}] * len(self.passes)
        for of_group, s, group in zip(self.passes, self._scalars, self._groups, strict=True):
            for one in of_group.values():
                one.set(self._for_rule(s, group))

    def without_neighbors(self) -> None:
        """The present step is one of this worker alone. One that has no scalars yet gets them when it begins anew."""
        if len(self._scalars) == len(self.passes):
            self.set([s._replace(weights=()) for s in self._scalars], self._groups)

    def _for_rule(self, s: Scalars, group: dict[str, Any]) -> Scalars:
        return s._replace(grad_scale=1.0) if finishing(self.layers, group) else s

    def scalars_of(self, b: Bucket) -> Scalars:
        return self._scalars[b.group]

    def passes_of(self, b: Bucket) -> Passes:
        return self.passes[b.group][b.x.device, b.x.dtype]

    def low_of(self, b: Bucket) -> torch.Tensor | None:
        """16-bit parameters, which a script may have written, for passes. An inner optimizer's steps are absorbed."""
        return None if self.only_averages or b.anchored else b.low

    def gradient_of(self, b: Bucket) -> torch.Tensor:
        """What passes are given as the gradient: around an inner optimizer the parameters."""
        return b.low if self.rule.traveled and b.low is not None else b.g

    def shortened(self, b: Bucket, active: list[bool]) -> Shortened:
        """How a bucket's gradient is shortened, see spikes.py."""
        return shortened(b, active, self._scalars[b.group], self._groups[b.group])

    def done(self, b: Bucket, usual: Scalar | None) -> None:
        """A bucket's step is done. usual: the running norm after it."""
        if usual is not None:
            group = self._groups[b.group]
            group["memory"][key(b, group)] = usual

    def runs(self, b: Bucket, active: list[bool], factor: Scalar = 1.0) -> Iterator[tuple[slice, bool]]:
        """Runs of a bucket that one pass can do, with the scalars set for it: (span, whether they take a local step).

        factor: what its gradient is multiplied by beside the step's scale.

        A method that counts steps (Adam) counts those of each parameter, which may have got its first gradient late.
        """
        counted = self.rule.counts is not None and not self.only_averages
        count = self.counts[b.group] if counted else 0
        alike = not counted or isinstance(count, torch.Tensor) or all(slot.steps == count for slot in b.slots)
        if alike and not self.clips:
            yield from b.runs(active)
            return
        passes, usual = self.passes_of(b), self._scalars[b.group]
        shorter = usual._replace(grad_scale=usual.grad_scale * factor) if self.clips else usual
        try:
            if alike:
                passes.set(shorter)
                yield from b.runs(active)
                return
            for span, (now, own) in b.runs([(now, slot.steps) for now, slot in zip(active, b.slots, strict=True)]):
                passes.set(self._for_rule(shorter._replace(h=self.scalars_at(b.group, own)), self._groups[b.group]))
                yield span, now
        finally:
            passes.set(self._for_rule(usual, self._groups[b.group]))

    def pack(self, b: Bucket, span: slice, message: torch.Tensor) -> None:
        low = self.low_of(b)
        self.passes_of(b).pack(
            b.x[span],
            self.gradient_of(b)[span],
            tuple(t[span] for t in b.state),
            message[:, span],
            None if low is None else low[span],
        )

    def combine(self, b: Bucket, span: slice, received: torch.Tensor, copies: tuple[torch.Tensor, ...]) -> None:
        low, state = self.low_of(b), tuple(t[span] for t in b.state)
        g = self.gradient_of(b)[span]
        self.passes_of(b).combine(b.x[span], g, state, received, copies, None if low is None else low[span])

    def before(self, b: Bucket) -> list[tuple[Layer, dict[str, Any], Scalar]]:
        """The layers that see a bucket's gradient before the rule, its group, and the gradient's scale."""
        scale = self._scalars[b.group].grad_scale
        return [(layer, self._groups[b.group], scale) for layer in self._before]

    def after(self, b: Bucket) -> list[tuple[Layer, dict[str, Any]]]:
        """The layers that see a bucket's parameters after the rule."""
        return [(layer, self._groups[b.group]) for layer in self._after]
