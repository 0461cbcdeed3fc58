"""`Topology`, a periodic sequence of mixing matrices, and what their spectrum says."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property

import networkx as nx
import numpy as np

from .lyapunov import EXACT
from .matrix import TOLERANCE, Circulant, Dense, Peers, Phase, average, blend, circulant, identity, off_diagonal


class Topology:
    """A periodic sequence of mixing matrices for n workers.

    Args:
        weights: one [n, n] matrix or a sequence of them, `W[i, j]` weighing j's message at i; or phases, `Circulant` or
            `Sparse`.
        name: what to call it in messages and checkpoints.

    Raises ValueError if a matrix is not square, has a negative or non-finite entry or a row that does not sum to one,
    or if some worker cannot be reached over the period. Warns if the matrices are not doubly stochastic, for then the
    workers agree on a weighted mean.
    """

    n: int
    phases: tuple[Phase, ...]
    period: int | None  # steps after which the matrices repeat; None: they never do (`RandomTopology`)

    def __init__(self, weights, name: str = "custom"):
        self.name = name
        self.phases = tuple(_as_phases(weights))
        self.n = self.phases[0].n
        self.period = len(self.phases)
        self._check()

    def __repr__(self) -> str:
        return f"Topology({self.name!r}, n={self.n}, period={self.period})"

    def phase(self, step: int) -> Phase:
        """This step's matrix in its own form."""
        return self.phases[step % len(self.phases)]

    def weights(self, step: int = 0) -> np.ndarray:
        """The mixing matrix of this step, float64 [n, n]."""
        return self.phase(step).dense()

    def peers(self, rank: int, step: int = 0) -> Peers:
        """Whom `rank` hears from (with weights) and sends to at this step, itself left out."""
        return self.phase(step).peers(rank)

    def degree(self, step: int = 0) -> int:
        """The largest number of workers that one worker hears from at this step."""
        return self.phase(step).degrees()[0]

    def averages_exactly(self, step: int = 0) -> bool:
        """Whether this step's matrix is J, every entry 1/n."""
        return self.phase(step).averages()

    @cached_property
    def most_messages(self) -> int:
        """The most that one worker receives in one step; a step that averages exactly counts as one, by all-reduce."""
        return max(1 if phase.averages() else phase.degrees()[0] for phase in self.phases)

    @cached_property
    def fingerprint(self) -> str:
        """Of all weights in float32, of a random topology those of its first steps: ranks compare it, for matrices that
        each of them drew for itself have one name."""
        digest = hashlib.sha256()
        for phase in self.phases:
            who = [k for k, _ in phase.weights] if isinstance(phase, Circulant) else phase.heard
            for numbers, kind in ((who, np.int64), (phase.values(), np.float32)):
                digest.update(np.ascontiguousarray(numbers, kind).tobytes())
        return digest.hexdigest()[:16]

    # -- what the spectrum says --------------------------------------------------------------------------------------

    @cached_property
    def is_symmetric(self) -> bool:
        return all(phase.is_symmetric() for phase in self.phases)

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        return all(np.allclose(phase.columns(), 1, rtol=0, atol=TOLERANCE) for phase in self.phases)

    @cached_property
    def limit_weights(self) -> np.ndarray:
        """The weights of the workers in the mean they agree on, [n]: 1/n each if doubly stochastic."""
        if self.is_doubly_stochastic:
            return np.full(self.n, 1 / self.n)
        product = self._product()
        for _ in range(60):  # squaring: 2^60 periods
            product = product @ product
            product /= product.sum(axis=1, keepdims=True)
        return product.mean(axis=0)

    @cached_property
    def modes(self) -> np.ndarray | None:
        """Eigenvalues [period, n - 1] of the disagreement, if all phases share their eigenvectors; else None.

        Circulant phases share the Fourier modes; a single matrix trivially shares its own (by its Schur form, so it
        need not be symmetric or diagonalizable); commuting symmetric matrices share an orthogonal basis.
        """
        if all(isinstance(phase, Circulant) for phase in self.phases):
            return np.stack([phase.symbol()[1:] for phase in self.phases])  # type: ignore[union-attr]
        if self.period != 1 and (not self.is_symmetric or len(self.phases) > 64):
            return None
        dense = [phase.dense() for phase in self.phases]
        if self.period == 1:
            values = np.linalg.eigvalsh(dense[0]) if self.is_symmetric else np.linalg.eigvals(dense[0])
            return np.delete(values, np.argmin(abs(values - 1)))[None]
        mix = sum(w * W for w, W in zip(np.random.default_rng(0).random(len(dense)), dense, strict=True))
        _, V = np.linalg.eigh(mix)
        diagonalized = [V.T @ W @ V for W in dense]
        if any(abs(off_diagonal(D)).max(initial=0) >= 1e-9 for D in diagonalized):
            return None
        values = np.stack([np.diag(D) for D in diagonalized])
        return np.delete(values, np.argmin(abs(values - 1).max(axis=0)), axis=1)

    @cached_property
    def rho(self) -> float:
        """The contraction of disagreement per step: the norm of (product over a period - limit)^(1/period).

        0: exact averaging within a period. If the norm of one period's product is not below one (a directed graph may
        first amplify), two, four, ... periods are taken.
        """
        return self._contraction[0]

    @cached_property
    def slowest_rho(self) -> float:
        """rho, or what a period that averages exactly amounts to: 0.22^(1/T) if it takes T steps.

        Exact averaging after T steps is no faster than that for what happens meanwhile: local steps between the
        exchanges count, and T = 64 is slow though rho = 0.
        """
        rho, exact_after = self._contraction
        return max(rho, 0.22 ** (1 / exact_after)) if exact_after else rho

    @cached_property
    def _contraction(self) -> tuple[float, float]:
        """(rho, the number of steps until the average is exact, or 0).

        Sizes are kept as logarithms: over 2,000 steps any graph contracts to less than rounding. Only what vanishes
        within a single step is exact averaging.
        """
        if self.n == 1:
            return 0.0, 0
        if all(isinstance(p, Circulant) for p in self.phases):
            log_sizes = np.zeros(self.n - 1)
            for t, phase in enumerate(self.phases):
                size = abs(phase.symbol()[1:])  # type: ignore[union-attr]
                log_sizes += np.log(size, out=np.full(self.n - 1, -np.inf), where=size > EXACT)
                if log_sizes.max() == -np.inf:
                    return 0.0, t + 1
            return float(np.exp(log_sizes.max() / len(self.phases))), 0
        limits = [self.limit_weights]  # of a period that begins with phase 0; now of those that begin later:
        if not self.is_doubly_stochastic:
            for phase in self.phases[:0:-1]:
                limits.insert(1, limits[1 % len(limits)] @ phase.dense())
        product, log_size = np.eye(self.n), 0.0
        for t, phase in enumerate(self.phases):
            limit = limits[t % len(limits)]
            # Telescopes: the product of the W, less its limit.
            product = product + phase.pull(product) - limit @ product
            size = float(np.linalg.norm(product))
            if size < EXACT:
                return 0.0, t + 1
            product, log_size = product / size, log_size + math.log(size)
        steps = len(self.phases)
        for _ in range(12):
            norm = float(np.linalg.norm(product, 2))
            if norm == 0:
                return 0.0, steps
            if math.log(norm) + log_size < 0:
                return math.exp((math.log(norm) + log_size) / steps), 0
            product, log_size, steps = product @ product, 2 * log_size, 2 * steps
        return 1.0, 0

    def _product(self) -> np.ndarray:
        product = np.eye(self.n)
        for phase in self.phases:
            product = phase.dense() @ product
        return product

    # -- new topologies from this one --------------------------------------------------------------------------------

    def lazy(self) -> Topology:
        """(I + W)/2: the same graph with all eigenvalues moved towards one."""
        return self._map(_lazy, f"lazy {self.name}")

    def symmetrize(self) -> Topology:
        """(W + W^T)/2: up to twice the degree, and symmetric. ValueError unless W is doubly stochastic."""
        if not self.is_doubly_stochastic:
            raise ValueError(
                f"topology {self.name!r} is not doubly stochastic, so (W + W^T)/2 has rows that do not sum to one;"
                " build a symmetric one with topology.metropolis_hastings(graph.to_undirected())"
            )
        return self._map(_symmetric, f"symmetric {self.name}")

    def _map(self, change: Callable[[Phase], Phase], name: str) -> Topology:
        return Topology([change(p) for p in self.phases], name)

    def every(self, k: int) -> Topology:
        """One exchange in every k steps: k - 1 local steps before each."""
        if k < 1:
            raise ValueError(f"communicate every k >= 1 steps, not {k}")
        local = [identity(self.n)] * (k - 1)
        return self if k == 1 else Topology([q for p in self.phases for q in (*local, p)], f"{self.name}, every {k}")

    def with_global_average(self, every: int) -> Topology:
        """Every so many steps an exact average over all workers in place of the exchange (Gossip-PGA)."""
        if every < 1:
            raise ValueError(f"average globally every H >= 1 steps, not {every}")
        period = math.lcm(len(self.phases), every)
        J = average(self.n)
        phases = [J if (t + 1) % every == 0 else self.phase(t) for t in range(period)]
        return Topology(phases, f"{self.name}, global average every {every}")

    def to_networkx(self, step: int = 0) -> nx.DiGraph:
        """Edges j -> i with `weight` W[i, j], self-loops included."""
        return nx.from_numpy_array(self.weights(step).T, create_using=nx.DiGraph)

    def _check(self) -> None:
        for t, phase in enumerate(self.phases):
            where = f"topology {self.name!r}" + (f", phase {t}" if len(self.phases) > 1 else "")
            if phase.n != self.n:
                raise ValueError(f"{where}: {phase.n} workers, but phase 0 has {self.n}")
            check_rows(phase, where)
        self._check_connected()
        if not self.is_doubly_stochastic:
            shares = np.array2string(self.limit_weights, precision=4, threshold=16)
            warnings.warn(
                f"topology {self.name!r} is not doubly stochastic: the workers agree on a weighted mean, with weights"
                f" {shares} instead of 1/{self.n} each. With unequal weights the model favors some workers' data.",
                stacklevel=3,
            )

    def _check_connected(self) -> None:
        if all(isinstance(phase, Circulant) for phase in self.phases):
            offsets = {k for phase in self.phases for k, w in phase.weights if w}  # type: ignore[union-attr]
            count = math.gcd(self.n, *offsets)
            if count > 1:
                raise ValueError(f"topology {self.name!r} is not connected: it falls into {count} parts")
            return
        if connects(self.phases * self.n, self.n):
            return
        union = np.any([phase.dense() for phase in self.phases], axis=0)
        graph = nx.from_numpy_array(union.T.astype(int), create_using=nx.DiGraph)
        parts = sorted(sorted(part) for part in nx.strongly_connected_components(graph))
        raise ValueError(
            f"topology {self.name!r} is not connected: over a whole period nothing passes both ways between the"
            f" workers {parts[0][:8]} and {parts[1][:8]} (it falls into {len(parts)} parts)"
        )


def check_rows(phase: Phase, where: str) -> None:
    """Raises ValueError if a weight is negative or not finite or a row does not sum to one."""
    values = phase.values()
    if values.min() >= 0 and abs(values.sum(axis=-1) - 1).max() <= TOLERANCE:  # not so if there is a NaN
        return
    if not np.isfinite(values).all():
        raise ValueError(f"{where}: weights must be finite")
    if (values < 0).any():
        raise ValueError(f"{where}: weights must not be negative, found {values.min():g}")
    sums = np.atleast_1d(values.sum(axis=-1))
    row = int(abs(sums - 1).argmax())
    raise ValueError(f"{where}: every row must sum to one; row {row} sums to {sums[row]:.12g}")


def connects(phases: Iterable[Phase], n: int) -> bool:
    """Whether, over these phases, worker 0's message reaches all workers and all of theirs reach worker 0."""
    heard_0, heard_by_0 = np.zeros((2, n), dtype=bool)
    heard_0[0] = heard_by_0[0] = True
    for phase in phases:
        if isinstance(phase, Circulant) and phase.averages():
            return True
        i, j = phase.heard
        heard_0[i[heard_0[j]]] = True
        heard_by_0[j[heard_by_0[i]]] = True
        if heard_0.all() and heard_by_0.all():
            return True
    return n == 1


# -- small print -------------------------------------------------------------------------------------------------------


def _as_phases(weights) -> list[Phase]:
    if isinstance(weights, Phase):
        weights = [weights]
    if isinstance(weights, (list, tuple)) and any(isinstance(w, Phase) or np.ndim(w) == 2 for w in weights):
        return [_normalized(w) if isinstance(w, Phase) else Dense(w) for w in weights]
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"weights must be one [n, n] matrix or a sequence of them, not of shape {array.shape}")
    return [Dense(W) for W in (array[None] if array.ndim == 2 else array)]


def _normalized(phase: Phase) -> Phase:
    if not isinstance(phase, Circulant):
        return phase
    merged: dict[int, float] = {}
    for k, w in phase.weights:
        merged[k % phase.n] = merged.get(k % phase.n, 0.0) + w
    return circulant(phase.n, merged)


def _lazy(phase: Phase) -> Phase:
    return blend(phase, identity(phase.n), 0.5)


def _symmetric(phase: Phase) -> Phase:
    return phase if phase.is_symmetric() else blend(phase, phase.transpose(), 0.5)
