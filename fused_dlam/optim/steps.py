"""`GossipSGD`'s step, told in order, and what of it has to change when its neighbors do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..comm.errors import ExchangeError
from ..engine.arrivals import Arrivals
from ..engine.buckets import Bucket
from ..engine.health import Health
from ..engine.step_allowed import check_step_allowed
from ..rules.rule import Rule
from ..rules.scalars import Scalar
from ..topology import Topology
from . import mixed_precision
from .certificate import Certificate
from .counter import Counter
from .frozen import Frozen
from .kept_state import reclaim, show
from .local_steps import LocalSteps, refuse_scaler
from .opening import Opening
from .options import Options
from .shared import GossipOptimizer


class Steps(GossipOptimizer):
    """The part of a `GossipSGD` that steps."""

    _options: Options
    _opening: Opening
    _arrivals: Arrivals
    _health: Health
    _counter: Counter
    _frozen: Frozen
    _certificate: Certificate
    _local_steps: LocalSteps
    _chosen: tuple[Rule, Topology, Options]
    _choose: Callable[[Rule, Topology, Options, bool], None]
    _watch: Callable[[Sequence[Bucket]], None]

    @torch._disable_dynamo  # a compiled caller breaks its graph here, as at any communication
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One local step and one exchange. Every rank must call it equally often, or within `join`.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned; called once, before the exchange.

        Raises RuntimeError if a parameter was moved since construction, ExchangeError if a peer does not answer.
        """
        self._check_connected()
        check_step_allowed(self._engine, self._averaging)
        if self._options.local_steps:
            refuse_scaler(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._exchange(self._advance)
        return loss

    def _advance(self, gradients: bool = True) -> None:
        """One step. Without gradients: for the other ranks' sake, see `join`.

        Called again when an exchange failed it goes on, alone, from where that was.
        """
        engine = self._engine
        skip: Scalar = 0.0
        if self._opening.committed != self._step:
            skip = self._send(gradients)
        elif engine.step is not None:
            engine.complete()
        self._arrivals.finish()
        for group in self.param_groups:
            group["step"] += 1
        self._opening.committed = None
        self._local_steps.forget()
        self._counter.note(unsure=isinstance(skip, torch.Tensor))
        self._health.judge(self._step - 1)

    def _send(self, gradients: bool) -> Scalar:
        """Begins the step and completes the exchange; returns whether the local step is skipped."""
        engine = self._engine
        taken = reclaim(self.state, engine)
        engine.refresh()
        if taken and engine.step is not None:
            self._arrivals.hold_back("the optimizer's state was set between the backward pass and step()")
        skip: Scalar = float(self._overflow_elsewhere)
        if gradients:
            self._look_for_gradients()
            self._take_part(True, scaled=getattr(self, "found_inf", None) is not None)
            skip = mixed_precision.unscale(self, engine, self._arrivals)
        elif getattr(self, "grad_scale", None) is not None:
            self._arrivals.hold_back("a GradScaler was at work on other ranks")
        self._thaw()
        why = self._arrivals.verify()
        self._local_steps.agree(self._step, gradients)
        if why or not self._opening.done:
            self._opening.begin(skip)
        self._opening.commit()
        self._health.look(self._step)
        engine.complete(self._arrivals.ahead, recalls=bool(why))
        return skip

    def _thaw(self) -> None:
        """Moves into flat buffers what is trainable now and was not."""
        for group, params in self._frozen.thawed():
            self._watch(self._frozen.enter_late(params, group, self._engine, self._step))
            self._engine.refresh()

    # -- other neighbors, see recovery.py ----------------------------------------------------------------------------

    def _tells(self, hold: Callable[[ExchangeError], None]) -> None:
        self._arrivals.on_error = hold

    def _pause(self) -> None:
        self._arrivals.pause()
        self._opening.doubt()  # nothing compares any more what the backward pass began with to what step() finds

    def _resume(self, graph: Topology) -> None:
        rule, _, chosen = self._chosen
        self._choose(rule, graph, chosen, self._certificate.allowed)
        self._opening.move(self._certificate)
        for group in self.param_groups:
            group["topology"] = f"{graph.name} over {graph.n}"
        if self._engine.codec is not None:  # what is remembered of messages may be other buffers
            for b in self._engine.buckets:
                for slot in b.slots:
                    show(self.state, self._engine, b, slot)
        self._arrivals.resume()

    def _set_step(self, step: int) -> None:
        for group in self.param_groups:
            group["step"] = step

    def _rest(self) -> Any:
        memories = [group["memory"] for group in self.param_groups]
        return memories, [[slot.steps for slot in b.slots] for b in self._engine.buckets]

    def _take_rest(self, rest: Any) -> None:
        memories, counts = rest
        self._local_steps.forget()
        for group, memory in zip(self.param_groups, memories, strict=True):
            group["memory"] = dict(memory)
        for b, steps in zip(self._engine.buckets, counts, strict=True):
            for slot, number in zip(b.slots, steps, strict=True):
                slot.steps = number
