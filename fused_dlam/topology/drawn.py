"""`RandomTopology`: a mixing matrix drawn anew at every step. All ranks draw the same one without communicating.

It is a subclass because its constructor needs other arguments, and because a drawn matrix is checked when it is drawn.
Everything else is `Topology`'s, and a derived topology is made by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from .checks import check_rows, connects
from .matrix import TOLERANCE, Phase, Sparse, check_count, check_workers
from .topology import Topology, messages

LARGEST_SEED = 2**64 - 1
FIRST = 16  # the number of steps that stand for all others in `phases`, unless a graph was derived from another


def generator(seed: int, step: int, stream: int = 0) -> np.random.RandomState:
    """The random numbers of one step. It takes 9 us to make. Other streams have others: graphs are drawn from 0.

    Philox is counter-based, so any step can be drawn without those before it. NumPy has frozen the streams of Philox
    and of `RandomState`, so ranks with different NumPy versions draw the same. Those of `default_rng` may change.
    """
    return np.random.RandomState(np.random.Philox(key=(seed, step), counter=stream << 192))


def check_seed(seed: int) -> int:
    """seed as an int. Raises ValueError unless it is an integer from 0 to 2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, not {seed!r}")
    return int(seed)


class RandomTopology(Topology):
    """A mixing matrix for every step, drawn when it is needed. There is no period: `period` is None.

    Args:
        draw: `draw(step)` returns the step's `Circulant`, `Sparse` or `Dense`, doubly stochastic. It must depend on
            the step alone: take random numbers from `generator(seed, step)`. A topology that is sent to other processes
            needs a draw that can be pickled: a function of a module, or a `functools.partial` of one.
        n: the number of workers.
        degree: the most workers that one worker hears from in any step. Memory for so many messages is set aside.
        name: what messages and checkpoints call it. Ranks compare names, so a seed belongs in it.

    Raises ValueError, at construction or when a step is drawn, if a matrix has another size, a larger degree, negative
    or non-finite entries, or a row or column that does not sum to one; and if the workers stay unconnected. TypeError
    if `draw` is no function, or what it returns no matrix of one of these forms.
    """

    def __init__(self, draw: Callable[[int], Phase], n: int, degree: int, name: str = "random", *, _first: int = FIRST):
        if not callable(draw):
            raise TypeError(f"draw must be a function of the step, not {type(draw).__name__}")
        n, degree = check_workers(n), check_count("the degree", degree, at_least=0)
        self.draw, self.n, self.name, self.period = draw, n, name, None
        self.most_messages, self.is_doubly_stochastic = degree, True  # `phase` refuses any matrix that disagrees
        self._first = _first
        self._recent: dict[int, Phase] = {}
        steps = _first * (4 + n)  # one random pair per step connects n workers in about 2 n steps
        if not connects((self.phase(t) for t in range(steps)), n):
            raise ValueError(
                f"topology {name!r} is not connected: within {steps} steps some workers hear nothing of others"
            )

    def phase(self, step: int) -> Phase:
        phase = self._recent.get(step)
        if phase is None:
            phase = self.draw(step)
            self._check_phase(phase, step)
            # Every bucket asks for the step's matrix, and for the next step's when it posts receives early.
            self._recent = {step: phase} if len(self._recent) >= 8 else {**self._recent, step: phase}
        return phase

    @cached_property
    def phases(self) -> tuple[Phase, ...]:  # type: ignore[override]
        """The matrices of the first steps, as examples: symmetry, fingerprint and mean load are told from them."""
        return tuple(self.phase(t) for t in range(self._first))

    def _check_phase(self, phase: Phase, step: int) -> None:
        where = f"topology {self.name!r}, step {step}"
        if not isinstance(phase, Phase):
            raise TypeError(f"{where}: draw must return a Circulant, Sparse or Dense, not {type(phase).__name__}")
        if phase.n != self.n:
            raise ValueError(f"{where}: {phase.n} workers instead of {self.n}")
        check_rows(phase, where)
        if abs(phase.columns() - 1).max() > TOLERANCE:
            raise ValueError(f"{where}: every column must sum to one, or the workers would agree on a random mean")
        if isinstance(phase, Sparse) and phase.sources.shape[1] <= self.most_messages:
            return  # the common case needs no counting
        if not phase.averages() and phase.degrees()[0] > self.most_messages:
            raise ValueError(
                f"{where}: a worker hears from {phase.degrees()[0]} others, more than {self.most_messages}"
            )

    def _derived(self, at: Callable[[int], Phase], steps: int, name: str) -> Topology:
        degree = max(self.most_messages, *(messages(at(t)) for t in range(steps)))
        return RandomTopology(at, self.n, degree, name, _first=steps)
