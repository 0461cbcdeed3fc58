"""What the workers have in common: exact averages over them, for evaluation and for checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ..comm.errors import ExchangeError, calling
from ..comm.group import Group
from ..comm.place import Place, built_too_early
from ..comm.watch import ClosedError, log
from ..engine import regroup
from ..engine.buckets import Bucket
from ..engine.engine import Engine
from . import mixed_precision
from .averaged import Averaged, agree, beside, mean_of_the_finite, named
from .joining import Joining
from .measured import Measured
from .replaced import Seen, forgets, untrained
from .state_dict import copied, entries, tensors, unplaced
from .surviving import Surviving
from .tracking import Tracked

WITHOUT = 3  # steps without a gradient before a line is logged


class GossipOptimizer(Measured, Tracked, Joining, Surviving, Optimizer):
    """The part of `GossipSGD` and `Gossip` that looks at all workers at once."""

    _step_supports_amp_scaling = True  # GradScaler calls step() whatever it found, and says so in found_inf
    _overflow_agreed: Any = None  # the step for which all ranks know whether gradients overflowed
    _own_scale: tuple[Any, Any] = (None, None)  # a step, and what the loss scale of this rank was in it
    _common_scale: float | None = None  # the smallest loss scale of all ranks, where that was agreed on with it
    _step: int  # the number of the next exchange
    _closed = False
    _without = 0  # steps in a row for which no parameter had a gradient
    _own_overflows = False  # whether a rank may leave out a step of its own
    _averaging = False  # whether this is within `averaged`
    _said: Set[str] = frozenset()  # lines that `averaged` has logged
    _seen: Seen | None = None  # the models that `averaged` was given

    _running: Engine | None = None  # not in copies: pickling and deepcopy keep what torch's optimizers keep

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled, which leaves flat buffers and process group behind; build a"
                " new one over the parameters and load its state_dict"
            )
        return self._running

    def _look_for_gradients(self) -> None:
        """Of the parameters, before a step; says so once if there are none for some steps."""
        if self._joining or any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self._without = 0
            return
        self._without += 1
        if self._without == WITHOUT:
            log.warning(
                "%d steps in which none of the optimizer's parameters had a gradient. If the model is trained, its"
                " parameters were replaced since the optimizer was built, by load_state_dict(assign=True) or a new"
                " layer, and it trains nothing: build the optimizer after that",
                WITHOUT,
            )

    @property
    def _position(self) -> str:
        """Where this rank is, which must be where all are when they save."""
        return f"step {self._step}"

    @property
    def _moment(self) -> Any:
        """A name of the next step, alike on all ranks."""
        return self._step

    @property
    def _stepping(self) -> Place | Group:
        """The ranks that take a local step together, or leave it out together."""
        return self._engine.place

    def agree_on_overflow(self, found: Sequence[torch.Tensor], scale: Any = None) -> None:
        """Sets each of a scaler's `found_inf` to the largest on any rank, for this step. All ranks must call it.

        scale: the loss scale that this rank's gradients have; None: none, they are unscaled.
        """
        if self._own_overflows or self._unsettled:  # step() settles who takes part first, and agrees then
            return
        try:
            self._agree_on_overflow(found, scale)
        except ExchangeError as error:
            if self._recovery is None or not error.lost:
                raise
            self._recovery.hold(error)  # step() comes next, and is this worker's alone

    def _agree_on_overflow(self, found: Sequence[torch.Tensor], scale: Any) -> None:
        self._take_part(True, scaled=True)
        engine = self._engine
        common = mixed_precision.agree(self._stepping, found, self._step, scale, engine.averager.size > 1)
        self._overflow_agreed, self._common_scale = self._moment, common

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the exchange that was started for the next step and drops it, so that parameters may be changed.

        All ranks must call it, with schedule="awc" before `model.load_state_dict`, say. The next step exchanges anew.
        """
        self._together(lambda: self._engine.forget(self._step))

    def close(self) -> None:
        """Gives back threads, files and process groups, as deletion does in time. Parameters stay as they are.

        Afterwards step() raises RuntimeError. Harmless when repeated; over NCCL all ranks must call it. With
        on_failure="continue" a rank that closes alone is gone for the others at once, which go on without it.
        """
        closed, self._closed = self._closed, True
        self._engine.place.close()
        regroup.let_go(self._engine)
        if self._recovery is not None and not closed:  # else the membership may be another optimizer's by now
            self._recovery.membership.close()
            self._recovery.membership.busy = False

    def _take_in(self, params: list[torch.Tensor], facts: Callable[[], dict[str, str]]) -> list[Bucket]:
        """Agrees on the last parameter group with the other ranks, takes rank 0's parameters, and moves the trainable
        ones into flat buffers. A newcomer is compared, and gets the others' values, once all is there.
        """
        engine = self._engine
        if not self._comes:
            self._together(lambda: engine.place.agree(facts()))
        trainable = self._frozen.enter(params)
        if not self._comes:
            self._together(lambda: self._frozen.start_equal(engine))
        buckets = engine.add_group(trainable)
        if not self._comes:
            self._together(lambda: engine.start_equal(buckets))
        return buckets

    def _drop_group(self) -> None:
        """Takes back the last parameter group, which could not be added: whatever it was that failed."""
        self.param_groups.pop()
        if self._running is not None:
            self._running.leave_group(len(self.param_groups))
            del self._frozen.of_groups[len(self.param_groups) :]

    def _check_open(self) -> None:
        """Raises RuntimeError after `close`, before anything has changed."""
        if self._closed:
            raise ClosedError("this optimizer was closed, and exchanges nothing any more: build a new one")

    def _check_connected(self) -> None:
        """Raises RuntimeError where this optimizer cannot know the other ranks, or was closed."""
        self._check_open()
        if built_too_early(self._engine.place):
            raise RuntimeError(
                "this optimizer was built before torch.distributed.init_process_group, and knows of no other rank:"
                " every rank would train alone. Build it after"
            )

    def _check_own_values(self, call: str) -> None:
        """Raises RuntimeError within `averaged`, for what is the worker's own then is put aside."""
        self._check_connected()
        if self._averaging:
            raise RuntimeError(
                f"{call} within averaged(), where the parameters are the workers' mean and each worker's own come back"
                " afterwards: call it outside"
            )

    @property
    def backend(self) -> str:
        """What runs the element-wise passes, e.g. "torch"."""
        return ", ".join(sorted({p.name for passes in self._engine.local.passes for p in passes.values()}))

    def _settle(self) -> None:
        """Ends what reads x, and takes over what the script has written into parameters that are copies of it."""
        self._engine.settle()
        for b in self._engine.buckets:
            b.absorb()

    @contextmanager
    def averaged(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Within the context the parameters are the workers' mean; afterwards each worker has its own back, bit-equal.

        Args:
            model: also averages its floating-point buffers (BatchNorm's running statistics), and those of its
                parameters that are not exchanged: frozen ones, or all of an EMA's copy of the model. What has no mean
                (float8, sparse) is left alone, and logged once.

        All ranks must enter it together, with models of one form. Costs a copy of what is averaged. Within it step()
        is refused, for what it did would be undone.

        Raises ValueError, on all ranks, if their models differ, or if parameters of the model were replaced by other
        objects since the optimizer was built; RuntimeError within another `averaged`. That is noticed of a model that
        was averaged before, and where the optimizer was given named parameters; else a line in the log is all.
        """
        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"averaged takes the model, a torch.nn.Module, not {type(model).__name__}")
        if self._averaging:
            raise RuntimeError("averaged() was entered within averaged(): the parameters are the mean already")
        self._check_connected()
        self._averaging = True
        try:
            with torch.no_grad(), calling("optimizer.averaged()"):
                back = self._together(lambda: self._average(model), ExitStack.close)
            with back:
                yield
        finally:
            self._averaging = False

    def _average(self, model: torch.nn.Module | None) -> ExitStack:
        """Puts means in the place of values, each of which comes back when the stack is closed, or if anything fails.

        Only copies are handed to the transport: it may still write into them when a wait has failed.
        """
        with ExitStack() as back:
            if not self._engine.place.alone:  # else its own mean
                self._put_means(model, back)
            return back.pop_all()

    def _put_means(self, model: torch.nn.Module | None, back: ExitStack) -> None:
        engine, place = self._engine, self._engine.place
        others, replaced = ({}, []) if model is None else (self._beside(model), self._replaced(model))
        agree(place, others, replaced)
        self._settle()
        for b in engine.buckets if place.workers.size > 1 else ():
            own = b.front.clone()
            back.callback(_put, b, own)
            _put(b, mean_of_the_finite(own.to(b.x.dtype), place.workers.mean))
        for name, tensor in others.items():
            one = Averaged(tensor)
            own = one.read()
            mean = one.mean(own, place)
            back.callback(_write, model, name, one, own)
            one.write(mean)

    def _beside(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What of a model is averaged beside the flat buffers, by name."""
        mine = {id(p): p for group in self.param_groups for p in group["params"]}
        others, left = beside(model, {id(slot.p) for b in self._engine.buckets for slot in b.slots})
        if not mine.keys() & {id(p) for p in model.parameters()}:
            strange = untrained(model, mine.values())
            self._say(
                "averaged(): none of the model's parameters is the optimizer's, so all of them are averaged by"
                " themselves. "
                + (
                    "But they have gradients, and the optimizer's have none: if the optimizer is to train this model,"
                    " its parameters were replaced since, and it trains nothing. Build the optimizer after that"
                    if strange
                    else "Right for an EMA; if the optimizer is to train this model, its parameters were replaced"
                ),
                logging.WARNING if strange else logging.INFO,
            )
        forgotten = forgets(model, mine.values())
        if forgotten:
            self._say(
                f"averaged(): the model's {', '.join(forgotten[:8])}{' and others' if len(forgotten) > 8 else ''} are"
                " trainable and no optimizer's that gossips: each worker has its own, which nobody makes equal. Give"
                " them to the optimizer, by add_param_group() for instance",
                logging.WARNING,
            )
        if left:
            self._say(f"averaged() leaves alone what has no mean: {', '.join(left)}")
        return others

    def _replaced(self, model: torch.nn.Module) -> list[str]:
        if self._seen is None:
            self._seen = Seen()
        return self._seen.replaced(model, self.param_groups)

    def _say(self, line: str, level: int = logging.INFO) -> None:
        """Logs a line once: evaluation comes again and again."""
        if line not in self._said:
            self._said = {*self._said, line}
            log.log(level, "%s", line)

    @torch.no_grad()
    def consensus_state_dict(self) -> dict[str, Any]:
        """A `state_dict` of the workers' mean, equal on all of them, for any number of workers. All ranks must call it.

        Every tensor of the state is averaged, except what has mean zero over the workers by definition (MI-DmSGD's
        correction), which is zero in it. It belongs to the mean of the parameters:

            with optimizer.averaged(model):
                saved = {"model": model.state_dict(), "optimizer": optimizer.consensus_state_dict()}

        `load_state_dict` takes it on any number of workers, topology and schedule.

        Raises ValueError, on all ranks, if the workers' states have different entries.
        """
        with calling("optimizer.consensus_state_dict()"):
            return self._together(self._consensus_state_dict)

    def _consensus_state_dict(self) -> dict[str, Any]:
        self._check_connected()
        engine = self._engine
        own = self.state_dict()
        state_dict = {**own, "state": copied(own["state"])}
        engine.place.workers.agree({"what the optimizer's state holds": entries(state_dict)})
        for _, value in tensors(state_dict):
            engine.place.workers.mean(value)
        return unplaced(state_dict, engine.rule.centered)


def _put(b: Bucket, own: torch.Tensor) -> None:
    with torch.no_grad():
        b.front.copy_(own)
        b.publish(low=not b.anchored)
        b.bring_home(values=False)  # a model.to() within the context has taken the means with it


def _write(model: torch.nn.Module | None, name: str, one: Averaged, own: torch.Tensor) -> None:
    with torch.no_grad():
        one.write(own)
        now = named(model, name)
        if now is not None and now.shape == own.shape and one.places is None:
            Averaged(now).write(own)  # a model.to() within the context has made another tensor or other memory of it
