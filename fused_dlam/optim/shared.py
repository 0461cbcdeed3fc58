"""What the workers have in common: exact averages over them, for evaluation and for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ..engine.engine import Engine
from . import mixed_precision
from .state_dict import copied, entries, tensors, unplaced


class GossipOptimizer(Optimizer):
    """The part of `GossipSGD` and `Gossip` that looks at all workers at once."""

    _step_supports_amp_scaling = True  # GradScaler calls step() whatever it found, and says so in found_inf
    _overflow_agreed: int | None = None  # the step for which all ranks know whether gradients overflowed
    _step: int  # the number of the next exchange

    _running: Engine | None = None  # not in copies: pickling and deepcopy keep what torch's optimizers keep

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            raise RuntimeError(
                "this optimizer was copied or unpickled, which leaves flat buffers and process group behind; build a"
                " new one over the parameters and load its state_dict"
            )
        return self._running

    def agree_on_overflow(self, found: Sequence[torch.Tensor]) -> None:
        """Sets each of a scaler's `found_inf` to the largest on any rank, for this step. All ranks must call it."""
        self._overflow_agreed = self._step
        mixed_precision.agree(self._engine.place, found, self._step)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the exchange that was started for the next step and drops it, so that parameters may be changed.

        All ranks must call it, with schedule="awc" before `model.load_state_dict`, say. The next step exchanges anew.
        """
        self._engine.forget()

    @property
    def backend(self) -> str:
        """What runs the element-wise passes, e.g. "torch"."""
        return ", ".join(sorted({p.name for passes in self._engine.passes for p in passes.values()}))

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

    @torch.no_grad()
    def consensus_distance(self) -> float:
        """sqrt(1/n sum_i |x_i - mean|^2) over all parameters: how far apart the workers are. All ranks must call it."""
        place = self._engine.place
        if place.workers.size == 1:
            return 0.0
        total = torch.zeros(1, dtype=torch.float64)
        for b in self._engine.buckets:
            mean = b.x.clone()
            place.workers.mean(mean)
            total += torch.linalg.vector_norm(mean.sub_(b.x), dtype=torch.float64).square().cpu()
        place.workers.mean(total)
        return math.sqrt(float(place.sum_over_shards(total)))

    @contextmanager
    def averaged(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Within the context the parameters are the workers' mean; afterwards each worker has its own back.

        Args:
            model: also averages its floating-point buffers (BatchNorm's running statistics).

        All ranks must enter it together. Costs a copy of the parameters.
        """
        workers = self._engine.place.workers
        if workers.size == 1:  # its own mean: no copy of the parameters
            yield
            return
        floats = [] if model is None else [b for b in model.buffers() if b.is_floating_point()]
        with torch.no_grad():
            self._engine.settle()
            for b in self._engine.buckets:
                b.absorb()
            saved = [b.x.clone() for b in self._engine.buckets]
            saved_buffers = [b.clone() for b in floats]
            for b in self._engine.buckets:
                workers.mean(b.x)
                b.publish()
            for buffer in floats:
                workers.mean(buffer)
        try:
            yield
        finally:
            with torch.no_grad():
                for b, x in zip(self._engine.buckets, saved, strict=True):
                    b.x.copy_(x)
                    b.publish()
                for buffer, own in zip(floats, saved_buffers, strict=True):
                    buffer.copy_(own)

    @torch.no_grad()
    def consensus_state_dict(self) -> dict[str, Any]:
        """A `state_dict` of the workers' mean, equal on all of them, for any number of workers. All ranks must call it.

        Every tensor of the state is averaged, except what has mean zero over the workers by definition (PC-DmSGD's
        correction), which is zero in it. It belongs to the mean of the parameters:

            with optimizer.averaged(model):
                saved = {"model": model.state_dict(), "optimizer": optimizer.consensus_state_dict()}

        `load_state_dict` takes it on any number of workers, topology and schedule.

        Raises ValueError, on all ranks, if the workers' states have different entries.
        """
        engine = self._engine
        own = self.state_dict()
        state_dict = {**own, "state": copied(own["state"])}
        engine.place.workers.agree({"what the optimizer's state holds": entries(state_dict)})
        for _, value in tensors(state_dict):
            engine.place.workers.mean(value)
        return unplaced(state_dict, engine.rule.centered)
