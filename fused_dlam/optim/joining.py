"""Ranks that run out of data keep the others company, as in DDP's `join`.

Who has none takes steps without a gradient: it is averaged with its neighbors, and takes no local step. So an average
stays one, and nobody waits for a message that never comes. Each step then begins with an all-reduce of one number: how
many still have data. Messages leave in step().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import inf
from typing import TYPE_CHECKING, Any

import torch

from ..comm.errors import calling

if TYPE_CHECKING:
    from ..engine.engine import Engine


# What `_take_part` returns, beside 0 and 1.
SCALED = 2  # some rank's gradients are scaled
ELSEWHERE = 3  # other workers have gradients, and inner steps of their own, see joining_rounds.py


class Joining:
    """The part of an optimizer that takes steps for the others' sake."""

    _joining = False  # within `join`
    _join_factor = 1.0  # of the gradients: where they are averaged, the mean is over the ranks that have one
    _overflow_elsewhere = False  # in a step for the others' sake, whether a scaler found an overflow there
    _told: Any = None  # the step for which this rank has said whether it has a gradient
    _overflow_agreed: Any
    _common_scale: float | None

    if TYPE_CHECKING:
        _recovery: Any

        @property
        def _engine(self) -> Engine: ...
        @property
        def _step(self) -> int: ...
        @property
        def _moment(self) -> Any: ...

        def _advance(self, *, gradients: bool) -> Any: ...
        def zero_grad(self, set_to_none: bool = True) -> None: ...
        def agree_on_overflow(self, found: Any, scale: Any = None) -> None: ...

    def _hold_back(self) -> AbstractContextManager[None]:
        """Within it messages leave in step()."""
        return nullcontext()

    @property
    def _owes(self) -> bool:
        """Whether there are local steps that no exchange has had yet."""
        return False

    @contextmanager
    def join(self) -> Iterator[None]:
        """For epochs in which ranks have different numbers of batches. All ranks must enter it together.

            with optimizer.join():
                for x, y in loader:
                    optimizer.zero_grad()
                    loss(model(x), y).backward()
                    optimizer.step()

        A rank that is through stays in the context, and takes part in the exchanges without a local step, until all
        are. Then all have taken equally many steps; of a `Gossip` with local_steps=True equally many exchanges, in
        which who is out of data takes no inner steps. Where gradients are averaged (`psgd`, `pmsgd`, hierarchical=) the
        mean is over the ranks that still have some. Costs an all-reduce of one number per step, with local_steps=True
        per exchange.

        Let schedulers step outside, by epochs: a rank without data does not step them. No other exchange (`averaged`,
        `consensus_distance`) may be within, for ranks may be through. An error in the body is raised at once; the other
        ranks then get an ExchangeError.
        """
        if self._recovery is not None:
            raise RuntimeError(
                "join() counts the ranks that have data in every step, and with on_failure='continue' ranks come and"
                " go: give all ranks equally many batches, or use on_failure='raise'"
            )
        if self._engine.place.alone:
            yield
            return
        if self._joining:
            raise RuntimeError("join() was entered within join()")
        self._joining, self._told = True, None
        try:
            with self._hold_back():
                yield
                with calling("optimizer.join()"):
                    self._keep_company()
        finally:
            self._joining, self._join_factor = False, 1.0

    def _keep_company(self) -> None:
        self.zero_grad()
        while others := self._take_part(self._owes):
            try:
                if others == SCALED:
                    found = torch.zeros(1)
                    self.agree_on_overflow([found], inf)  # the smallest scale is one of those that have gradients
                    self._overflow_elsewhere, self._overflow_agreed = bool(found), None
                    if self._common_scale is not None:
                        self.grad_scale = self._common_scale
                self._accompany(others)
            finally:
                self._overflow_elsewhere = False
                vars(self).pop("grad_scale", None)
            self.zero_grad()

    def _accompany(self, others: int) -> None:
        """A step without a gradient. others: what `_take_part` returned."""
        self._advance(gradients=False)

    @torch.no_grad()
    def _take_part(self, gradients: bool, scaled: bool = False) -> int:
        """Within `join`, before anything else in a step: tells all ranks whether this one has a gradient for it.

        Args:
            scaled: by a loss scaler, so that ranks agree on overflows next.

        Returns 0 if no rank has a gradient, SCALED if any has a scaled one, else 1.
        """
        if not self._joining or self._told == self._moment:
            return 1
        self._told = self._moment
        self._share_out(gradients)
        mine = torch.tensor([float(SCALED if gradients and scaled else gradients)])
        return int(self._engine.place.largest(mine, "counting the ranks that have data", self._step))

    def _share_out(self, gradients: bool) -> None:
        """Where gradients are averaged: over those ranks that have one."""
        averager = self._engine.averager
        if averager.size > 1:
            share = torch.tensor([float(gradients)], dtype=torch.float64)
            averager.mean(share)
            number = round(float(share) * averager.size)
            self._join_factor = averager.size / number if number else 1.0
