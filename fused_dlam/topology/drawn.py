"""`RandomTopology`: a mixing matrix drawn anew at every step, the same on every rank, without a word between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np

from .lyapunov import Growth, estimate
from .matrix import TOLERANCE, Phase, Sparse, average, identity
from .topology import Topology, check_rows, connects

LARGEST_SEED = 2**64 - 1


def generator(seed: int, step: int) -> np.random.RandomState:
    """The random numbers of one step, 9 us to make.

    Philox is counter-based, so that any step can be drawn without those before it; NumPy has frozen the streams of it
    and of `RandomState`, so that ranks with different NumPy versions draw the same (those of `default_rng` may change).
    """
    return np.random.RandomState(np.random.Philox(key=(seed, step)))


def check_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must be an integer from 0 to 2^64 - 1, not {seed!r}")
    return int(seed)


class RandomTopology(Topology):
    """A mixing matrix for every step, drawn when it is needed: there is no period.

    Args:
        draw: `draw(step)` is the step's `Phase`, doubly stochastic, and must depend on the step alone: take random
            numbers from `generator(seed, step)`. To be sent to other processes it must be picklable, so a function of
            a module or a `functools.partial` of one.
        n: the number of workers.
        degree: the most workers that one worker hears from in any step; memory for so many messages is set aside.
        name: what to call it in messages and checkpoints. Ranks compare names, so a seed belongs in it.
        horizon: by so many first steps it is judged: `phases`, from which symmetry and the mean load are told.

    Raises ValueError, at construction or when a step is drawn, if a matrix has another size, a larger degree, negative
    or non-finite entries, or a row or column that does not sum to one; and if the workers stay unconnected.

    `rho` and `slowest_rho` are estimates from the largest Lyapunov exponent, the same on every rank up to rounding.
    """

    def __init__(self, draw: Callable[[int], Phase], n: int, degree: int, name: str = "random", horizon: int = 16):
        self.draw, self.n, self.name, self.horizon, self.period = draw, n, name, horizon, None
        self.largest_degree = degree
        self._recent: dict[int, Phase] = {}
        steps = horizon * (4 + n)  # one random pair per step takes 2 n of them
        if not connects((self.phase(t) for t in range(steps)), n):
            raise ValueError(
                f"topology {name!r} is not connected: within {steps} steps some workers hear nothing of others"
            )

    def __repr__(self) -> str:
        return f"RandomTopology({self.name!r}, n={self.n})"

    def phase(self, step: int) -> Phase:
        phase = self._recent.get(step)
        if phase is None:
            phase = self.draw(step)
            self._check_phase(phase, step)
            # A step's matrix is asked for by every bucket, and the next one's when its receives are posted early.
            self._recent = {step: phase} if len(self._recent) >= 8 else {**self._recent, step: phase}
        return phase

    def _check_phase(self, phase: Phase, step: int) -> None:
        where = f"topology {self.name!r}, step {step}"
        if phase.n != self.n:
            raise ValueError(f"{where}: {phase.n} workers instead of {self.n}")
        check_rows(phase, where)
        if abs(phase.columns() - 1).max() > TOLERANCE:
            raise ValueError(f"{where}: every column must sum to one, or the workers would agree on a random mean")
        if isinstance(phase, Sparse) and phase.sources.shape[1] <= self.largest_degree:
            return  # the common case, told without counting
        if not phase.averages() and phase.degrees()[0] > self.largest_degree:
            raise ValueError(
                f"{where}: a worker hears from {phase.degrees()[0]} others, more than {self.largest_degree}"
            )

    @cached_property
    def phases(self) -> tuple[Phase, ...]:  # type: ignore[override]
        """The first steps' matrices: examples."""
        return tuple(self.phase(t) for t in range(self.horizon))

    @cached_property
    def most_messages(self) -> int:
        return self.largest_degree

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        return True

    @property
    def modes(self) -> None:  # type: ignore[override]
        """None: there is no period whose eigenvalues could be taken."""

    @cached_property
    def contraction(self) -> Growth:
        """rho with its standard error, and `slowest_rho`."""
        one = np.ones((1, 1))
        return estimate(self.phase, self.n, one, one, one) if self.n > 1 else Growth(0.0, 0.0, 0.0)

    @property
    def rho(self) -> float:  # type: ignore[override]
        """The contraction of disagreement per step; 0 where it vanishes sooner or later."""
        return self.contraction.growth

    @property
    def slowest_rho(self) -> float:  # type: ignore[override]
        """rho, an exact average taken for a contraction to 0.22."""
        return self.contraction.slowest

    def _map(self, change: Callable[[Phase], Phase], name: str) -> Topology:
        degree = max(phase.degrees()[0] for phase in map(change, self.phases))
        draw = partial(_changed, self, change)
        return RandomTopology(draw, self.n, max(degree, self.largest_degree), name, self.horizon)

    def every(self, k: int) -> Topology:
        if k <= 1:
            return super().every(k)
        return RandomTopology(
            partial(_every, self, k), self.n, self.largest_degree, f"{self.name}, every {k}", k * self.horizon
        )

    def with_global_average(self, every: int) -> Topology:
        if every < 1:
            raise ValueError(f"average globally every H >= 1 steps, not {every}")
        draw, name = partial(_averaged, self, every), f"{self.name}, global average every {every}"
        return RandomTopology(draw, self.n, max(1, self.largest_degree), name, max(self.horizon, every))


def _changed(inner: Topology, change: Callable[[Phase], Phase], step: int) -> Phase:
    return change(inner.phase(step))


def _every(inner: Topology, k: int, step: int) -> Phase:
    return inner.phase(step // k) if step % k == k - 1 else identity(inner.n)


def _averaged(inner: Topology, every: int, step: int) -> Phase:
    return average(inner.n) if step % every == every - 1 else inner.phase(step)
