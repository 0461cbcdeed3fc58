"""All workers in one process: the rules' own equations on arrays [n, d], float64 in numpy or anything in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .. import rules
from .. import topology as topologies
from ..layers import spikes
from ..layers.layer import Layer, checked, finishing
from ..layers.old_names import from_old_names
from ..rules.jit import Array
from ..rules.rule import Rule
from ..rules.scalars import number
from ..topology.topology import Topology
from .stability import rows_for

LONGEST = 10**9  # steps


class Simulation:
    """n workers, stepped by hand: `simulation.step(g, lr)` with the gradients at `simulation.x`.

    Args:
        method: a name or a `Rule`.
        topology: a `Topology` for n workers, or a name. Where its columns sum to one, x is what push-sum calls z.
        x: the start, [n, d]: a numpy array (taken in float64), or a torch tensor (its type and device are kept).
        momentum, weight_decay: beta and lambda; may be set between steps.
        schedule: "atc", "midpoint" or "awc", see `Rule.under`; "auto" is the method's own.
        layers: what is around the rule, e.g. `[Lars(0.01, columns), SlowMo(12)]`.
        clip: "spikes" shortens gradients far longer than a worker's recent ones, see layers/spikes.py. A row of x is
            one bucket.
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
        schedule: str = "auto",
        layers: Sequence[Layer] = (),
        clip: str | None = None,
        **hyper,
    ):
        spikes.check(clip)
        layers = from_old_names(hyper, layers)
        self.rule = rules.get(method).under(schedule)
        self.rule.check_hyper(hyper)
        self.x: Any = x.clone() if isinstance(x, torch.Tensor) else reals("x", x).view(Array)
        if self.x.ndim != 2 or (isinstance(x, torch.Tensor) and not x.is_floating_point()):
            raise ValueError(f"x must be real numbers [n, d], not {self.x.dtype} of shape {tuple(self.x.shape)}")
        self.topology = topologies.get(topology, len(x))
        self._rows = rows_for(self.rule, self.topology)
        if not 0 <= number("momentum", momentum) < 1:
            raise ValueError(f"Invalid momentum value: {momentum}, must be in [0, 1)")
        if not 0 <= number("weight_decay", weight_decay) < math.inf:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        self.momentum, self.weight_decay, self.hyper = float(momentum), float(weight_decay), hyper
        self.layers = checked(layers)
        self.settings = {name: value for layer in self.layers for name, value in layer.settings.items()}
        for layer in self.layers:
            layer.check(self.settings)
        self.state = self.rule.State(*(0.0 * self.x for _ in self.rule.state))
        self.extra = [
            tuple(self.x if kind == "x" else 0.0 * self.x for kind in layer.state.values()) for layer in self.layers
        ]
        self.memory: dict[str, float] = {}
        self.clip = clip
        self.usual = torch.zeros(len(self.x), dtype=torch.float64)  # norms of gradients, see layers/spikes.py
        self.steps = 0

    def step(self, g: Any, lr: float) -> Any:
        """One step of every worker from its gradient g[i] at x[i], weight decay not included. Returns the new x."""
        lr = _checked_lr(lr)
        if not isinstance(g, torch.Tensor if isinstance(self.x, torch.Tensor) else np.ndarray):
            raise TypeError(f"g must be of the kind of x, {type(self.x).__name__}, not {type(g).__name__}")
        if g.shape != self.x.shape:
            raise ValueError(f"grad returned shape {tuple(g.shape)}, expected {tuple(self.x.shape)}")
        averaged = self.rule.average == "gradient"
        decay = self.weight_decay
        if averaged and (self.clip or finishing(self.layers, self.settings)):
            g = 0.0 * g + g.mean(0)
        if self.clip:
            g = self._shortened(g)
        for layer in self.layers:
            if layer.finishes(self.settings):
                g, decay = layer.gradient(self.x, g, decay), 0.0
        rows = self._rows
        rho, static = rows.slowest_rho, rows.is_static
        h = self.rule.scalars(lr, self.momentum, decay, rho, self.hyper, self.memory, static, self._masses())
        messages, phase = self.rule.send.fn(self.x, g, self.state, h), rows.phase(self.steps)
        pull = tuple(y.mean(0) - y if averaged else phase.pull(y) for y in messages)
        x, state = self.rule.update.fn(self.x, g, self.state, pull, h)
        self.x, self.state = x, self.rule.State(*state)
        for k, layer in enumerate(self.layers):
            self.x, self.extra[k] = layer.outer(self.x, self.extra[k], self.steps, lr, self.memory)
        self.steps += 1
        return self.x

    def _masses(self) -> tuple[Any, Any] | None:
        """The workers' masses before and after this step, [n, 1] each, for a rule that reads them."""
        if not self.rule.mass or self._rows.is_doubly_stochastic:
            return None
        w, after = (self._rows.mass(self.steps + k)[:, None] for k in (0, 1))
        return (self.x.new_tensor(w), self.x.new_tensor(after)) if isinstance(self.x, torch.Tensor) else (w, after)

    def _shortened(self, g: Any) -> Any:
        norms = (g**2).sum(-1) ** 0.5
        factor, self.usual = spikes.shorten(torch.as_tensor(norms, dtype=torch.float64, device="cpu"), self.usual)
        if isinstance(g, torch.Tensor):
            return g * factor[:, None].to(g)
        return g * factor.numpy()[:, None]


def simulate(
    method: str | Rule,
    topology: str | Topology,
    grad: Callable[[int, np.ndarray], np.ndarray],
    x0: np.ndarray,
    steps: int,
    lr: float | Callable[[int], float],
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "auto",
    **options,
) -> np.ndarray:
    """Runs a method and returns every worker's parameters after every step, float64 [steps + 1, n, d].

    Args:
        method: a name or a `Rule`.
        topology: a `Topology`, or a name (then x0 must be [n, d]).
        grad: `grad(step, x) -> [n, d]`, row i the gradient of worker i's loss at x[i].
        x0: the start, [n, d], or [d] for equal workers.
        steps: how many, 0 or more.
        lr: a number or a function of the step.
        schedule: "atc", "midpoint" or "awc", see `Rule.under`; "auto" is the method's own.
        options: layers and hyper-parameters, as for `Simulation`.

    Raises ValueError or TypeError for bad input. No certificate is asked for: unstable choices run, and overflow.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 0:
        raise ValueError(f"steps must be an integer >= 0, not {steps!r}")
    if steps > LONGEST:
        raise ValueError(f"steps must be at most {LONGEST:,}: all of them are kept")
    if not callable(grad):
        raise TypeError(f"grad must be a function of the step and of x, not {type(grad).__name__}")
    if not callable(lr):
        _checked_lr(lr)
    x = reals("x0", x0)
    if x.ndim == 1:
        if not isinstance(topology, Topology):
            raise ValueError("x0 must be [n, d] when the topology is given by name, or as a function of n")
        x = np.tile(x, (topology.n, 1))
    workers = Simulation(method, topology, x, momentum, weight_decay, schedule, **options)
    out = np.empty((steps + 1, *x.shape))
    out[0] = x
    for step in range(steps):
        g = reals("what grad returns", grad(step, workers.x.view(np.ndarray))).view(Array)
        out[step + 1] = workers.step(g, lr(step) if callable(lr) else lr)
    return out


def reals(what: str, values: Any) -> np.ndarray:
    """A copy in float64. Raises TypeError for what is no array of real numbers."""
    try:
        array = np.array(values)
    except (TypeError, ValueError) as error:  # of lists of unlike lengths, of tensors that need gradients
        raise TypeError(f"{what} must be an array of real numbers ({error})") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{what} must be an array of real numbers, not of {array.dtype.name}")
    return array.astype(np.float64)


def _checked_lr(lr: Any) -> float:
    value = number("lr", lr)
    if not 0 <= value < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}, must be at least 0 and finite")
    return value
