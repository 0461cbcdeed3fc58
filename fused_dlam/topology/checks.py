"""What the matrices of a topology must be: square, with rows or columns that sum to one, and connecting all workers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import networkx as nx
import numpy as np

from .matrix import TOLERANCE, Circulant, Dense, Phase, merged, numbers


def as_phases(weights) -> list[Phase]:
    """The matrices of one period, from whatever a user gave. Raises TypeError or ValueError if it is none."""
    if isinstance(weights, Phase):
        weights = [weights]
    if isinstance(weights, (list, tuple)) and any(isinstance(w, Phase) or _is_matrix(w) for w in weights):
        # A user's `Circulant` may have offsets beyond n, and the same one twice.
        forms = [merged(w.n, w.weights) if isinstance(w, Circulant) else w for w in weights]
        return [w if isinstance(w, Phase) else Dense(w) for w in forms]
    array = numbers(weights)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"weights must be one [n, n] matrix or a sequence of them, not of shape {array.shape}")
    return [Dense(W) for W in (array[None] if array.ndim == 2 else array)]


def _is_matrix(weights: Any) -> bool:
    try:
        return np.ndim(weights) == 2
    except ValueError:  # rows of unlike lengths
        return False


def check_word(sums: str) -> str:
    """Raises ValueError for what is neither "rows" nor "columns"."""
    if not isinstance(sums, str) or sums not in ("rows", "columns"):
        raise ValueError(f"sums must be 'rows' or 'columns', what sums to one, not {sums!r}")
    return sums


def check_sums(phase: Phase, where: str, sums: str = "rows") -> None:
    """Raises ValueError if a weight is negative or not finite, or a row (a column) does not sum to one."""
    values, line = phase.values(), sums[:-1]
    if not values.size:
        raise ValueError(f"{where}: every {line} must sum to one; there are no weights")
    totals = values.sum(axis=-1) if sums == "rows" else phase.columns()
    if values.min() >= 0 and abs(totals - 1).max() <= TOLERANCE:  # False if there is a NaN
        return
    if not np.isfinite(values).all():
        raise ValueError(f"{where}: weights must be finite")
    if (values < 0).any():
        raise ValueError(f"{where}: weights must not be negative, found {values.min():g}")
    totals = np.atleast_1d(totals)
    worst = int(abs(totals - 1).argmax())
    other, across = ("columns", phase.columns()) if sums == "rows" else ("rows", values.sum(axis=-1))
    hint = f" (its {other} do: sums={other!r} takes it)" if abs(across - 1).max() <= TOLERANCE else ""
    raise ValueError(f"{where}: every {line} must sum to one; {line} {worst} sums to {totals[worst]:.12g}{hint}")


def check_phases(phases: Sequence[Phase], name: str, sums: str = "rows") -> None:
    """Raises ValueError if the matrices of one period are wrong, differ in size or leave workers unconnected."""
    n = phases[0].n
    for t, phase in enumerate(phases):
        where = f"{name}, phase {t}" if len(phases) > 1 else name
        if phase.n != n:
            raise ValueError(f"{where}: {phase.n} workers, but phase 0 has {n}")
        check_sums(phase, where, sums)
    if all(isinstance(phase, Circulant) for phase in phases):
        offsets = {k for phase in phases for k, w in phase.weights if w}  # type: ignore[union-attr]
        count = math.gcd(n, *offsets)
        if count > 1:
            raise ValueError(f"{name} is not connected: it falls into {count} parts")
        return
    if connects([*phases] * n, n):
        return
    union = np.any([phase.dense() for phase in phases], axis=0)
    graph = nx.from_numpy_array(union.T.astype(int), create_using=nx.DiGraph)
    parts = sorted(sorted(part) for part in nx.strongly_connected_components(graph))
    raise ValueError(
        f"{name} is not connected: over a whole period nothing passes both ways between the workers {parts[0][:8]} and"
        f" {parts[1][:8]} (it falls into {len(parts)} parts)"
    )


def connects(phases: Iterable[Phase], n: int) -> bool:
    """Whether, over these steps, worker 0's message reaches all workers and all of theirs reach worker 0."""
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
