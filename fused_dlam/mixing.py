"""Mixing matrices: `Topology`, a periodic sequence of them, and what their spectrum says.

`W[i, j]` weighs worker j's message at worker i; rows sum to one. A phase of the sequence is held as a `Circulant`
(every worker does the same, shifted: n may be 100,000) or as a dense float64 matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np

TOLERANCE = 1e-9  # on row and column sums


@dataclass(frozen=True)
class Circulant:
    """W[i, (i - offset) mod n] = weight for each (offset, weight): worker i hears from i - offset."""

    n: int
    weights: tuple[tuple[int, float], ...]

    def dense(self) -> np.ndarray:
        W = np.zeros((self.n, self.n))
        rows = np.arange(self.n)
        for offset, weight in self.weights:
            W[rows, (rows - offset) % self.n] += weight
        return W

    def symbol(self) -> np.ndarray:
        """The n eigenvalues, in the order of the Fourier modes (mode 0 is the workers' mean)."""
        first_column = np.zeros(self.n)
        for offset, weight in self.weights:
            first_column[offset] += weight
        return np.fft.fft(first_column)


Phase = Circulant | np.ndarray


@dataclass(frozen=True)
class Peers:
    """One worker's part in one exchange. The order of `sources` is the order of the sum, the same in every run."""

    sources: tuple[int, ...]  # workers it hears from
    weights: tuple[float, ...]  # W[rank, source], one for each source
    destinations: tuple[int, ...]  # workers that hear from it


class Topology:
    """A periodic sequence of mixing matrices for n workers.

    Args:
        weights: one [n, n] matrix or a sequence of them, `W[i, j]` weighing j's message at i; or `Circulant` phases.
        name: what to call it in messages and checkpoints.

    Raises ValueError if a matrix is not square, has a negative or non-finite entry or a row that does not sum to one,
    or if some worker cannot be reached over the period. Warns if the matrices are not doubly stochastic, for then the
    workers agree on a weighted mean.
    """

    def __init__(self, weights, name: str = "custom"):
        self.name = name
        self.phases: tuple[Phase, ...] = tuple(_as_phases(weights))
        self.n = _size(self.phases[0])
        self.period = len(self.phases)
        self._check()

    def __repr__(self) -> str:
        return f"Topology({self.name!r}, n={self.n}, period={self.period})"

    def weights(self, step: int = 0) -> np.ndarray:
        """The mixing matrix of this step, float64 [n, n]."""
        phase = self.phases[step % self.period]
        return phase.dense() if isinstance(phase, Circulant) else phase.copy()

    def peers(self, rank: int, step: int = 0) -> Peers:
        """Whom `rank` hears from (with weights) and sends to at this step, itself left out."""
        phase = self.phases[step % self.period]
        if isinstance(phase, Circulant):
            hears = sorted(((rank - k) % self.n, w) for k, w in phase.weights if k and w)
            sends = sorted((rank + k) % self.n for k, w in phase.weights if k and w)
        else:
            hears = [(int(j), float(phase[rank, j])) for j in np.flatnonzero(phase[rank]) if j != rank]
            sends = [int(i) for i in np.flatnonzero(phase[:, rank]) if i != rank]
        return Peers(tuple(j for j, _ in hears), tuple(w for _, w in hears), tuple(sends))

    def degree(self, step: int = 0) -> int:
        """The largest number of workers that one worker hears from at this step."""
        phase = self.phases[step % self.period]
        if isinstance(phase, Circulant):
            return sum(1 for k, w in phase.weights if k and w)
        return int((_off_diagonal(phase) != 0).sum(axis=1).max()) if self.n > 1 else 0

    def averages_exactly(self, step: int = 0) -> bool:
        """Whether this step's matrix is J, every entry 1/n."""
        phase = self.phases[step % self.period]
        if isinstance(phase, Circulant):
            return len(phase.weights) == self.n and all(abs(w * self.n - 1) < TOLERANCE for _, w in phase.weights)
        return bool(np.allclose(phase * self.n, 1, rtol=0, atol=TOLERANCE))

    # -- what the spectrum says --------------------------------------------------------------------------------------

    @cached_property
    def is_symmetric(self) -> bool:
        return all(_is_symmetric(phase) for phase in self.phases)

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        return all(
            isinstance(phase, Circulant) or np.allclose(phase.sum(axis=0), 1, rtol=0, atol=TOLERANCE)
            for phase in self.phases
        )

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
        dense = [self.weights(t) for t in range(self.period)]
        if self.period == 1:
            values = np.linalg.eigvalsh(dense[0]) if self.is_symmetric else np.linalg.eigvals(dense[0])
            return np.delete(values, np.argmin(abs(values - 1)))[None]
        if self.is_symmetric and self.period <= 64:
            mix = sum(w * W for w, W in zip(np.random.default_rng(0).random(self.period), dense, strict=True))
            _, V = np.linalg.eigh(mix)
            diagonalized = [V.T @ W @ V for W in dense]
            if all(abs(_off_diagonal(D)).max(initial=0) < 1e-9 for D in diagonalized):
                values = np.stack([np.diag(D) for D in diagonalized])
                return np.delete(values, np.argmin(abs(values - 1).max(axis=0)), axis=1)
        return None

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
    def _contraction(self) -> tuple[float, int]:
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
                log_sizes += np.log(size, out=np.full(self.n - 1, -np.inf), where=size > 1e-13)
                if log_sizes.max() == -np.inf:
                    return 0.0, t + 1
            return float(np.exp(log_sizes.max() / self.period)), 0
        weights = [self.weights(t) for t in range(self.period)]
        limits = [self.limit_weights]  # of a period that begins with phase 0; now of those that begin later:
        for W in weights[:0:-1]:
            limits.insert(1, limits[1 % len(limits)] @ W)
        product, log_size = np.eye(self.n), 0.0
        for t, (W, limit) in enumerate(zip(weights, limits, strict=True)):
            product = (W - limit) @ product  # telescopes: the product of the W, less its limit
            size = float(np.linalg.norm(product))
            if size < 1e-13:
                return 0.0, t + 1
            product, log_size = product / size, log_size + math.log(size)
        steps = self.period
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
        for step in range(self.period):
            product = self.weights(step) @ product
        return product

    # -- new topologies from this one --------------------------------------------------------------------------------

    def lazy(self) -> Topology:
        """(I + W)/2: the same graph with all eigenvalues moved towards one."""
        return Topology([_blend(p, identity(self.n), 0.5) for p in self.phases], f"lazy {self.name}")

    def symmetrize(self) -> Topology:
        """(W + W^T)/2: up to twice the degree, and symmetric. ValueError unless W is doubly stochastic."""
        if not self.is_doubly_stochastic:
            raise ValueError(
                f"topology {self.name!r} is not doubly stochastic, so (W + W^T)/2 has rows that do not sum to one;"
                " build a symmetric one with topology.metropolis_hastings(graph.to_undirected())"
            )
        return Topology([_blend(p, _transpose(p), 0.5) for p in self.phases], f"symmetric {self.name}")

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
        period = math.lcm(self.period, every)
        J = circulant(self.n, range(self.n))
        phases = [J if (t + 1) % every == 0 else self.phases[t % self.period] for t in range(period)]
        return Topology(phases, f"{self.name}, global average every {every}")

    def to_networkx(self, step: int = 0) -> nx.DiGraph:
        """Edges j -> i with `weight` W[i, j], self-loops included."""
        return nx.from_numpy_array(self.weights(step).T, create_using=nx.DiGraph)

    def _check(self) -> None:
        for t, phase in enumerate(self.phases):
            where = f"topology {self.name!r}" + (f", phase {t}" if self.period > 1 else "")
            if _size(phase) != self.n:
                raise ValueError(f"{where}: {_size(phase)} workers, but phase 0 has {self.n}")
            values = np.array([w for _, w in phase.weights]) if isinstance(phase, Circulant) else phase
            if not np.isfinite(values).all():
                raise ValueError(f"{where}: weights must be finite")
            if (values < 0).any():
                raise ValueError(f"{where}: weights must not be negative, found {values.min():g}")
            sums = np.atleast_1d(values.sum(axis=-1))
            if abs(sums - 1).max() > TOLERANCE:
                row = int(abs(sums - 1).argmax())
                raise ValueError(f"{where}: every row must sum to one; row {row} sums to {sums[row]:.12g}")
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
        union = np.any([self.weights(t) for t in range(self.period)], axis=0)
        graph = nx.from_numpy_array(union.T.astype(int), create_using=nx.DiGraph)
        if not nx.is_strongly_connected(graph):
            parts = sorted(sorted(part) for part in nx.strongly_connected_components(graph))
            raise ValueError(
                f"topology {self.name!r} is not connected: over a whole period nothing passes both ways between the"
                f" workers {parts[0][:8]} and {parts[1][:8]} (it falls into {len(parts)} parts)"
            )


# -- building blocks ---------------------------------------------------------------------------------------------------


def identity(n: int) -> Circulant:
    return Circulant(n, ((0, 1.0),))


def circulant(n: int, offsets: Mapping[int, float] | Sequence[int]) -> Circulant:
    """One phase in which worker i hears from i - offset for each offset; a sequence gets equal weights, self included.

    Offsets are taken mod n; equal ones are merged (their weights add up, if given).
    """
    if isinstance(offsets, Mapping):
        merged: dict[int, float] = {}
        for k, w in offsets.items():
            merged[k % n] = merged.get(k % n, 0.0) + w
    else:
        distinct = sorted({0, *(k % n for k in offsets)})
        merged = dict.fromkeys(distinct, 1 / len(distinct))
    return Circulant(n, tuple(sorted(merged.items())))


# -- small print -------------------------------------------------------------------------------------------------------


def _as_phases(weights) -> list[Phase]:
    if isinstance(weights, Circulant):
        return [_normalized(weights)]
    if isinstance(weights, (list, tuple)) and any(isinstance(w, Circulant) for w in weights):
        return [_normalized(w) if isinstance(w, Circulant) else _matrix(w) for w in weights]
    if isinstance(weights, (list, tuple)) and any(np.ndim(w) == 2 for w in weights):
        return [_matrix(w) for w in weights]
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"weights must be one [n, n] matrix or a sequence of them, not of shape {array.shape}")
    return [_matrix(W) for W in (array[None] if array.ndim == 2 else array)]


def _normalized(phase: Circulant) -> Circulant:
    merged: dict[int, float] = {}
    for k, w in phase.weights:
        merged[k % phase.n] = merged.get(k % phase.n, 0.0) + w
    return circulant(phase.n, merged)


def _matrix(W) -> np.ndarray:
    W = np.array(W, dtype=np.float64)
    if W.ndim != 2 or W.shape[0] != W.shape[1]:
        raise ValueError(f"a mixing matrix must be square, not of shape {W.shape}")
    return W


def _size(phase: Phase) -> int:
    return phase.n if isinstance(phase, Circulant) else phase.shape[0]


def _dense(phase: Phase) -> np.ndarray:
    return phase.dense() if isinstance(phase, Circulant) else phase


def _off_diagonal(W: np.ndarray) -> np.ndarray:
    return W - np.diag(np.diag(W))


def _is_symmetric(phase: Phase) -> bool:
    if isinstance(phase, Circulant):
        weights = dict(phase.weights)
        return all(abs(weights.get(-k % phase.n, 0.0) - w) < TOLERANCE for k, w in phase.weights)
    return bool(np.allclose(phase, phase.T, rtol=0, atol=TOLERANCE))


def _transpose(phase: Phase) -> Phase:
    if isinstance(phase, Circulant):
        return circulant(phase.n, {-k: w for k, w in phase.weights})
    return phase.T


def _blend(a: Phase, b: Phase, share: float) -> Phase:
    if isinstance(a, Circulant) and isinstance(b, Circulant):
        merged = {k: (1 - share) * w for k, w in a.weights}
        for k, w in b.weights:
            merged[k] = merged.get(k, 0.0) + share * w
        return circulant(a.n, merged)
    return (1 - share) * _dense(a) + share * _dense(b)
