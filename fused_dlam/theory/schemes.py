"""What goes wrong between the workers of a simulation: lost messages, absent workers, late messages, noise.

W is the step's mixing matrix and y_j the message of worker j; without schemes pull_i = sum_j W_ij (y_j - y_i). All
chances are drawn from `seed` and the step alone, so a run can be repeated, and each scheme has a stream of its own: the
same messages are lost with noise and without.

    loss           pull_i = sum_j A_ij W_ij (y_j - y_i),  A_ij = 0 with the probability of loss, else 1
    participation  A_ij = m_i m_j, and m_i = 0:  x_i' = x_i, and all of i's buffers stay
    delay          pull_i at step k = sum_j W^q_ij (y^q_j - y^q_i),  q = k - d_ij;  nothing from before step 0
    noise          y_j + noise * xi_ij for y_j,  xi_ij standard normal, drawn for every message, edge, step and number

Together: A, m and W are those of the step in which a message is sent, and what arrives at a worker that is absent then
is lost. **A lost message's weight goes to the worker itself**, so rows sum to one, columns do not, and the mean of the
workers moves. With loss_of="pairs" the messages of a pair i, j are lost together: then a symmetric W stays symmetric
and keeps the mean, and so does participation. A late message is compared with the worker's own of the same step: so
workers that are equal stay equal whatever is late or lost, and a delay that all share keeps the mean too.

All messages that a method sends to one worker in one step travel as one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ..rules.scalars import among, number
from ..topology.drawn import check_seed, generator
from ..topology.matrix import Circulant, Dense, Phase, check_count, sparse
from ..topology.topology import Topology

LOSS, PARTICIPATION, NOISE = 2, 3, 4  # streams of `generator`
LONGEST_DELAY = 10**4  # steps whose messages are kept

Loss = float | Callable[[int, int, int], float]
Participation = float | Callable[[int], Any]
Delay = int | Callable[[int, int], int]


class Edges(NamedTuple):
    """Worker i[e] hears from j[e] with weight w[e]."""

    i: np.ndarray
    j: np.ndarray
    w: np.ndarray

    def where(self, kept: np.ndarray) -> Edges:
        return Edges(self.i[kept], self.j[kept], self.w[kept])


def edges(phase: Phase) -> Edges:
    """All of a matrix but its diagonal."""
    i, j = phase.heard
    if isinstance(phase, Circulant):
        return Edges(i, j, np.repeat([w for k, w in phase.weights if k and w], phase.n))
    return Edges(i, j, phase.W[i, j] if isinstance(phase, Dense) else phase.others[phase.others != 0])


class Schemes:
    """The schemes of one simulation of n workers; `Simulation` has the arguments, and the head of this file what they
    do. Raises ValueError or TypeError for bad input, here or when a user's function is asked."""

    def __init__(
        self, n: int, loss: Loss = 0.0, loss_of: str = "messages", participation: Participation = 1.0,
        delay: Delay = 0, noise: float = 0.0, seed: int = 0,
    ):  # fmt: skip
        self.n, self.seed = n, check_seed(seed)
        self.loss: Loss = loss if callable(loss) else _chance("loss", loss)
        if not among(loss_of, ("messages", "pairs")):
            raise ValueError(f"loss_of must be 'messages' or 'pairs', not {loss_of!r}")
        self.in_pairs = loss_of == "pairs"
        self.participation: Participation = participation
        if not callable(participation):
            self.participation = _chance("participation", participation)
        if self.participation == 0:
            raise ValueError("participation must be above 0: with 0 no worker takes part in any step")
        self.noise = number("noise", noise)
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be a standard deviation, at least 0 and finite, not {noise!r}")
        self.delays = _delays(delay, n)
        self.longest = int(self.delays.max(initial=0))
        self.late = self.longest > 0
        self.loses, self.everybody = self.loss != 0, self.participation == 1
        self.random = self.loses or not self.everybody
        self.sent: deque[tuple[Edges, tuple]] = deque(maxlen=self.longest + 1)  # of the last steps, newest first

    @property
    def any(self) -> bool:
        return self.random or self.late or self.noise > 0

    def present(self, step: int) -> np.ndarray | None:
        """Who takes part, bool [n]; None: everybody."""
        p = self.participation
        if self.everybody:
            return None
        if not callable(p):
            return generator(self.seed, step, PARTICIPATION).random_sample(self.n) < p
        mask = np.asarray(p(step))
        if mask.shape != (self.n,) or mask.dtype.kind not in "bi" or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"participation({step}) must return {self.n} truth values, not {mask!r}")
        return mask.astype(bool)

    def pulls(self, topology: Topology, step: int, messages: tuple, present: np.ndarray | None) -> tuple:
        """What pulls at each worker in this step, one value [n, ...] for each message. Call it once per step."""
        phase = topology.phase(step)
        if not (self.random or self.late):
            pull, arrived = tuple(phase.pull(y) for y in messages), [edges(phase)] if self.noise else []
        else:
            sent = edges(phase)
            kept = np.ones(len(sent.i), dtype=bool) if present is None else present[sent.i] & present[sent.j]
            self.sent.appendleft((sent.where(kept & ~self.lost(step, sent)), messages))
            pull, arrived = tuple(0.0 * y for y in messages), []
            for age in np.unique(self.delays):
                if age < len(self.sent):
                    of, old = self.sent[age]
                    part = of if self.delays.size == 1 else of.where(self.delays[of.i, of.j] == age)
                    W = sparse(self.n, *part)
                    pull = tuple(p + W.pull(y) for p, y in zip(pull, old, strict=True))
                    arrived.append(part)
        if self.noise:
            # A sum of independent normal draws, W_ij xi_ij over j, is one draw of the same variance.
            variance = np.zeros(self.n)
            for part in arrived:
                variance += np.bincount(part.i, part.w**2, self.n)
            scale = self.noise * np.sqrt(variance)
            draw = generator(self.seed, step, NOISE)
            pull = tuple(p + like(scale[:, None] * draw.standard_normal(tuple(p.shape)), p) for p in pull)
        return pull

    def lost(self, step: int, sent: Edges) -> np.ndarray:
        """Which of a step's messages are lost, bool [edges]."""
        if not self.loses:
            return np.zeros(len(sent.i), dtype=bool)
        draws = generator(self.seed, step, LOSS).random_sample(len(sent.i))
        if self.in_pairs:  # both of a pair get the draw of the first of them
            pair = np.minimum(sent.i, sent.j) * self.n + np.maximum(sent.i, sent.j)
            _, first, which = np.unique(pair, return_index=True, return_inverse=True)
            draws = draws[first][which]
        if not callable(self.loss):
            return draws < self.loss
        chances = []
        for j, i in zip(sent.j.tolist(), sent.i.tolist(), strict=True):
            p = self.loss(step, j, i)
            chances.append(_chance(f"loss({step}, {j}, {i})", float(p) if isinstance(p, (bool, np.bool_)) else p))
        return draws < np.array(chances)

    # -- for maps that are followed far, in verdict.py: their values are scaled, and so must be what is under way -----

    def under_way(self) -> float:
        """The sum of squares of the messages that are to arrive yet."""
        return sum(float((y**2).sum()) for _, old in list(self.sent)[: self.longest] for y in old)

    def scale(self, factor: float) -> None:
        self.sent = deque(((of, tuple(factor * y for y in old)) for of, old in self.sent), self.sent.maxlen)


def kept(present: np.ndarray, new: Any, old: Any) -> Any:
    """`new` of the workers that take part, `old` of the others."""
    if isinstance(new, torch.Tensor):
        return torch.where(torch.as_tensor(present, device=new.device)[:, None], new, old)
    return np.where(present[:, None], new, old).view(type(new))


def like(values: np.ndarray, y: Any) -> Any:
    return y.new_tensor(values) if isinstance(y, torch.Tensor) else values


def _chance(what: str, value: Any) -> float:
    chance = number(what, value)
    if not 0 <= chance <= 1:
        raise ValueError(f"{what} must be a probability, from 0 to 1, not {value!r}")
    return chance


def _delays(delay: Delay, n: int) -> np.ndarray:
    """[n, n], of i hearing from j, or [1, 1] where all are the same."""
    if not callable(delay):
        return np.array([[_steps("delay", delay)]])
    return np.array([[0 if i == j else _steps(f"delay({j}, {i})", delay(j, i)) for j in range(n)] for i in range(n)])


def _steps(what: str, value: Any) -> int:
    steps = check_count(what, value, at_least=0)
    if steps > LONGEST_DELAY:
        raise ValueError(f"{what} must be at most {LONGEST_DELAY:,} steps, not {steps}")
    return steps
