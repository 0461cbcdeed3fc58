"""The field's test problem: full-batch linear regression in which every worker's data have another solution.

    f_i(x) = |A_i x - b_i|^2 / (2 rows),  b_i = A_i x_i + noise,  minimized: the mean of the f_i

The gradients are exact and the optimum is known, so all of a method's bias shows. The gradients are affine in x, so a
step of a linear rule is affine too. So the workers end at the fixed point of a period, found by solving, not waiting.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import rules
from ..rules.rule import Rule
from ..topology.topology import Topology
from .simulator import Simulation


class Quadratic:
    """n workers, f_i(x) = x^T H_i x / 2 - c_i^T x, for H of [n, d, d] and c of [n, d]."""

    def __init__(self, H: np.ndarray, c: np.ndarray):
        self.H, self.c = H, c
        self.n, self.d = c.shape
        self.optimum = np.linalg.solve(H.mean(axis=0), c.mean(axis=0))

    def grad(self, x: np.ndarray) -> np.ndarray:
        """Every worker's gradient at its own parameters, x of [n, d], or at many points each, x of [n, points, d]."""
        if x.ndim == 3:
            return np.einsum("nde,npe->npd", self.H, x) - self.c[:, None]
        return np.einsum("nde,ne->nd", self.H, x) - self.c

    def error(self, x: np.ndarray) -> np.ndarray:
        """Mean over the workers of |x_i - optimum|^2 / |optimum|^2, for x of [..., n, d]."""
        return ((x - self.optimum) ** 2).sum(-1).mean(-1) / (self.optimum**2).sum()

    @property
    def heterogeneity(self) -> float:
        """b^2 of the theorems: the mean over the workers of |gradient of f_i|^2 at the optimum."""
        return float((self.grad(np.tile(self.optimum, (self.n, 1))) ** 2).sum(-1).mean())


class Regression(Quadratic):
    """n workers, d unknowns, `rows` data points each.

    Args:
        spread: standard deviation of the workers' own solutions about the common one (0: like data).
        label_noise: standard deviation of the noise in b.
        seed: of the data.
    """

    def __init__(
        self, n: int, d: int = 10, rows: int = 50, spread: float = 1.0, label_noise: float = 0.1, seed: int = 3
    ):
        random = np.random.default_rng(seed)
        A = random.standard_normal((n, rows, d))
        solutions = random.standard_normal(d) + spread * random.standard_normal((n, d))
        b = np.einsum("nrd,nd->nr", A, solutions) + label_noise * random.standard_normal((n, rows))
        super().__init__(np.einsum("nrd,nre->nde", A, A) / rows, np.einsum("nrd,nr->nd", A, b) / rows)


def period_map(
    method: str | Rule, topology: Topology, problem: Quadratic, lr: float, momentum: float = 0.9, **hyper
) -> tuple[np.ndarray, np.ndarray]:
    """(A, offset) such that one period of the topology is z <- A z + offset for z = (x, state), [k, n, d] flattened.

    The rule's own equations, which must be linear, form it column by column. k = 1 + the number of state buffers.
    It is a later period's: the first one of NIDS begins with a step that averages nothing.
    """
    if topology.period is None:
        raise ValueError(f"topology {topology.name!r} never repeats: there is no period to be solved for")
    rule = rules.get(method)
    n, d, k = problem.n, problem.d, 1 + len(rule.state)
    size = k * n * d
    points = np.zeros((k, n, d, size + 1))  # all unit vectors, and the zero vector
    points.reshape(size, size + 1)[:, :size] = np.eye(size)
    x, *state = points.transpose(0, 1, 3, 2).reshape(k, n, -1)
    workers = _settled(rule, topology, x, state, lr, momentum, hyper)
    for _ in range(topology.period):
        workers.step(problem.grad(workers.x.reshape(n, -1, d)).reshape(n, -1), lr)
    values = np.stack([workers.x, *workers.state]).reshape(k, n, size + 1, d)
    affine = values.transpose(0, 1, 3, 2).reshape(size, size + 1)
    return affine[:, :-1] - affine[:, -1:], affine[:, -1]


def limiting_bias(
    method: str | Rule, topology: Topology, problem: Quadratic, lr: float, momentum: float = 0.9, **hyper
) -> float:
    """The error with which a linear rule ends at a constant learning rate: the mean over a period of the topology.

    Solves for the fixed point of the period's map, in O((k n d)^3). Conserved quantities, such as the mean of a
    correction, stay at zero, where they start. Returns inf where the steps do not contract: the workers never arrive.
    """
    A, offset = period_map(method, topology, problem, lr, momentum, **hyper)
    if abs(np.linalg.eigvals(A)).max() > 1 + 1e-9:
        return np.inf
    x, *state = _fixed_point(A, offset).reshape(-1, problem.n, problem.d)
    workers = _settled(rules.get(method), topology, x, state, lr, momentum, hyper)
    return float(np.mean([problem.error(workers.step(problem.grad(workers.x), lr)) for _ in topology.phases]))


def _settled(
    rule: Rule, topology: Topology, x: Any, state: list, lr: float, momentum: float, hyper: dict
) -> Simulation:
    """Workers with these values, and what the rule remembers of its scalars after a period."""
    before = Simulation(rule, topology, np.zeros((topology.n, 1)), momentum, **hyper)
    if before.schemes.any:
        raise ValueError("a limit is solved for without loss, participation, delay and noise: simulate with them")
    for _ in topology.phases:
        before.step(0.0 * before.x, lr)
    workers = Simulation(rule, topology, x, momentum, **hyper)
    workers.state, workers.memory = workers.rule.State(*state), before.memory
    return workers


def _fixed_point(A: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Where z <- A z + offset goes from z = 0. A may conserve something, L^T A = L^T; then L^T z stays zero."""
    U, sizes, Vt = np.linalg.svd(np.eye(len(A)) - A)
    some = sizes > 1e-12 * sizes[0]
    z = Vt[some].T @ ((U.T[some] @ offset) / sizes[some])
    L, free = U[:, ~some], Vt[~some].T
    return z - free @ np.linalg.solve(L.T @ free, L.T @ z) if free.size else z
