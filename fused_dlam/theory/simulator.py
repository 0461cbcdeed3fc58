"""All workers in one process: the rules' own equations on arrays [n, d], float64 in numpy or anything in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .. import rules
from .. import topology as topologies
from ..layers import compression, spikes
from ..layers.layer import Layer, checked, finishing
from ..layers.old_names import from_old_names
from ..rules.jit import Array
from ..rules.rule import Rule
from ..rules.scalars import number
from ..topology.topology import Topology
from .remembered import Remembered
from .schemes import Delay, Loss, Participation, Schemes, kept
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
        loss: the probability that a message is lost, or a function of (step, source, destination) that returns it (or
            whether it is lost). The weight of a lost message goes to the worker itself: pull_i = sum_j A_ij W_ij
            (y_j - y_i) with A_ij = 0 where it is lost, else 1. So the workers' mean moves.
        loss_of: "messages", each by itself, or "pairs": what i and j send each other is lost together, and a symmetric
            W stays symmetric and keeps the mean.
        participation: the probability that a worker takes part in a step, or a function of the step that returns n
            truth values m. One that does not takes no step and exchanges nothing: x_i' = x_i, buffers stay,
            A_ij = m_i m_j.
        delay: how many steps late all messages are, or a function of (source, destination), d_ij. A late message is
            compared with the own one of its time: pull_i at step k = sum_j W^q_ij (y^q_j - y^q_i) with q = k - d_ij,
            nothing from before step 0.
        noise: standard deviation of the normal noise of each message that another worker receives, independent for
            every message, step and number: y_j + noise * xi_ij for y_j.
        seed: of all these chances: one step's depend on it and the step alone.
        compress: "int8", "int4", "topk" or a codec, see layers/compression.py. A row of x is one bucket. None of the
            chances above beside it.
        hyper: the method's own: `correction_rate="auto"`, `correction_gain=10.0`, `mu`, `beta2`, `eps`.

    schemes.py says how the schemes go together. Methods that know masses take them on doubly stochastic graphs alone.
    `SlowMo` and other layers average exactly whatever the schemes are.

    Raises ValueError or TypeError for bad input; ValueError for schemes around a method that averages gradients by
    all-reduce, which sends no messages. No certificate is asked for: unstable choices run, and overflow (`verdict`
    says which).
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
        *,
        loss: Loss = 0.0,
        loss_of: str = "messages",
        participation: Participation = 1.0,
        delay: Delay = 0,
        noise: float = 0.0,
        seed: int = 0,
        compress: str | compression.Codec | None = None,
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
        self.schemes = Schemes(self.topology.n, loss, loss_of, participation, delay, noise, seed)
        codec = compression.get(compress)
        self._check_schemes(codec)
        phases = self._rows.phases
        self.remembered = None if codec is None else Remembered(codec, self.x, phases)
        self.progress = compression.progress(codec, phases)
        self.steps = 0

    def step(self, g: Any, lr: float) -> Any:
        """One step of every worker from its gradient g[i] at x[i], weight decay not included. Returns the new x."""
        lr = _checked_lr(lr)
        if not isinstance(g, torch.Tensor if isinstance(self.x, torch.Tensor) else np.ndarray):
            raise TypeError(f"g must be of the kind of x, {type(self.x).__name__}, not {type(g).__name__}")
        if g.shape != self.x.shape:
            raise ValueError(f"grad returned shape {tuple(g.shape)}, expected {tuple(self.x.shape)}")
        averaged, before = self.rule.average == "gradient", (self.x, self.state, self.usual)
        decay = self.weight_decay
        if averaged and (self.clip or finishing(self.layers, self.settings)):
            g = 0.0 * g + g.mean(0)
        if self.clip:
            g = self._shortened(g)
        for layer in self.layers:
            if layer.finishes(self.settings):
                g, decay = layer.gradient(self.x, g, decay), 0.0
        rows, step = self._rows, self.steps
        rho, static = rows.slowest_rho, rows.is_static
        if self.progress < 1:  # of a codec
            rho, static = rho**self.progress, False
        exchanging = not self.rule.rounds or topologies.exchanges(rows, step)
        h = self.rule.scalars(
            lr, self.momentum, decay, rho, self.hyper, self.memory, static, exchanging, self._masses()
        )
        messages = self.rule.send.fn(self.x, g, self.state, h)
        present = self.schemes.present(step)
        if averaged:
            pull = tuple(y.mean(0) - y for y in messages)
        elif self.remembered is not None:
            pull = tuple(self.remembered.pull(y, rows.phase(step), k) for k, y in enumerate(messages))
        else:
            pull = self.schemes.pulls(rows, step, messages, present)
        x, state = self.rule.update.fn(self.x, g, self.state, pull, h)
        self.x, self.state = x, self.rule.State(*state)
        if present is not None:
            self._stay(present, *before)
        for k, layer in enumerate(self.layers):
            self.x, self.extra[k] = layer.outer(self.x, self.extra[k], self.steps, lr, self.memory)
        self.steps += 1
        return self.x

    def _check_schemes(self, codec: compression.Codec | None) -> None:
        """Raises ValueError for what does not go with the method, with the graph or with each other."""
        if self.schemes.any and self.rule.average == "gradient":
            raise ValueError(
                f"method {self.rule.name!r} averages gradients by all-reduce, which loses and delays nothing: loss=,"
                " participation=, delay= and noise= are for methods that send messages"
            )
        if self.schemes.any and self.rule.mass and not self._rows.is_doubly_stochastic:
            raise ValueError(
                f"topology {self.topology.name!r} is not doubly stochastic, and what is lost, late or left out takes"
                f" mass with it, which method {self.rule.name!r} knows in advance: take loss=, participation=, delay="
                " and noise= on a doubly stochastic graph"
            )
        if self.schemes.any and codec is not None:
            raise ValueError(
                f"{codec} counts on every message to arrive as it was sent: leave compress= out, or loss=,"
                " participation=, delay= and noise="
            )
        if codec is not None and codec.references and self.topology.period is None:
            raise ValueError(f"{codec} remembers what was sent along every edge: it needs a graph with a period")

    def _masses(self) -> tuple[Any, Any] | None:
        """The workers' masses before and after this step, [n, 1] each, for a rule that reads them."""
        if not self.rule.mass or self._rows.is_doubly_stochastic:
            return None
        w, after = (self._rows.mass(self.steps + k)[:, None] for k in (0, 1))
        return (self.x.new_tensor(w), self.x.new_tensor(after)) if isinstance(self.x, torch.Tensor) else (w, after)

    def _stay(self, present: np.ndarray, x: Any, state: Any, usual: torch.Tensor) -> None:
        """Takes those that are absent back to before the step."""
        self.x = kept(present, self.x, x)
        self.state = self.rule.State(*(kept(present, *both) for both in zip(self.state, state, strict=True)))
        self.usual = torch.where(torch.as_tensor(present), self.usual, usual)

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
        options: layers, schemes (loss, participation, delay, noise) and hyper-parameters, as for `Simulation`.

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
