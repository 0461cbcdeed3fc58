"""How a step begins: its scalars are fixed, in the backward pass when the first message leaves, or in step().

From then on a change of a hyper-parameter is a reason to begin anew, and to send anew what has left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..engine.clip import clip_coefficient
from ..engine.engine import Engine
from ..engine.header import told
from ..layers.layer import finishing
from ..rules.scalars import Scalar, Scalars, scalar
from . import mixed_precision, options
from .certificate import Certificate
from .counter import Arguments, Counter
from .kept_state import reclaim
from .local_steps import LocalSteps, local_gradient_scale
from .options import Options
from .skipping import contraction

if TYPE_CHECKING:
    from .gossip_sgd import GossipSGD


class Opening:
    """From parameter groups to an engine's step."""

    def __init__(
        self, optimizer: GossipSGD, engine: Engine, certificate: Certificate, chosen: Options, counter: Counter,
        local_steps: LocalSteps,
    ):  # fmt: skip
        self.optimizer, self.engine, self.certificate = optimizer, engine, certificate
        self.options, self.counter, self.local_steps = chosen, counter, local_steps
        self.committed: int | None = None  # the last step of which what the rule remembers is kept
        self._whole = False  # the last attempt to begin was not interrupted
        self._after: tuple[list[dict[str, Any]], Scalar] = [], 0.0  # the groups' memories once it is done, and its skip

    @property
    def done(self) -> bool:
        """Whether the present step has begun."""
        return self.engine.step is not None and self._whole

    def move(self, certificate: Certificate) -> None:
        """Other neighbors: a step that has begun begins anew, for its scalars hold the weights of others.

        certificate: of the graph, which was found to be stable with the groups as they are (succession.py).
        """
        self.certificate, self._whole = certificate, False
        for group in self.optimizer.param_groups:
            certificate.trust(group)

    def begin_early(self) -> None:
        """In the backward pass, before the first message leaves."""
        reclaim(self.optimizer.state, self.engine)
        self.begin()

    def begin(self, skip: Scalar = 0.0) -> None:
        """Fixes this step's scalars, anew if it has begun. skip: see `Engine.begin`."""
        engine, groups = self.engine, self._checked_groups()
        self._whole, settings = False, self.settings()
        memories = [dict(group["memory"]) for group in groups]
        # What may raise comes before anything has begun, so that step() can be called again.
        h = [
            self.local_steps.weighed(self._scalars(group, memory))
            for group, memory in zip(groups, memories, strict=True)
        ]
        self.counter.begin(self._arguments)
        engine.settings = told(settings)
        engine.begin(self.optimizer._step, skip)
        if self.options.max_grad_norm is not None and engine.message.leaves_early and not engine.flights:
            self._set(h, 1.0)  # clipping opens flights, and they may pack x for a narrower message
        self._set(h, self._gradient_scale())  # of the whole gradient: once, whatever the number of groups
        self._after = memories, skip
        self._whole = True

    def _checked_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, of which scripts may have set anything since."""
        for group in self.optimizer.param_groups:
            options.check_again(group, self.engine.rule, self.options.layers)
            self.certificate.recheck(group)
        return self.optimizer.param_groups

    def settings(self) -> list[tuple]:
        """What a user may change at any time, group by group; learning rates come first."""
        names = ("lr", "momentum", "weight_decay", "maximize", *self.options.settings, *self.engine.rule.hyper)
        return [options.snapshot(group, names) for group in self.optimizer.param_groups]

    def _scalars(self, group: dict[str, Any], memory: dict[str, Any], exchanges: bool = True) -> Any:
        """The rule's scalars for a group; `memory` becomes what it is after this step."""
        return self.engine.rule.scalars(memory=memory, **self._arguments(group, exchanges))

    def _arguments(self, group: dict[str, Any], exchanges: bool = True) -> Arguments:
        """What the rule derives a group's scalars from, see `Rule.scalars`, but what it remembers."""
        hyper = {name: group[name] for name in self.engine.rule.hyper}
        weight_decay = 0.0 if finishing(self.options.layers, group) else float(group["weight_decay"])
        rho, static = contraction(self.engine.topology, self.options.skip_late)
        return dict(
            lr=scalar(group["lr"]), momentum=float(group["momentum"]), weight_decay=weight_decay, rho=rho,
            static=static, hyper=hyper, mass=self.engine.masses(self.optimizer._step, exchanges),
        )  # fmt: skip

    def commit(self) -> None:
        """In step(): what the rule remembers of this step's scalars counts from here on, but of a skipped one nothing.

        Not before: a checkpoint between the backward pass and step() is one of before the step.
        """
        memories, skip = self._after
        self.committed = self.optimizer._step
        for group, memory in zip(self.optimizer.param_groups, memories, strict=True):
            if isinstance(skip, torch.Tensor):
                group["memory"] = mixed_precision.remembered(group["memory"], memory, skip)
            elif not skip:
                group["memory"] = memory
        self.local_steps.correct(self.optimizer.param_groups)

    def local_scalars(self, weighed: Callable[[Any], Any]) -> list[Scalars]:
        """Those of a local step, which the groups' memories do not remember. weighed: what it makes of the rule's."""
        groups = self._checked_groups()
        h = [weighed(self._scalars(group, dict(group["memory"]), exchanges=False)) for group in groups]
        scale = local_gradient_scale(self.engine, self.options.max_grad_norm)
        return [Scalars(own, (), -scale if group["maximize"] else scale) for own, group in zip(h, groups, strict=True)]

    def _set(self, h: list[Any], scale: Scalar) -> None:
        groups = self.optimizer.param_groups
        scales = [-scale if group["maximize"] else scale for group in groups]
        self.engine.set_scalars([Scalars(own, (), s) for own, s in zip(h, scales, strict=True)], groups)

    def _gradient_scale(self) -> Scalar:
        """What gradients are multiplied by: 1 / loss scale, clipped. On a GPU nothing here waits for it."""
        loss_scale = getattr(self.optimizer, "grad_scale", None)
        unscale = self.optimizer._join_factor * (1.0 if loss_scale is None else 1.0 / scalar(loss_scale))
        limit = self.options.max_grad_norm
        return unscale if limit is None else unscale * clip_coefficient(self.engine, unscale, limit)
