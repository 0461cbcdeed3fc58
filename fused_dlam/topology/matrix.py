"""One step's mixing matrix W, in one of three forms.

`W[i, j]` weighs worker j's message at worker i. Rows sum to one.

    Circulant   a few numbers in all: every worker does the same, shifted, so n may be 100,000
    Sparse      a few numbers per worker
    Dense       all n^2 numbers

All three have the same methods, so the other files never ask which one they hold, except to save time or memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

TOLERANCE = 1e-9  # on row and column sums
LARGEST = 10**7  # of what is counted: lists of so many are made


@dataclass(frozen=True)
class Peers:
    """One worker's part in one exchange.

    Messages are summed in the order of `sources`, which is the same in every run.
    """

    sources: tuple[int, ...]  # workers it hears from
    weights: tuple[float, ...]  # W[rank, source], one for each source
    destinations: tuple[int, ...]  # workers that hear from it


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
        """The n eigenvalues, in the order of the Fourier modes. Mode 0 is the workers' mean."""
        first_column = np.zeros(self.n)
        for offset, weight in self.weights:
            first_column[offset] += weight
        return np.fft.fft(first_column)

    def values(self) -> np.ndarray:
        """The distinct weights. Their sum over the last axis is the sum of a row."""
        return np.array([w for _, w in self.weights])

    def columns(self) -> np.ndarray:
        """The sums of the columns. A circulant has one number, because all its columns have the same sum."""
        return self.values().sum(keepdims=True)

    def pull(self, y: Any) -> Any:
        """sum_j W[i, j] (y_j - y_i) for y [n, ...], a NumPy array or a torch tensor.

        It is exactly zero between equal workers, because it sums differences.
        """
        if self.averages():
            z = y - y[0]
            return z.mean(0) - z
        pull = 0.0 * y
        for k, w in self.weights:
            if k:
                pull = pull + w * ((np.roll(y, k, 0) if isinstance(y, np.ndarray) else y.roll(k, 0)) - y)
        return pull

    @cached_property
    def heard(self) -> tuple[np.ndarray, np.ndarray]:
        """All pairs (i, j) where i hears from another worker j, as two arrays."""
        rows, offsets = np.arange(self.n), np.array([k for k, w in self.weights if k and w], dtype=int)
        return np.tile(rows, len(offsets)), (rows - offsets[:, None]).ravel() % self.n

    def peers(self, rank: int) -> Peers:
        hears = sorted(((rank - k) % self.n, w) for k, w in self.weights if k and w)
        sends = sorted((rank + k) % self.n for k, w in self.weights if k and w)
        return Peers(tuple(j for j, _ in hears), tuple(w for _, w in hears), tuple(sends))

    def degrees(self) -> tuple[int, int]:
        """(the most workers that any worker hears from, the most that any sends to)."""
        count = sum(1 for k, w in self.weights if k and w)
        return count, count

    def is_symmetric(self) -> bool:
        weights = dict(self.weights)
        return all(abs(weights.get(-k % self.n, 0.0) - w) < TOLERANCE for k, w in self.weights)

    def transpose(self) -> Circulant:
        return circulant(self.n, {-k: w for k, w in self.weights})

    def averages(self) -> bool:
        """Whether W = J, every entry 1/n."""
        return len(self.weights) == self.n and all(abs(w * self.n - 1) < TOLERANCE for _, w in self.weights)


class Sparse:
    """W[i, sources[i, k]] = weights[i, k]. Worker i keeps the rest of row i for itself.

    Args:
        sources: the workers that each worker hears from, int [n, d]. No worker appears twice in a row. A worker with
            fewer than d sources fills its row with itself, at weight 0.
        weights: float64 [n, d].
    """

    def __init__(self, sources: np.ndarray, weights: np.ndarray):
        self.sources, self.others = sources, weights
        self.n = len(sources)

    @cached_property
    def own(self) -> np.ndarray:
        return 1 - self.others.sum(axis=1)

    def dense(self) -> np.ndarray:
        W = np.diag(self.own)
        i, k = np.nonzero(self.others)
        W[i, self.sources[i, k]] = self.others[i, k]
        return W

    def values(self) -> np.ndarray:
        return np.column_stack([self.own, self.others])

    def columns(self) -> np.ndarray:
        return self.own + np.bincount(self.sources.ravel(), self.others.ravel(), minlength=self.n)

    def pull(self, y: Any) -> Any:
        pull = 0.0 * y
        for j, w in zip(self.sources.T, self.others.T, strict=True):
            pull = pull + _like(w.reshape(-1, *(1,) * (y.ndim - 1)), y) * (y[j] - y)
        return pull

    @cached_property
    def heard(self) -> tuple[np.ndarray, np.ndarray]:
        i, k = np.nonzero(self.others)
        return i, self.sources[i, k]

    def peers(self, rank: int) -> Peers:
        hears = sorted((int(j), float(w)) for j, w in zip(self.sources[rank], self.others[rank], strict=True) if w)
        sends = np.flatnonzero(((self.sources == rank) & (self.others != 0)).any(axis=1))
        return Peers(tuple(j for j, _ in hears), tuple(w for _, w in hears), tuple(sends.tolist()))

    def degrees(self) -> tuple[int, int]:
        i, j = self.heard
        return _most(i), _most(j)

    def is_symmetric(self) -> bool:
        i, j = self.heard
        there, back = (sparse(self.n, *pair, self.others[self.others != 0]) for pair in ((i, j), (j, i)))
        return np.array_equal(there.sources, back.sources) and bool((abs(there.others - back.others) < TOLERANCE).all())

    def transpose(self) -> Sparse:
        i, j = self.heard
        return sparse(self.n, j, i, self.others[self.others != 0])

    def averages(self) -> bool:
        return self.sources.shape[1] >= self.n - 1 and Dense(self.dense()).averages()


class Dense:
    """The whole of W, float64 [n, n]."""

    def __init__(self, W) -> None:
        W = numbers(W)
        if W.ndim != 2 or W.shape[0] != W.shape[1]:
            raise ValueError(f"a mixing matrix must be square, not of shape {W.shape}")
        self.W, self.n = W, len(W)

    def dense(self) -> np.ndarray:
        return self.W.copy()

    def values(self) -> np.ndarray:
        return self.W

    def columns(self) -> np.ndarray:
        return self.W.sum(axis=0)

    def pull(self, y: Any) -> Any:
        others = _like(off_diagonal(self.W), y)
        z = (y - y[0]).reshape(self.n, -1)  # where all messages are equal this makes the pull exactly zero
        return (others @ z - others.sum(1)[:, None] * z).reshape(y.shape)

    @cached_property
    def heard(self) -> tuple[np.ndarray, np.ndarray]:
        i, j = np.nonzero(off_diagonal(self.W))
        return i, j

    def peers(self, rank: int) -> Peers:
        hears = [(int(j), float(self.W[rank, j])) for j in np.flatnonzero(self.W[rank]) if j != rank]
        sends = [int(i) for i in np.flatnonzero(self.W[:, rank]) if i != rank]
        return Peers(tuple(j for j, _ in hears), tuple(w for _, w in hears), tuple(sends))

    def degrees(self) -> tuple[int, int]:
        present = off_diagonal(self.W) != 0
        return int(present.sum(axis=1).max()), int(present.sum(axis=0).max())

    def is_symmetric(self) -> bool:
        return bool(np.allclose(self.W, self.W.T, rtol=0, atol=TOLERANCE))

    def transpose(self) -> Dense:
        return Dense(self.W.T)

    def averages(self) -> bool:
        return bool(np.allclose(self.W * self.n, 1, rtol=0, atol=TOLERANCE))


Phase = Circulant | Sparse | Dense


# -- building blocks ---------------------------------------------------------------------------------------------------


def numbers(weights: Any) -> np.ndarray:
    """A copy in float64. Raises TypeError for what is no array of real numbers."""
    try:
        array = np.array(weights)
    except (TypeError, ValueError) as error:  # of lists of unlike lengths
        raise TypeError(f"weights must be matrices of numbers ({error})") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"weights must be matrices of real numbers, not of {array.dtype.name}")
    return array.astype(np.float64)


def check_workers(n: int) -> int:
    """n as an int. Raises ValueError unless it is an integer >= 1 and at most `LARGEST`."""
    return check_count("the number of workers", n)


def check_count(what: str, count: int, at_least: int = 1) -> int:
    """count as an int. Raises ValueError unless it is an integer of at least that much and at most `LARGEST`."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < at_least:
        raise ValueError(f"{what} must be an integer >= {at_least}, not {count!r}")
    if count > LARGEST:
        raise ValueError(f"{what} must be at most {LARGEST:,}, not one of {int(count).bit_length()} bits")
    return int(count)


def identity(n: int) -> Circulant:
    return Circulant(n, ((0, 1.0),))


def circulant(n: int, offsets: Mapping[int, float] | Sequence[int]) -> Circulant:
    """The matrix in which worker i hears from i - offset, for each offset.

    Args:
        offsets: {offset: weight}, where offset 0 is the worker itself. Or a sequence of offsets: these and the worker
            itself then get equal weights.

    Offsets are taken mod n. Equal ones are merged, and their weights add up.
    """
    if isinstance(offsets, Mapping):
        return merged(n, offsets.items())
    distinct = {0, *(k % n for k in offsets)}
    return merged(n, ((k, 1 / len(distinct)) for k in distinct))


def merged(n: int, weights: Iterable[tuple[int, float]]) -> Circulant:
    """The circulant matrix of (offset, weight) pairs: offsets mod n, each once, with the sum of its weights."""
    sums: dict[int, float] = {}
    for k, w in weights:
        sums[k % n] = sums.get(k % n, 0.0) + w
    return Circulant(n, tuple(sorted(sums.items())))


def average(n: int) -> Circulant:
    """J, every entry 1/n."""
    return circulant(n, range(n))


def sparse(n: int, i, j, weights) -> Sparse:
    """The matrix in which worker i[e] hears from j[e] with weights[e], for every e. No pair (i, j) may appear twice."""
    i, j, weights = np.asarray(i, dtype=int), np.asarray(j, dtype=int), np.broadcast_to(weights, np.shape(i))
    order = np.lexsort((j, i))
    i, j, weights = i[order], j[order], weights[order]
    counts = np.bincount(i, minlength=n)
    place = np.arange(len(i)) - (np.cumsum(counts) - counts)[i]
    sources = np.repeat(np.arange(n)[:, None], counts.max(initial=0), axis=1)
    others = np.zeros(sources.shape)
    sources[i, place], others[i, place] = j, weights
    return Sparse(sources, others)


def blend(a: Phase, b: Phase, share: float) -> Phase:
    """(1 - share) a + share b."""
    if isinstance(a, Circulant) and isinstance(b, Circulant):
        return merged(a.n, [*((k, (1 - share) * w) for k, w in a.weights), *((k, share * w) for k, w in b.weights)])
    if isinstance(a, Sparse) and isinstance(b, Circulant) and b.weights == ((0, 1.0),):
        return Sparse(a.sources, (1 - share) * a.others)
    return Dense((1 - share) * a.dense() + share * b.dense())


def off_diagonal(W: np.ndarray) -> np.ndarray:
    return W - np.diag(np.diag(W))


def _like(weights: np.ndarray, y: Any) -> Any:
    return weights if isinstance(y, np.ndarray) else y.new_tensor(weights)


def _most(workers: np.ndarray) -> int:
    return int(np.bincount(workers).max(initial=0))
