"""How fast the disagreement between workers dies out: rho, the modes, the weighted mean that remains.

A periodic graph has a product of matrices over one period, and rho is read off it. A graph that is drawn anew at every
step has none. Its rho is exp(largest Lyapunov exponent), which `estimate` measures along the steps that training takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .matrix import Circulant, Phase, identity, off_diagonal

if TYPE_CHECKING:
    from .topology import Topology

EXACT = 1e-13  # disagreement that shrinks by this factor in one step has vanished, but for rounding
# What an average that is exact, or better than this, counts as: changes made after it are only averaged the next time.
VANISHED = 0.22
EXCHANGES = 2048  # to follow, at least: the error of rho is then below 0.01 with 8 to 4,096 workers
LOCAL = 64  # the most steps to follow per exchange
PARTS = 8  # of the path, compared for the error. 16 parts made the error 5 times as large at momentum 0.99
MOST_PHASES = 64  # for which a common basis of eigenvectors is searched


class Growth(NamedTuple):
    growth: float  # the factor by which disagreement grows per step; 0 if it vanishes sooner or later
    error: float  # the standard error of `growth`; 0 where it is not an estimate
    slowest: float  # `growth`, but at least VANISHED^(1/T), see `Topology.slowest_rho`


def contraction(topology: Topology) -> Growth:
    """The growth of disagreement on a graph when nothing but averaging happens. `growth` is rho, below one."""
    if topology.n == 1:
        return Growth(0.0, 0.0, 0.0)
    if topology.period is None:
        alone = (np.ones((1, 1)),) * 3
        return estimate(topology.phase, topology.n, lambda step: alone)
    shared = all(isinstance(phase, Circulant) for phase in topology.phases)
    rho, soon = (_contraction_of_modes if shared else _contraction_of_product)(topology)
    return Growth(rho, 0.0, max(rho, VANISHED ** (1 / soon)) if soon else rho)


def _contraction_of_modes(topology: Topology) -> tuple[float, int]:
    """(rho, T) of circulant matrices, one Fourier mode at a time. T: see `Topology.slowest_rho`, 0 if not in a period.

    Sizes are logarithms, because over 2,000 steps any graph contracts to less than the smallest float. For the same
    reason an average counts as exact only where the disagreement vanishes within a single step.
    """
    log_sizes, soon = np.zeros(topology.n - 1), 0
    for t, phase in enumerate(topology.phases):
        size = abs(phase.symbol()[1:])  # type: ignore[union-attr]
        log_sizes += np.log(size, out=np.full(topology.n - 1, -np.inf), where=size > EXACT)
        soon = soon or (t + 1 if log_sizes.max() <= math.log(VANISHED) else 0)
        if log_sizes.max() == -np.inf:
            return 0.0, soon
    return float(np.exp(log_sizes.max() / len(topology.phases))), soon


def _contraction_of_product(topology: Topology) -> tuple[float, int]:
    """The same for any matrices, from the norm of their product over a period less its limit.

    A directed graph may amplify disagreement within its first period. If the norm is not below one, two, four, ...
    periods are taken.
    """
    limits = [topology.limit_weights]  # the weights of the limit, for a period that begins with each phase
    if not topology.is_doubly_stochastic:
        for phase in topology.phases[:0:-1]:
            limits.insert(1, limits[1 % len(limits)] @ phase.dense())
    product, log_size, soon = np.eye(topology.n), 0.0, 0
    for t, phase in enumerate(topology.phases):
        limit = limits[t % len(limits)]
        # The factors W - limit multiply to the product of the W, less its limit.
        product = product + phase.pull(product) - limit @ product
        size = float(np.linalg.norm(product))
        if size < EXACT:
            return 0.0, soon or t + 1
        # The Frobenius norm is at most sqrt(n) times the spectral one, which takes longer to compute.
        if not soon and log_size + math.log(size) <= math.log(VANISHED * math.sqrt(topology.n)):
            spectral = float(np.linalg.norm(product, 2))
            soon = t + 1 if log_size + math.log(spectral) <= math.log(VANISHED) else 0
        product, log_size = product / size, log_size + math.log(size)
    steps = len(topology.phases)
    for _ in range(12):
        norm = float(np.linalg.norm(product, 2))
        if norm == 0:
            return 0.0, soon or steps
        if math.log(norm) + log_size < 0:
            return math.exp((math.log(norm) + log_size) / steps), soon
        product, log_size, steps = product @ product, 2 * log_size, 2 * steps
    return 1.0, 0


def limit_weights(topology: Topology) -> np.ndarray:
    """The weight of each worker in the mean that all agree on, [n]."""
    if topology.is_doubly_stochastic:
        return np.full(topology.n, 1 / topology.n)
    product = np.eye(topology.n)
    for phase in topology.phases:
        product = phase.dense() @ product
    for _ in range(60):  # squaring gives 2^60 periods
        product = product @ product
        product /= product.sum(axis=1, keepdims=True)
    return product.mean(axis=0)


def modes(topology: Topology) -> np.ndarray | None:
    """The eigenvalues [period, n - 1] of the disagreement if all matrices share their eigenvectors, else None.

    Circulant matrices share the Fourier modes. Symmetric matrices that commute share an orthogonal basis. A single
    matrix shares its eigenvectors with itself; by its Schur form it need not be symmetric or diagonalizable. A graph
    that never repeats has no period whose eigenvalues could be taken.
    """
    phases = topology.phases
    if topology.period is None:
        return None
    if all(isinstance(phase, Circulant) for phase in phases):
        return np.stack([phase.symbol()[1:] for phase in phases])  # type: ignore[union-attr]
    if topology.period != 1 and (not topology.is_symmetric or len(phases) > MOST_PHASES):
        return None
    dense = [phase.dense() for phase in phases]
    if topology.period == 1:
        values = np.linalg.eigvalsh(dense[0]) if topology.is_symmetric else np.linalg.eigvals(dense[0])
        return np.delete(values, np.argmin(abs(values - 1)))[None]
    # The eigenvectors of a random combination diagonalize every matrix of the sum, if any basis does.
    mix = sum(w * W for w, W in zip(np.random.default_rng(0).random(len(dense)), dense, strict=True))
    _, V = np.linalg.eigh(mix)
    diagonalized = [V.T @ W @ V for W in dense]
    if any(abs(off_diagonal(D)).max(initial=0) >= 1e-9 for D in diagonalized):
        return None
    values = np.stack([np.diag(D) for D in diagonalized])
    return np.delete(values, np.argmin(abs(values - 1).max(axis=0)), axis=1)


# -- graphs that are drawn anew at every step --------------------------------------------------------------------------


def estimate(
    phase: Callable[[int], Phase],
    n: int,
    equations: Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]],
    memory: float = 1.0,
) -> Growth:
    """The growth of the disagreement per step under V' = A V + B (W_k - I) C V, where V is [k, n].

    Args:
        phase: the step's mixing matrix, as a function of the step.
        equations: the step's A, B, C, [k, k], [k, m], [m, k]. C makes a worker's m messages from its k values, A is the
            step without neighbors, and B adds what the neighbors' messages pull.
        memory: the number of steps that a step is remembered for, such as 1/(1 - momentum). The path is at least 64
            times as long. Its first quarter does not count, because there V still turns to what grows fastest.

    V is followed from step 0 along the very steps that training takes. One V is enough: almost every start ends in the
    direction that grows fastest.
    """
    path, local = math.ceil(max(EXCHANGES, 64 * memory)), identity(n)
    values = len(equations(0)[0])
    V = start = _normalized(np.random.RandomState(np.random.Philox(key=n)).standard_normal((values, n)))[0]
    sizes: list[float] = []  # of V after each step, 0 where it vanished and was started anew
    exchanges = 0
    while exchanges < path and len(sizes) < LOCAL * path:
        A, B, C = equations(len(sizes))
        W, y = phase(len(sizes)), C @ V
        V = A @ V
        if W != local:
            V = V + B @ np.stack([W.pull(message) for message in y])
            exchanges += 1
        V, size = _normalized(V)
        if size < EXACT:  # for example n = 4, after two different matchings in a row
            V, size = start, 0.0
        sizes.append(size)
    return measured(sizes)


def measured(sizes: list[float]) -> Growth:
    """The growth of what had these sizes after each step, relative to the step before; 0 where it was started anew."""
    logs = np.log(np.where(np.array(sizes) == 0, VANISHED, sizes))
    if 0 in sizes:
        return Growth(0.0, 0.0, math.exp(logs.mean()))
    traveled = logs[len(logs) // 4 :].cumsum()
    growth = math.exp(_slope(traveled))
    scatter = np.std([_slope(part) for part in np.array_split(traveled, PARTS)], ddof=1) / math.sqrt(PARTS)
    # The start still shows as a difference between the halves, so half of that difference is a second error.
    first, second = (_slope(half) for half in np.array_split(traveled, 2))
    return Growth(growth, growth * max(float(scatter), abs(second - first) / 2), growth)


def _slope(log_size: np.ndarray) -> float:
    """The slope by least squares, in which the oscillations that momentum causes hardly count.

    At momentum 0.9 the error of a growth of 0.95 is 0.0004. From the end points alone it would be 0.002.
    """
    step = np.arange(len(log_size)) - (len(log_size) - 1) / 2
    return float(step @ log_size / (step @ step))


def _normalized(V: np.ndarray) -> tuple[np.ndarray, float]:
    """(V with norm 1, its norm before), without what all workers share.

    Rounding brings the shared part back at every step, and it never dies out.
    """
    V = V - V.mean(axis=1, keepdims=True)
    size = math.sqrt(np.vdot(V, V))
    return (V / size if size > 0 else V), size
