"""What can be asked of an optimizer: what was sent, who waited for whom, and what all ranks find out together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..comm.collectives import has_mean
from ..comm.errors import calling
from ..comm.ledger import StepTime, Waits

if TYPE_CHECKING:
    from ..engine.engine import Engine

T = TypeVar("T")


class Measured:
    """Numbers of a run."""

    if TYPE_CHECKING:

        @property
        def _engine(self) -> Engine: ...
        def _check_connected(self) -> None: ...
        def _settle(self) -> None: ...
        def _together(self, call: Callable[[], T], undo: Callable[[T], Any] = ...) -> T: ...

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
        wait only orders streams (but with on_failure="continue"): nothing is measured, and the mapping is empty.
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

        Raises TypeError for integers and for what is no tensor, ValueError on all ranks if shapes or types differ,
        before values are sent.
        """
        self._check_connected()
        try:
            own = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        except (RuntimeError, TypeError, ValueError) as error:
            what = f"mean() takes a number or a tensor, not {type(value).__name__}"
            raise TypeError(f"{what}; several losses go as one: torch.stack(list(losses.values()))") from error
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
            # What is behind the last parameter is no parameter.
            x = b.front[: b.flags.start].to(b.x.dtype)
            mean = x.clone()
            place.workers.mean(mean)
            total += torch.linalg.vector_norm(mean.sub_(x), dtype=torch.float64).square().cpu()
        place.workers.mean(total)
        return math.sqrt(float(place.sum_over_shards(total)))
