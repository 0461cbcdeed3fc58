"""`join` around rounds: a worker that is out of data takes part in exchanges, having gone nothing.

An inner step is the worker's own. So where workers may take unlike numbers of them (local_steps=True) nobody asks in it
who still has data: that is asked once in a round, before its last step, and a worker that has none goes there at once.
Where `every` is the same for all, all take the same inner steps, and it is asked in each.

The ranks of a machine average their gradients in every inner step, and always ask each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .joining import ELSEWHERE, SCALED
from .rounds import Rounds
from .shared import GossipOptimizer


class JoiningRounds(GossipOptimizer):
    """The part of a `Gossip` that takes rounds for the others' sake."""

    _rounds: Rounds | None
    _thaw: Callable[[], None]
    _start_round: Callable[[], None]
    _end_round: Callable[[Any, bool], Any]
    _machine_steps = False  # in a step without data, whether other ranks of the machine have some

    @torch.no_grad()
    def _take_part(self, gradients: bool, scaled: bool = False) -> int:
        rounds, engine = self._rounds, self._engine
        if rounds is None:
            return super()._take_part(gradients, scaled)
        if not self._joining or self._told == self._moment:
            return 1
        self._told = self._moment
        if engine.averages_inside:  # where ways are averaged, `Rounds.agree` knows whose
            self._share_out(gradients)
        what, mine = "counting the ranks that have data", float(SCALED if gradients and scaled else gradients)
        here = int(engine.place.inside.largest(torch.tensor([mine]), what, self._step))
        if rounds.unequal:
            if here and not rounds.last:
                return here
            self._come_to_the_end()
        anywhere = engine.place.workers.largest(torch.tensor([float(here > 0)]), what, self._step)
        return here or (ELSEWHERE if anywhere else 0)

    def _come_to_the_end(self) -> None:
        """All that a rank sends in a round before its exchange: ranks ask each other at one and the same point."""
        rounds, engine = self._rounds, self._engine
        assert rounds is not None
        self._thaw()
        engine.refresh()
        if rounds.taken == 0:
            self._start_round()
        engine.ahead.send(1.0)

    def _accompany(self, others: int) -> None:
        rounds = self._rounds
        if rounds is not None and rounds.unequal and others == ELSEWHERE:
            self._end_round(None, False)
            return
        self._machine_steps = others != ELSEWHERE and self._engine.averages_inside
        try:
            super()._accompany(others)
        finally:
            self._machine_steps = False
