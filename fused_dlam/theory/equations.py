"""A linear rule's step as matrices, read off its equations: the same in all steps, or of each step and worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..rules.jit import Array
from ..rules.rule import Rule
from ..topology import exchanges
from ..topology.topology import Topology


class Equations(NamedTuple):
    """A linear rule's step, V' = A V + G g + B pull(C V + S g), where V = (x, state) of one worker and g its gradient.

    There are k values in V and m messages: A is [k, k], G is [k], B is [k, m], C is [m, k] and S is [m].
    """

    A: np.ndarray
    G: np.ndarray
    B: np.ndarray
    C: np.ndarray
    S: np.ndarray

    def step(self, V: np.ndarray, curvature: Any, pull: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """V of shape [k, ...] after a step with the gradients curvature * x. `pull` maps [m, ...] to the same shape."""
        g = curvature * V[0]
        y = np.tensordot(self.C, V, 1) + np.multiply.outer(self.S, g)
        return np.tensordot(self.A, V, 1) + np.multiply.outer(self.G, g) + np.tensordot(self.B, pull(y), 1)


class OfEach(Equations):
    """The same of n workers with scalars of their own: [k, k, n], [k, n], [k, m, n], [m, k, n] and [m, n]."""

    def step(self, V: np.ndarray, curvature: Any, pull: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The same, for V of shape [k, n, ...]."""
        g = (curvature * V[0])[None]
        y = _of_each(self.C, V) + _of_each(self.S[:, None], g)
        return _of_each(self.A, V) + _of_each(self.G[:, None], g) + _of_each(self.B, pull(y))


def _of_each(matrices: np.ndarray, V: np.ndarray) -> np.ndarray:
    return np.einsum("ijn,jn...->in...", matrices, V)


def equations(rule: Rule, h: Any, workers: tuple[int, ...] = ()) -> Equations:
    """What a rule's equations do, read off unit vectors. Of a rule that is not linear this is nothing but that.

    workers: (n,) if h has arrays [n]. Results then have that as a last axis, see `OfEach`.
    """
    k, m = 1 + len(rule.state), rule.messages
    units = np.eye(k + 1 + m)  # V, g and the pulls; every column is a unit vector
    units = np.broadcast_to(units[(...,) + (None,) * len(workers)], units.shape + workers).view(Array)
    x, *state = units[:k]
    g, pull = units[k], tuple(units[k + 1 :])
    x_new, state_new = rule.update.fn(x, g, rule.State(*state), pull, h)
    V = np.stack([value + 0.0 * x for value in (x_new, *state_new)]).view(np.ndarray)
    y = np.stack([value + 0.0 * x for value in rule.send.fn(x, g, rule.State(*state), h)]).view(np.ndarray)
    return Equations(V[:, :k], V[:, k], V[:, k + 1 :], y[:, :k], y[:, k])


class Steps:
    """A rule's equations in every step, at rate 1 and without weight decay, on a topology whose rows sum to one.

    Of most rules they are the same in all, once a first step is past. Those of a rule with `rounds` depend on whether
    the graph exchanges; where the columns do not sum to one, and the rule reads masses, each worker has its own. Both
    repeat with the graph from its second period on.

    masses: False counts all as one.
    """

    def __init__(self, rule: Rule, topology: Topology, momentum: float, hyper: dict[str, Any], masses: bool = True):
        self.rule, self.topology = rule, topology
        self.differ = masses and bool(rule.mass) and not topology.is_doubly_stochastic  # the workers
        self._varies = rule.rounds or self.differ
        self._given = momentum, hyper
        rho = topology.slowest_rho if rule.average == "neighbors" else 0.0
        self._scalars = partial(rule.scalars, 1.0, momentum, 0.0, rho, hyper, {}, topology.is_static)
        self._taken = 0
        self._h: list[Any] = []
        self._equations: dict[Any, Equations] = {}  # by step, or by the scalars where those are numbers
        for _ in range((topology.period or 0) if self._varies else 1):
            self._next()

    @property
    def plain(self) -> Steps:
        """The same with masses of one."""
        return Steps(self.rule, self.topology, *self._given, masses=False) if self.differ else self

    def _next(self) -> Any:
        k, graph = self._taken, self.topology
        self._taken += 1
        mass = (graph.mass(k), graph.mass(k + 1)) if self.differ else None
        return self._scalars(not self.rule.rounds or exchanges(graph, k), mass)

    def h(self, k: int = 0) -> Any:
        """The rule's scalars of step k; those of workers that differ are arrays [n]."""
        k = self._number(k)
        while len(self._h) <= k:
            self._h.append(self._next())
        return self._h[k]

    def at(self, k: int) -> Equations:
        h = self.h(k)
        key = self._number(k) if self.differ else h
        if key not in self._equations:
            if self.differ and self.topology.period is None:
                self._equations.clear()  # n of each, and they never come again
            of_each = (self.topology.n,) if self.differ else ()
            found = equations(self.rule, h, of_each)
            self._equations[key] = OfEach(*found) if of_each else found
        return self._equations[key]

    def _number(self, k: int) -> int:
        return (k % self.topology.period if self.topology.period else k) if self._varies else 0

    def without_gradient(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step = self.at(k)
        return step.A, step.B, step.C
