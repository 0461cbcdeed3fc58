"""All workers in one process: the rules' own equations on arrays [n, d], float64 in numpy or anything in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import rules
from .. import topology as topologies
from ..layers.lars import Lars
from ..layers.slowmo import SlowMo
from ..rules.jit import Array
from ..rules.rule import Rule
from ..topology.topology import Topology


class Simulation:
    """n workers, stepped by hand: `simulation.step(g, lr)` with the gradients at `simulation.x`.

    Args:
        method: a name or a `Rule`.
        topology: a `Topology` for n workers, or a name.
        x: the start, [n, d]: a numpy array (taken in float64), or a torch tensor (its type and device are kept).
        momentum, weight_decay: beta and lambda; may be set between steps.
        schedule: "atc" (adapt then combine) or "awc" (adapt while communicating).
        lars, slowmo: layers around the rule.
        hyper: the method's own: `correction_rate="auto"`, `correction_gain=10.0`, `mu`, `beta2`, `eps`.

    Raises ValueError or TypeError for bad input. No certificate is asked for: unstable choices run, and overflow.
    """

    def __init__(
        self,
        method: str | Rule,
        topology: str | Topology,
        x: Any,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: str = "atc",
        lars: Lars | None = None,
        slowmo: SlowMo | None = None,
        **hyper,
    ):
        if schedule not in ("atc", "awc"):
            raise ValueError(f"schedule must be 'atc' or 'awc', not {schedule!r}")
        rule = rules.get(method)
        self.rule = rule.adapt_while_communicating() if schedule == "awc" else rule
        self.rule.check_hyper(hyper)
        self.x: Any = x.clone() if isinstance(x, torch.Tensor) else np.array(x, dtype=np.float64).view(Array)
        self.topology = topologies.get(topology, len(x))
        self.momentum, self.weight_decay, self.hyper = momentum, weight_decay, hyper
        self.lars, self.slowmo = lars, slowmo
        self.state = self.rule.State(*(0.0 * self.x for _ in self.rule.state))
        self.slow = (self.x, 0.0 * self.x)  # x_0 and u of SlowMo
        self.memory: dict[str, float] = {}
        self.steps = 0

    def step(self, g: Any, lr: float) -> Any:
        """One step of every worker from its gradient g[i] at x[i], weight decay not included. Returns the new x."""
        if g.shape != self.x.shape:
            raise ValueError(f"grad returned shape {tuple(g.shape)}, expected {tuple(self.x.shape)}")
        averaged = self.rule.average == "gradient"
        decay = self.weight_decay
        if self.lars is not None:
            if averaged:
                g = 0.0 * g + g.mean(0)
            g, decay = self.lars(self.x, g, decay), 0.0
        rho = self.topology.slowest_rho
        h = self.rule.scalars(lr, self.momentum, decay, rho, self.hyper, self.memory)
        messages, phase = self.rule.send.fn(self.x, g, self.state, h), self.topology.phase(self.steps)
        pull = tuple(y.mean(0) - y if averaged else phase.pull(y) for y in messages)
        x, state = self.rule.update.fn(self.x, g, self.state, pull, h)
        self.x, self.state = x, self.rule.State(*state)
        if self.slowmo is not None:
            inverse = rules.inverse_lr({"lr": lr}, self.memory)
            if self.slowmo.due(self.steps):
                mean = 0.0 * self.x + self.x.mean(0)
                self.x, u = self.slowmo(mean, *self.slow, lr, inverse)
                self.slow = (self.x, u)
        self.steps += 1
        return self.x


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
    **options,
) -> np.ndarray:
    """Runs a method and returns every worker's parameters after every step, float64 [steps + 1, n, d].

    Args:
        method: a name or a `Rule`.
        topology: a `Topology`, or a name (then x0 must be [n, d]).
        grad: `grad(step, x) -> [n, d]`, row i the gradient of worker i's loss at x[i].
        x0: the start, [n, d], or [d] for equal workers.
        lr: a number or a function of the step.
        schedule: "atc" (adapt then combine) or "awc" (adapt while communicating).
        options: layers and hyper-parameters, as for `Simulation`.

    No certificate is asked for: unstable choices run, and overflow.
    """
    x = np.array(x0, dtype=np.float64)
    if x.ndim == 1:
        if isinstance(topology, str):
            raise ValueError("x0 must be [n, d] when the topology is given by name")
        x = np.tile(x, (topology.n, 1))
    workers = Simulation(method, topology, x, momentum, weight_decay, schedule, **options)
    out = np.empty((steps + 1, *x.shape))
    out[0] = x
    for step in range(steps):
        g = np.asarray(grad(step, workers.x.view(np.ndarray)), dtype=np.float64).view(Array)
        out[step + 1] = workers.step(g, lr(step) if callable(lr) else lr)
    return out
