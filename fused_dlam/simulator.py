"""All workers in one process, float64: the rules' own equations on numpy arrays [n, d]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import topology as topologies
from .kernels import rules
from .kernels.rule import Rule
from .mixing import Circulant, Topology


def simulate(
    method: str | Rule,
    topology: str | Topology,
    grad: Callable[[int, np.ndarray], np.ndarray],
    x0: np.ndarray,
    steps: int,
    lr: float | Callable[[int], float],
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "atc",
    **hyper,
) -> np.ndarray:
    """Runs a method and returns every worker's parameters after every step, float64 [steps + 1, n, d].

    Args:
        method: a name or a `Rule`.
        topology: a `Topology`, or a name (then x0 must be [n, d]).
        grad: `grad(step, x) -> [n, d]`, row i the gradient of worker i's loss at x[i].
        x0: the start, [n, d], or [d] for equal workers.
        lr: a number or a function of the step.
        schedule: "atc" (adapt then combine) or "awc" (adapt while communicating).
        hyper: the method's own: `correction_rate="auto"`, `correction_gain=10.0`, `mu`.

    No certificate is asked for: unstable choices run, and overflow.
    """
    x = np.array(x0, dtype=np.float64)
    if isinstance(topology, str) and x.ndim != 2:
        raise ValueError("x0 must be [n, d] when the topology is given by name")
    top = topologies.get(topology, len(x)) if x.ndim == 2 else topologies.get(topology, topology.n)  # type: ignore
    if x.ndim == 1:
        x = np.tile(x, (top.n, 1))
    rule = rules.get(method)
    if schedule not in ("atc", "awc"):
        raise ValueError(f"schedule must be 'atc' or 'awc', not {schedule!r}")
    if schedule == "awc":
        rule = rule.adapt_while_communicating()
    rule.check_hyper(hyper)
    memory: dict[str, float] = {}
    state = rule.State(*(np.zeros_like(x) for _ in rule.state))
    out = np.empty((steps + 1, *x.shape))
    out[0] = x
    for step in range(steps):
        h = rule.scalars(lr(step) if callable(lr) else lr, momentum, weight_decay, top.slowest_rho, hyper, memory)
        g = np.asarray(grad(step, x), dtype=np.float64)
        if g.shape != x.shape:
            raise ValueError(f"grad returned shape {g.shape}, expected {x.shape}")
        messages = rule.send.fn(x, g, state, h)
        if rule.average == "gradient":
            pull = tuple(y.mean(axis=0) - y for y in messages)
        else:
            pull = tuple(_pull(top, step, y) for y in messages)
        x, s = rule.update.fn(x, g, state, pull, h)
        state = rule.State(*s)
        out[step + 1] = x
    return out


def _pull(topology: Topology, step: int, y: np.ndarray) -> np.ndarray:
    """sum_j W[i, j] (y_j - y_i)."""
    phase = topology.phases[step % topology.period]
    if isinstance(phase, Circulant):
        return sum((w * (np.roll(y, k, axis=0) - y) for k, w in phase.weights if k), np.zeros_like(y))
    others = phase - np.diag(np.diag(phase))
    y = y - y[0]  # pulls between equal messages are exactly zero
    return others @ y - others.sum(axis=1, keepdims=True) * y
