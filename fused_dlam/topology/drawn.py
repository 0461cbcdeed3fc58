"""`RandomTopology`: a mixing matrix drawn anew at every step. All ranks draw the same one without communicating.

`changing` takes any function of the step that returns matrices.

It is a subclass because its constructor needs other arguments, and because a drawn matrix is checked when it is drawn.
Everything else is `Topology`'s, and a derived topology is made by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np

from . import mass
from .checks import check_sums, check_word, connects
from .matrix import TOLERANCE, Dense, Phase, Sparse, check_count, check_workers
from .topology import Topology, messages

LARGEST_SEED = 2**64 - 1
FIRST = 16  # the number of steps that stand for all others in `phases`, unless a graph was derived from another
RECENT = 8  # steps that are kept: every bucket asks for the step's matrix, and for the next one's
KEPT = 256  # of so many steps the masses of one are kept, from which others are found again


def generator(seed: int, step: int) -> np.random.RandomState:
    """The random numbers of one step. It takes 9 us to make.

    Philox is counter-based, so any step can be drawn without those before it. NumPy has frozen the streams of Philox
    and of `RandomState`, so ranks with different NumPy versions draw the same. Those of `default_rng` may change.
    """
    return np.random.RandomState(np.random.Philox(key=(seed, step)))


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
        sums: "columns": only the columns need to sum to one. Masses are then one each before step 0, and follow from
            the matrices of all steps before. They are followed from step to step; a step far ahead takes as long as
            drawing all those in between.

    Raises ValueError, at construction or when a step is drawn, if a matrix has another size, a larger degree, negative
    or non-finite entries, or a row or column that does not sum to one; and if the workers stay unconnected. For columns
    also, at the step, if a worker is left with no mass or too little. TypeError if `draw` is no function, or what it
    returns no matrix of one of these forms.
    """

    def __init__(
        self,
        draw: Callable[[int], Phase],
        n: int,
        degree: int,
        name: str = "random",
        *,
        sums: str = "rows",
        _first: int = FIRST,
    ):
        if not callable(draw):
            raise TypeError(f"draw must be a function of the step, not {type(draw).__name__}")
        n, degree = check_workers(n), check_count("the degree", degree, at_least=0)
        self.draw, self.n, self.name, self.period = draw, n, name, None
        self.sums = check_word(sums)
        # `phase` refuses any matrix that disagrees.
        self.most_messages, self.is_doubly_stochastic = degree, sums == "rows"
        self._first = _first
        self._recent: dict[int, Phase] = {}
        self._known: dict[int, np.ndarray] = {0: np.ones(n)}  # masses: of one in `KEPT` steps, and of recent ones
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
            self._recent = {step: phase} if len(self._recent) >= RECENT else {**self._recent, step: phase}
        return phase

    def mass(self, step: int = 0) -> np.ndarray:
        if self.is_doubly_stochastic:
            return np.ones(self.n)
        if step not in self._known:
            at = max((k for k in range(step, step - RECENT, -1) if k in self._known), default=-1)
            if at < 0:
                at = max(k for k in self._known if k <= step)
            w = self._known[at]
            for k in range(at, step):
                w = mass.moved(self.phase(k).dense(), w)
                mass.check(w, f"topology {self.name!r}, step {k + 1}")
                self._known[k + 1] = w
                old = k + 1 - RECENT
                if old % KEPT:
                    self._known.pop(old, None)
        return self._known[step].copy()

    @cached_property
    def as_rows(self) -> Topology:
        return self if self.is_doubly_stochastic else Rescaled(self)

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
        check_sums(phase, where, self.sums)
        if self.sums == "rows" and abs(phase.columns() - 1).max() > TOLERANCE:
            raise ValueError(f"{where}: every column must sum to one, or the workers would agree on a random mean")
        if isinstance(phase, Sparse) and phase.sources.shape[1] <= self.most_messages:
            return  # the common case needs no counting
        # Where columns sum to one even J is no exact average: masses differ.
        exempt = self.sums == "rows" and phase.averages()
        if not exempt and phase.degrees()[0] > self.most_messages:
            raise ValueError(
                f"{where}: a worker hears from {phase.degrees()[0]} others, more than {self.most_messages}"
            )

    def _derived(self, at: Callable[[int], Phase], steps: int, name: str) -> Topology:
        count = messages if self.sums == "rows" else _degree
        degree = max(self.most_messages, *(count(at(t)) for t in range(steps)))
        return RandomTopology(at, self.n, degree, name, sums=self.sums, _first=steps)


def _degree(phase: Phase) -> int:
    return phase.degrees()[0]


class Rescaled(RandomTopology):
    """`as_rows` of a graph that never repeats and whose columns sum to one."""

    def __init__(self, columns: RandomTopology):
        self.columns, self.n, self.name, self.period = columns, columns.n, columns.name, None
        self.most_messages, self.is_doubly_stochastic = columns.most_messages, False
        self._first, self._recent = columns._first, {}
        vars(self).update(limit_weights=columns.limit_weights, fingerprint=columns.fingerprint)

    @property
    def as_rows(self) -> Topology:  # type: ignore[override]
        return self

    def mass(self, step: int = 0) -> np.ndarray:
        return self.columns.mass(step)

    def draw(self, step: int) -> Phase:  # type: ignore[override]
        return mass.rescaled(self.columns.phase(step), self.mass(step), self.mass(step + 1))

    def _check_phase(self, phase: Phase, step: int) -> None:
        """It was checked when it was drawn."""

    def _derived(self, at: Callable[[int], Phase], steps: int, name: str) -> Topology:
        raise ValueError(f"derive a graph from topology {self.name!r} itself, and take as_rows of that")


def changing(
    draw: Callable[[int], Any], n: int, *, name: str = "changing", sums: str = "rows", degree: int | None = None
) -> RandomTopology:
    """A graph given as a function of the step, which need not repeat: a worker that is away now and then, a schedule.

    Args:
        draw: `draw(step)` returns the step's matrix, an [n, n] array or one of the forms of `RandomTopology`. It must
            depend on the step alone, and be the same on all ranks.
        n: the number of workers.
        name: what messages and checkpoints call it. Ranks compare names.
        sums: "rows": every matrix must be doubly stochastic. "columns": see `RandomTopology`.
        degree: the most workers that one worker hears from in any step; None: n - 1.

    Raises ValueError or TypeError as `RandomTopology` does.
    """
    if not callable(draw):
        raise TypeError(f"draw must be a function of the step, not {type(draw).__name__}")
    n = check_workers(n)
    return RandomTopology(partial(_drawn, draw), n, n - 1 if degree is None else degree, name, sums=sums)


def _drawn(draw: Callable[[int], Any], step: int) -> Phase:
    W = draw(step)
    return W if isinstance(W, Phase) else Dense(W)
