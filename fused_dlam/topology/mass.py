"""The mass of each worker, w of push-sum: how a graph moves what workers hold, and so what a worker's step counts.

Columns of A sum to one: A moves things about and loses none. Push-sum averages with it, though its rows do not sum to
one, because a mass w travels along: x' = A x, w' = A w, and z = x / w is what all agree on (Kempe, Dobra and Gehrke
2003). In terms of z it is an ordinary average, whose rows sum to one:

    z' = R z,    R_k = diag(1 / w_{k+1}) A_k diag(w_k)        and sum_i w_i z_i stays what it was.

All z start equal, so w may start anywhere. It starts where it comes back to after a period, so that R repeats too: at
the Perron vector of the period's product, times n. Rows that sum to one have masses just so: the ones with which
sum_i w_i z_i stays, w_{k+1} W_k = w_k. The mass is the share of a worker in the mean that all agree on, times n.

A worker's mass may be tiny, 2^-n on some graphs. The vector is taken by elimination without a subtraction (Grassmann,
Taksar and Heyman 1985), so that every entry has its digits (O'Cinneide 1993), and not only the large ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .matrix import Dense, Phase, identity

SMALLEST = float(np.finfo(np.float32).tiny)  # below it 1 / w is no number in float32


def masses(phases: Sequence[Phase], sums: str, name: str) -> list[np.ndarray]:
    """w at the beginning of each step of a period, [n] each, summing to n.

    Raises ValueError where they are not determined, zero, or too small for 1 / w to be a number.
    """
    n = phases[0].n
    turned = [None if phase == identity(n) else phase.dense() for phase in phases]
    product = np.eye(n)
    for W in turned:
        product = product if W is None else W @ product
    with np.errstate(all="ignore"):
        start = perron(product if sums == "rows" else product.T)
    if start is None:
        raise ValueError(
            f"{name}: the workers' masses are not determined, for over a period some workers hand on all they have and"
            " get nothing from the others. Let every worker keep a part of its own"
        )
    if sums == "columns":
        found = list(_onwards(start, turned[:-1]))
    else:  # w_k = w_{k+1} W_k: back from the end of the period, which is its start
        found = [start, *reversed(list(_onwards(start, [W if W is None else W.T for W in turned[:0:-1]]))[1:])]
    for step, w in enumerate(found):
        check(w, f"{name}, phase {step}" if len(phases) > 1 else name)
    return found


def _onwards(w: np.ndarray, matrices: Sequence[np.ndarray | None]) -> Iterator[np.ndarray]:
    yield w
    for A in matrices:
        w = w if A is None else moved(A, w)
        yield w


def moved(A: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A w, which sums to n: in a million steps rounding may not add up."""
    w = A @ w
    return w * (len(w) / w.sum())


def perron(P: np.ndarray) -> np.ndarray | None:
    """The w with w P = w that sums to n, for a matrix whose rows sum to one; None where there are several."""
    P, n = P.copy(), len(P)
    for k in range(n - 1, 0, -1):
        leaving = P[k, :k].sum()
        if leaving == 0:
            return None
        P[:k, k] /= leaving
        P[:k, :k] += np.outer(P[:k, k], P[k, :k])
    w = np.ones(n)
    for k in range(1, n):
        w[k] = w[:k] @ P[:k, k]
    return w * (n / w.sum())


def check(w: np.ndarray, where: str) -> None:
    """Raises ValueError unless 1 / w is a number for every worker."""
    if w.min() >= SMALLEST:  # False if there is a NaN
        return
    worker = int(np.argmin(np.nan_to_num(w)))
    held = "no mass" if w[worker] == 0 else f"a mass of {w[worker]:.2g}"
    raise ValueError(
        f"{where}: worker {worker} has {held}, and push-sum divides by it (at least {SMALLEST:.2g} is needed). Let it"
        " keep more of its own, and more of the others send to it"
    )


def rescaled(phase: Phase, before: np.ndarray, after: np.ndarray) -> Phase:
    """R = diag(1 / after) A diag(before)."""
    if phase == identity(phase.n):
        return phase
    return Dense(phase.dense() * before / after[:, None])
