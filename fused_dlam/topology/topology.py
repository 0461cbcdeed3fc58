"""`Topology`: a mixing matrix for every step, and the graphs that can be made from it."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from functools import cached_property, partial

import networkx as nx
import numpy as np

from . import mass, spectrum
from .checks import as_phases, check_phases, check_word
from .matrix import TOLERANCE, Circulant, Peers, Phase, average, blend, identity


class Topology:
    """A periodic sequence of mixing matrices for n workers.

    Args:
        weights: one [n, n] matrix or a sequence of them, where `W[i, j]` weighs j's message at i. `Circulant` and
            `Sparse` are matrices too.
        name: what messages and checkpoints call it.
        sums: what sums to one, "rows" (each worker weighs what it hears) or "columns" (each divides what it has among
            those it sends to), for push-sum.

    Raises ValueError if a matrix is not square, has a negative or non-finite entry or a row (a column) that does not
    sum to one, or if some worker cannot be reached over the period; for columns also if a worker is left with no mass,
    or one of which 1/mass is no float32. Warns if the rows sum to one and the columns do not, because the workers then
    agree on a weighted mean.
    """

    n: int
    sums: str = "rows"
    period: int | None  # the number of steps after which the matrices repeat; None for a `RandomTopology`
    phases: tuple[Phase, ...]  # the matrices of one period; of a `RandomTopology` those of its first steps

    def __init__(self, weights, name: str = "custom", sums: str = "rows"):
        self._hold(tuple(as_phases(weights)), name, check_word(sums))
        check_phases(self.phases, f"topology {name!r}", sums)
        if sums == "columns":
            self._masses  # noqa: B018 -- refuses graphs on which a worker has none
        elif not self.is_doubly_stochastic:
            shares = np.array2string(self.limit_weights, precision=4, threshold=16)
            warnings.warn(
                f"topology {name!r} is not doubly stochastic: the workers agree on a weighted mean, with weights"
                f" {shares} instead of 1/{self.n} each. With unequal weights the model favors some workers' data, but"
                " not with the methods 'push-sum', 'push-diging' and 'push-pull'.",
                stacklevel=2,
            )

    def _hold(self, phases: tuple[Phase, ...], name: str, sums: str) -> None:
        self.name, self.phases, self.sums = name, phases, sums
        self.n, self.period = phases[0].n, len(phases)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, n={self.n}" + (f", period={self.period})" if self.period else ")")

    def phase(self, step: int) -> Phase:
        """This step's matrix, as a `Circulant`, `Sparse` or `Dense`."""
        return self.phases[step % len(self.phases)]

    def weights(self, step: int = 0) -> np.ndarray:
        """This step's matrix, float64 [n, n]. It is a copy."""
        return self.phase(step).dense()

    def peers(self, rank: int, step: int = 0) -> Peers:
        """The other workers that `rank` hears from, their weights, and the workers it sends to, at this step."""
        return self.phase(step).peers(rank)

    def degree(self, step: int = 0) -> int:
        """The largest number of workers that one worker hears from at this step."""
        return self.phase(step).degrees()[0]

    def averages_exactly(self, step: int = 0) -> bool:
        """Whether this step's matrix is J, every entry 1/n."""
        return self.phase(step).averages()

    @cached_property
    def most_messages(self) -> int:
        """The most messages that one worker receives in one step."""
        return max(messages(phase) for phase in self.phases)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all matrices in `phases`, weights in float32.

        Ranks compare it, because two ranks may have drawn different matrices for themselves under the same name.
        """
        digest = hashlib.sha256()
        if self.sums == "columns":
            digest.update(b"columns")
        for phase in self.phases:
            who = [k for k, _ in phase.weights] if isinstance(phase, Circulant) else phase.heard
            for numbers, kind in ((who, np.int64), (phase.values(), np.float32)):
                digest.update(np.ascontiguousarray(numbers, kind).tobytes())
        return digest.hexdigest()[:16]

    # -- columns that sum to one: see mass.py --------------------------------------------------------------------------

    def mass(self, step: int = 0) -> np.ndarray:
        """The workers' masses before this step, float64 [n], which sum to n: w of push-sum. It is a copy.

        sum_i w_i z_i / n is what averaging leaves as it is, for z = x / w. Exactly one each on a doubly stochastic
        graph. Raises ValueError for rows that sum to one and leave a worker with none, because nobody hears it.
        """
        return self._masses[step % len(self._masses)].copy()

    @cached_property
    def _masses(self) -> list[np.ndarray]:
        if self.is_doubly_stochastic:
            return [np.ones(self.n)]
        return mass.masses(self.phases, self.sums, f"topology {self.name!r}")

    @cached_property
    def as_rows(self) -> Topology:
        """What the graph does to z = x / w: R_k = diag(1/w_{k+1}) A_k diag(w_k), whose rows sum to one.

        A graph whose rows sum to one is this itself.
        """
        if self.sums == "rows":
            return self
        phases, rows = self.phases, object.__new__(Topology)
        if not self.is_doubly_stochastic:
            w = [*self._masses, self._masses[0]]
            phases = tuple(mass.rescaled(A, *w[k : k + 2]) for k, A in enumerate(self.phases))
        rows._hold(phases, self.name, "rows")
        # What is known of it already. Its fingerprint is that of A: R has been rounded by each rank for itself.
        vars(rows).update(_masses=self._masses, limit_weights=self.limit_weights, fingerprint=self.fingerprint)
        return rows

    # -- what the spectrum says: see spectrum.py -----------------------------------------------------------------------

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether every matrix in `phases` is symmetric."""
        return all(phase.is_symmetric() for phase in self.phases)

    @property
    def is_static(self) -> bool:
        """Whether there is one matrix for all steps, and it is symmetric."""
        return self.period == 1 and self.is_symmetric

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        """Whether rows and columns sum to one, so that the workers agree on their plain mean."""
        totals = (total for phase in self.phases for total in (phase.columns(), phase.values().sum(axis=-1)))
        return all(np.allclose(total, 1, rtol=0, atol=TOLERANCE) for total in totals)

    @cached_property
    def limit_weights(self) -> np.ndarray:
        """The weights of the workers in the mean they agree on, [n]: 1/n each if doubly stochastic."""
        return spectrum.limit_weights(self) if self.sums == "rows" else self.mass() / self.n

    @cached_property
    def modes(self) -> np.ndarray | None:
        """Eigenvalues [period, n - 1] of the disagreement, if all matrices share their eigenvectors; else None."""
        return spectrum.modes(self.as_rows)

    @cached_property
    def contraction(self) -> spectrum.Growth:
        """(rho, its standard error, slowest_rho). The error is 0 if the matrices repeat."""
        return spectrum.contraction(self.as_rows)

    @property
    def rho(self) -> float:
        """The contraction of disagreement per step; 0 if it vanishes sooner or later.

        With a period it is the norm of (product over the period - limit)^(1/period). Without one it is an estimate,
        the same on every rank up to rounding.
        """
        return self.contraction.growth

    @property
    def slowest_rho(self) -> float:
        """rho, but at least 0.22^(1/T), where disagreement falls below 0.22 after T steps for the first time.

        For what happens in a period such a graph is no faster than that: one that averages exactly once in 64 steps is
        slow though rho = 0, and so is one that almost does. With rho alone MI-DmSGD would diverge on the one-peer
        exponential graph of 4,095 workers, 1.07-fold per step.
        """
        return self.contraction.slowest

    # -- new topologies from this one ----------------------------------------------------------------------------------

    def lazy(self) -> Topology:
        """(I + W)/2: the same graph with all eigenvalues moved towards one."""
        return self._derived(partial(_changed, self, _lazy), len(self.phases), f"lazy {self.name}")

    def symmetrize(self) -> Topology:
        """(W + W^T)/2, with up to twice the degree. ValueError unless W is doubly stochastic."""
        if not self.is_doubly_stochastic:
            raise ValueError(
                f"topology {self.name!r} is not doubly stochastic, so (W + W^T)/2 has rows that do not sum to one;"
                " build a symmetric one with topology.metropolis_hastings(graph.to_undirected())"
            )
        return self._derived(partial(_changed, self, _symmetric), len(self.phases), f"symmetric {self.name}")

    def every(self, k: int) -> Topology:
        """One exchange in every k steps: k - 1 local steps before each."""
        k = _check_every("communicate every k >= 1 steps", k)
        if k == 1:
            return self
        _check_length(k * len(self.phases))
        at = partial(_seldom, self, k, identity(self.n))
        return self._derived(at, k * len(self.phases), f"{self.name}, every {k}")

    def with_global_average(self, every: int) -> Topology:
        """An exact average over all workers every so many steps, in place of the exchange (Gossip-PGA)."""
        every = _check_every("average globally every H >= 1 steps", every)
        steps = math.lcm(self.period, every) if self.period else max(len(self.phases), every)
        _check_length(steps)
        at = partial(_averaged, self, every, average(self.n))
        return self._derived(at, steps, f"{self.name}, global average every {every}")

    def _derived(self, at: Callable[[int], Phase], steps: int, name: str) -> Topology:
        """The topology with matrix `at(step)`, where `steps` is its period. `RandomTopology` has its own."""
        return Topology([at(t) for t in range(steps)], name, self.sums)

    def to_networkx(self, step: int = 0) -> nx.DiGraph:
        """Edges j -> i with `weight` W[i, j], self-loops included."""
        return nx.from_numpy_array(self.weights(step).T, create_using=nx.DiGraph)


def messages(phase: Phase) -> int:
    """The most messages that one worker receives. A matrix that averages exactly counts as one, by all-reduce."""
    return 1 if phase.averages() else phase.degrees()[0]


LONGEST = 1 << 20  # steps: the matrices of a period are listed


def _check_every(what: str, every: int) -> int:
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(f"{what}, not {every!r} (an integer is needed)")
    return int(every)


def _check_length(steps: int) -> None:
    if steps > LONGEST:
        raise ValueError(f"a topology repeats after {LONGEST:,} steps at the latest, and this one would later")


# -- the matrices of derived topologies. Functions of the module, so that processes can be sent them -------------------


def _changed(inner: Topology, change: Callable[[Phase], Phase], step: int) -> Phase:
    return change(inner.phase(step))


def _seldom(inner: Topology, k: int, local: Phase, step: int) -> Phase:
    return inner.phase(step // k) if step % k == k - 1 else local


def _averaged(inner: Topology, every: int, J: Phase, step: int) -> Phase:
    return J if step % every == every - 1 else inner.phase(step)


def _lazy(phase: Phase) -> Phase:
    return blend(phase, identity(phase.n), 0.5)


def _symmetric(phase: Phase) -> Phase:
    return phase if phase.is_symmetric() else blend(phase, phase.transpose(), 0.5)
