"""`Gossip`'s step: the inner optimizer's, and an exchange. Without an outer method that is an average in every step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..comm import sharded
from ..comm.group import Group
from ..comm.place import Place
from ..engine.anchored import average_inside
from ..engine.flight import AVERAGING, OPEN
from ..engine.message import Message
from ..engine.step_allowed import check_step_allowed
from ..rules.scalars import Scalars
from . import mixed_precision
from .of_inner import OfInner
from .outer_steps import OuterSteps


class GossipSteps(OfInner, OuterSteps):  # type: ignore[override]
    """The part of a `Gossip` that steps."""

    _ahead: bool  # whether the message leaves before the inner optimizer's step

    @torch._disable_dynamo  # as in GossipSGD
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The inner optimizer's step and one exchange; with every=H an exchange in each H-th. Every rank must call it
        equally often, with local_steps=True as often as its own `every` says.

        Args:
            closure: passed on to the inner optimizer; with hierarchical= it is called once, before its step.

        Raises RuntimeError if a parameter was moved or replaced, ExchangeError if a peer does not answer.
        """
        self._check_connected()
        check_step_allowed(self._engine, self._averaging)
        return self._exchange(lambda: self._advance(closure))

    def local_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Raises RuntimeError: `GossipSGD` has it, see there."""
        raise RuntimeError(
            "Gossip takes no local_step(): with every=4 each fourth step() exchanges, and the others are local. Where"
            " ranks take unlike numbers of steps build with local_steps=True on all, and set optimizer.every on each"
        )

    def no_sync(self) -> AbstractContextManager[None]:
        """For scripts that accumulate gradients for `GossipSGD` as well: here no message leaves in a backward pass."""
        return nullcontext()

    def _advance(self, closure: Callable[[], Any] | None = None, gradients: bool = True) -> Any:
        """One step. Without gradients: for the other ranks' sake, see `join`.

        Called again when an exchange failed it goes on, alone, from where that was.
        """
        if self._rounds is not None:
            return (self._end_round if self._rounds.last else self._inner_step)(closure, gradients)
        if self._stepped != self._step:
            self._loss = self._step_and_mix(closure, gradients)
        else:
            self._engine.check_whole()
            self._engine.end()
        for group in self.param_groups:
            group["gossip_step"] += 1
        loss, self._loss, self._stepped = self._loss, None, None
        return loss

    def _step_and_mix(self, closure: Callable[[], Any] | None, gradients: bool) -> Any:
        engine, skip = self._engine, self._ready(gradients)
        if engine.silent:  # the inner optimizer's step and nothing else: no digit of a 16-bit parameter is rounded
            loss = self._local_step(closure, gradients, skip)
            if engine.step is not None:  # it had begun with others
                engine.end()
            return loss
        return self._exchanging_step(closure, gradients, skip)

    def _thaw(self) -> None:
        """Moves into flat buffers what is trainable now and was not."""
        if len(self.param_groups) != len(self._engine.local.passes):
            raise RuntimeError("a group was added to the inner optimizer: call add_param_group of Gossip")
        for number, params in self._frozen.thawed():
            self._frozen.enter_late(params, number, self._engine, self._step)
            if self._rounds is not None:
                self._rounds.counter.note()  # a checkpoint may be saved before the round ends

    def _exchanging_step(self, closure: Callable[[], Any] | None, gradients: bool, skip: bool) -> Any:
        engine = self._engine
        if engine.step is None:  # else the last attempt raised: it goes on from there
            rates = tuple(g["lr"] for g in self.param_groups if isinstance(g.get("lr"), float))
            engine.settings = rates, ()
            engine.begin(self._step)
            engine.set_scalars([Scalars(engine.rule.scalars(0.0, 0.0, 0.0), ())] * len(engine.local.passes))
        if not engine.gossips:  # one machine: gradients are averaged inside it, and there is nobody to mix x with
            loss = self._local_step(closure, gradients, skip)
            engine.end()
            return loss
        if self._ahead:
            engine.bring(OPEN)  # a copy of x leaves before the inner optimizer steps x
        if engine.message is Message.HALFWAY:  # at each attempt: nothing has left, and the script may have written x
            for b in engine.buckets:
                b.absorb()
                b.state[0].copy_(b.x)
        loss = self._local_step(closure, gradients, skip)
        for b in engine.buckets:
            b.refresh()
            b.absorb(stepped=True)
        self._stepped, self._loss = self._step, loss
        self._health.look(self._step)
        engine.complete(self._ahead)
        return loss

    def _local_step(self, closure: Callable[[], Any] | None, gradients: bool, skip: bool) -> Any:
        engine, loss = self._engine, None
        scale = getattr(self, "grad_scale", None)
        if engine.averager.size == 1 or not (self._rounds is None or engine.averages_inside):
            if skip or not gradients:
                return None
            grads = [sharded.local(p.grad) for g in self.param_groups for p in g["params"] if p.grad is not None]
            if scale is not None and grads:
                torch._foreach_div_(grads, scale)
            return self._step_inner() if closure is None else self._step_inner(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for b in engine.buckets:
            b.refresh()
        engine.factor = self._join_factor * mixed_precision.to_common_scale(self)  # ranks may have scales of their own
        scale = getattr(self, "grad_scale", None)
        # Waits for all before the first takes a gradient's place: where a worker is lost, all are of this one alone.
        if self._rounds is None:
            engine.bring(AVERAGING)
            actives = [engine.flight(b).active() for b in engine.buckets]
        else:
            actives = average_inside(engine, self._step)
        for b, active in zip(engine.buckets, actives, strict=True):
            torch.div(b.g, 1.0 if scale is None else scale, out=b.grads)
            for slot, now in zip(b.slots, active, strict=True):
                slot.p.grad = slot.installed if now else None
        if not skip:
            self._step_inner()
        return loss

    def _overflowed(self) -> bool:
        """Whether a GradScaler found an overflow on any rank, see mixed_precision.py."""
        if getattr(self, "found_inf", None) is None:
            return False
        if self._own_overflows:  # its own inner step alone: what is exchanged is a way, which has no scale
            return bool(getattr(self, "found_inf"))  # noqa: B009 -- a GradScaler's, and in no class
        return mixed_precision.overflowed(self)

    @property
    def _own_overflows(self) -> bool:  # type: ignore[override]
        return self._rounds is not None and self._engine.place.inside.size == 1

    @property
    def _stepping(self) -> Place | Group:  # type: ignore[override]
        """An inner step of a round is the worker's own, and so is an overflow in it: a rank's, or a machine's."""
        return self._engine.place if self._rounds is None else self._engine.place.inside
