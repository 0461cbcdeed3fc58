"""What the workers have in common: exact averages over them, for evaluation and for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ..comm.collectives import has_mean
from ..comm.errors import ExchangeError, calling
from ..comm.ledger import StepTime, Waits
from ..comm.place import built_too_early
from ..comm.watch import ClosedError, log
from ..engine import regroup
from ..engine.buckets import Bucket
from ..engine.engine import Engine
from . import mixed_precision
from .averaged import Averaged, agree, beside
from .joining import Joining
from .state_dict import copied, entries, tensors, unplaced
from .surviving import Surviving


class GossipOptimizer(Joining, Surviving, Optimizer):
    """The part of `GossipSGD` and `Gossip` that looks at all workers at once."""

    _step_supports_amp_scaling = True  # GradScaler calls step() whatever it found, and says so in found_inf
    _overflow_agreed: int | None = None  # the step for which all ranks know whether gradients overflowed
    _common_scale: float | None = None  # the smallest loss scale of all ranks, where that was agreed on with it
    _step: int  # the number of the next exchange
    _closed = False
    _averaging = False  # whether this is within `averaged`
    _said: Set[str] = frozenset()  # lines that `averaged` has logged

    _running: Engine | None = None  # not in copies: pickling and deepcopy keep what torch's optimizers keep

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled, which leaves flat buffers and process group behind; build a"
                " new one over the parameters and load its state_dict"
            )
        return self._running

    def agree_on_overflow(self, found: Sequence[torch.Tensor], scale: Any = None) -> None:
        """Sets each of a scaler's `found_inf` to the largest on any rank, for this step. All ranks must call it.

        scale: the loss scale that this rank's gradients have; None: none, they are unscaled.
        """
        if self._unsettled:  # step() settles who takes part first, and agrees then
            return
        try:
            self._agree_on_overflow(found, scale)
        except ExchangeError as error:
            if self._recovery is None or not error.lost:
                raise
            self._recovery.hold(error)  # step() comes next, and is this worker's alone

    def _agree_on_overflow(self, found: Sequence[torch.Tensor], scale: Any) -> None:
        self._take_part(True, scaled=True)
        self._overflow_agreed, engine = self._step, self._engine
        averages = engine.averager.size > 1
        self._common_scale = mixed_precision.agree(engine.place, found, self._step, scale, averages)

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

    @property
    def bytes_sent(self) -> int:
        """Bytes of payload this rank has sent since construction, `averaged` and `consensus_distance` included.

        An all-reduce counts as a ring, 2 (n-1)/n of its tensor.
        """
        return round(self._engine.place.workers.bytes_sent)

    @property
    def messages_sent(self) -> int:
        """Messages this rank has sent to neighbors since construction."""
        return self._engine.place.workers.messages_sent

    @property
    def waits(self) -> Waits:
        """For whom this rank has waited in its steps, and how long: {global rank: Waited(last, total, steps, ...)}.

        A mapping whose `str` is one line: "rank 3 has waited 12.1 s of 60.2 s for rank 5 (at most 1.2 s, step 17)".
        Seconds of the host. Waits come one after another: of two late peers the first has the time. The key None is for
        all ranks of an all-reduce. A peer that is waited for may itself wait for another: `step_times` finds the slow
        one. Where tensors of a GPU pass through the host, what that GPU still computes is waited for, too. Over NCCL a
        wait only orders streams: nothing is measured, and the mapping is empty.
        """
        engine = self._engine
        return engine.place.workers.ledger.waits(engine.me)

    @property
    def skipped(self) -> list[tuple[int, int]]:
        """(step, global rank of the peer) of the last exchanges that `skip_late` has left out, 10,000 at most."""
        leaving_out = self._engine.leaving_out
        return [] if leaving_out is None else list(leaving_out.late.skipped)

    def step_times(self) -> dict[int, StepTime]:
        """Who is slow: {global rank: StepTime(computing, waiting)}, seconds per step. All ranks must call it.

        The mean over the steps since the last call, or since the first step, which is not counted. The slow worker is
        the one that computes longest and waits least: `max(times, key=lambda rank: times[rank].computing)`; if all
        compute equally long and wait, it is the network. `computing` is all time outside of exchanges, so what a script
        does between two steps is in it. Not a number (nan) where no step has ended since, and over NCCL, see `waits`.
        """
        self._check_connected()
        with calling("optimizer.step_times()"):
            return self._together(lambda: self._engine.place.step_times())

    @torch.no_grad()
    def mean(self, value: torch.Tensor | float) -> torch.Tensor:
        """The mean of every rank's number or tensor, the same on all of them. All ranks must call it.

        For what a script decides by, as a validation loss that a scheduler follows. With on_failure="continue" it is
        that of those who are left; a collective of the script's own would end there.

        Raises TypeError for integers, ValueError on all ranks if shapes or types differ, before values are sent.
        """
        self._check_connected()
        own = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        has_mean(own)
        with calling("optimizer.mean()"):
            return self._together(lambda: self._mean_of(own.detach().clone()))

    def _mean_of(self, value: torch.Tensor) -> torch.Tensor:
        place = self._engine.place
        facts = {"the value's shape": str(tuple(value.shape)), "the value's type": str(value.dtype)}
        place.agree(facts, cure="Pass the like on every rank.", what="comparing values")
        for group in (place.inside, place.workers):
            group.mean(value)
        return value

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """sqrt(1/n sum_i |x_i - mean|^2) over all parameters: how far apart the workers are. All ranks must call it."""
        self._check_connected()
        with calling("optimizer.consensus_distance()"):
            return self._together(self._distance)

    def _distance(self) -> float:
        place = self._engine.place
        if place.workers.size == 1:
            return 0.0
        self._settle()
        total = torch.zeros(1, dtype=torch.float64)
        for b in self._engine.buckets:
            x = b.x[: b.flags.start]  # what is behind the last parameter is no parameter
            mean = x.clone()
            place.workers.mean(mean)
            total += torch.linalg.vector_norm(mean.sub_(x), dtype=torch.float64).square().cpu()
        place.workers.mean(total)
        return math.sqrt(float(place.sum_over_shards(total)))

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

        Raises ValueError, on all ranks, if their models differ; RuntimeError within another `averaged`.
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
        others = {} if model is None else self._beside(model)
        agree(place, others)
        self._settle()
        for b in engine.buckets if place.workers.size > 1 else ():
            own = b.x.clone()
            back.callback(_put, b, own)
            mean = own.clone()
            place.workers.mean(mean)
            b.x.copy_(mean)
            b.publish()
        for tensor in others.values():
            one = Averaged(tensor)
            own = one.read()
            mean = one.mean(own, place)
            back.callback(_write, one, own)
            one.write(mean)

    def _beside(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What of a model is averaged beside the flat buffers, by name."""
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        others, left = beside(model, {id(slot.p) for b in self._engine.buckets for slot in b.slots})
        if not mine & {id(p) for p in model.parameters()}:
            self._say(
                "averaged(): none of the model's parameters is the optimizer's, so all of them are averaged by"
                " themselves. Right for an EMA; if the optimizer is to train this model, its parameters were replaced"
            )
        if left:
            self._say(f"averaged() leaves alone what has no mean: {', '.join(left)}")
        return others

    def _say(self, line: str) -> None:
        """Logs a line once: evaluation comes again and again."""
        if line not in self._said:
            self._said = {*self._said, line}
            log.info("%s", line)

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
        b.x.copy_(own)
        b.publish()


def _write(one: Averaged, own: torch.Tensor) -> None:
    with torch.no_grad():
        one.write(own)
