"""How fast disagreement dies out on a graph that is drawn anew at every step: its largest Lyapunov exponent.

All workers' values are followed along the very steps that training takes, from step 0 on: V' = A V + B (W_k - I) C V.
There is no period whose eigenvalues could be taken, so this is an estimate, and comes with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .matrix import Phase, identity

EXCHANGES = 2048  # followed, at least: with 8 to 4,096 workers the error of rho is then below 0.01
LOCAL = 64  # steps per exchange, at most
PARTS = 8  # of the path: the error is judged by how much they differ. With 16 it was 5 times as large at momentum 0.99
EXACT = 1e-13  # what shrinks by so much in a single step has vanished but for rounding
VANISHED = 0.22  # what exact averaging counts as, for what happens meanwhile is averaged only the next time


class Growth(NamedTuple):
    growth: float  # of the disagreement, per step; 0 if it vanishes sooner or later
    error: float  # its standard error
    slowest: float  # the same if it does not vanish, or where it does shrinks to 0.22


def estimate(
    phase: Callable[[int], Phase], n: int, A: np.ndarray, B: np.ndarray, C: np.ndarray, memory: float = 1.0
) -> Growth:
    """The growth of V' = A V + B (W_k - I) C V per step, V [k, n], on what differs between the workers.

    Args:
        phase: the step's mixing matrix.
        A, B, C: [k, k], [k, m], [m, k]: what a step does to one worker's k values, its m messages' pulls among them.
        memory: steps over which a step is remembered, such as 1/(1 - momentum). The path is at least 64 of it, and
            the first quarter, in which V turns towards what grows fastest, is not counted.

    One V is enough: almost every start ends in the direction that grows fastest, and what it meets is the same.
    """
    path, local = math.ceil(max(EXCHANGES, 64 * memory)), identity(n)
    V = start = _normalized(np.random.RandomState(np.random.Philox(key=n)).standard_normal((len(A), n)))[0]
    sizes: list[float] = []  # of V after each step, 0 where it vanished and started anew
    exchanges = 0
    while exchanges < path and len(sizes) < LOCAL * path:
        W, y = phase(len(sizes)), C @ V
        V = A @ V
        if W != local:
            V = V + B @ np.stack([W.pull(message) for message in y])
            exchanges += 1
        V, size = _normalized(V)
        if size < EXACT:  # as where n = 4 and two matchings in a row differ
            V, size = start, 0.0
        sizes.append(size)
    logs = np.log(np.where(np.array(sizes) == 0, VANISHED, sizes))
    if 0 in sizes:
        return Growth(0.0, 0.0, math.exp(logs.mean()))
    travelled = logs[len(logs) // 4 :].cumsum()
    growth = math.exp(_slope(travelled))
    # A drift between the halves is what is left of the start.
    scatter = np.std([_slope(part) for part in np.array_split(travelled, PARTS)], ddof=1) / math.sqrt(PARTS)
    first, second = (_slope(half) for half in np.array_split(travelled, 2))
    return Growth(growth, growth * max(float(scatter), abs(second - first) / 2), growth)


def _slope(log_size: np.ndarray) -> float:
    """By least squares: oscillations, in which momentum abounds, then hardly count. At momentum 0.9 the error of a
    growth of 0.95 is 0.0004 instead of 0.002."""
    step = np.arange(len(log_size)) - (len(log_size) - 1) / 2
    return float(step @ log_size / (step @ step))


def _normalized(V: np.ndarray) -> tuple[np.ndarray, float]:
    """(V of norm 1, its norm), without what all workers share, which comes back from rounding and never dies out."""
    V = V - V.mean(axis=1, keepdims=True)
    size = math.sqrt(np.vdot(V, V))
    return (V / size if size > 0 else V), size
