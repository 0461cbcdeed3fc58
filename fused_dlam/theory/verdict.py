"""The certificate under schemes: does disagreement die out where messages are lost or late and workers are absent?

A delay that all messages share is exact: the messages under way join the values of a worker, and the step is linear
again. Lost messages are a random graph, whose growth `spectrum.estimate` measures. Absent workers, and delays that
differ, are followed in the simulator itself, without gradients. All of these are drawn as `Simulation` draws them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..rules.rule import Rule
from ..topology import exchanges, spectrum
from ..topology.matrix import Phase, identity, sparse
from ..topology.spectrum import EXACT, EXCHANGES, LOCAL
from ..topology.topology import Topology
from .equations import Equations, Steps
from .schemes import Delay, Loss, Participation, Schemes, edges
from .simulator import Simulation
from .stability import REFUSED, asked, growth_of


class Verdict(NamedTuple):
    """`growth` is the factor by which disagreement grows per step, `error` its standard error, 0 where it is exact."""

    growth: float
    error: float

    @property
    def is_stable(self) -> bool:
        """Whether the growth is below one, an estimate by two standard errors."""
        return self.growth + 2 * self.error < REFUSED


def verdict(
    method: str | Rule,
    topology: Topology,
    momentum: float = 0.9,
    *,
    loss: Loss = 0.0,
    loss_of: str = "messages",
    participation: Participation = 1.0,
    delay: Delay = 0,
    seed: int = 0,
    **hyper,
) -> Verdict:
    """How disagreement between workers grows under the schemes of `Simulation`, gradients left out.

    Args:
        method, topology, momentum, hyper: as for `consensus_growth`, which this is without schemes.
        loss, loss_of, participation, delay, seed: as for `Simulation`. Noise changes no growth.

    An estimate follows the first 2,048 exchanges or more. It is of what workers do not share; where some are absent,
    shared momentum counts too, for only those that are present spend it, and so does the sum of a correction, unless
    the graph is symmetric, which keeps it at zero. It says nothing of where the workers' mean goes: lost messages move
    it, and what a correction (D2, tracking) loses of its sum stays as a bias.

    Raises ValueError or TypeError for bad input, and for schemes around all-reduce, as `Simulation`.
    """
    options = dict(hyper)
    rule, steps = asked("verdict", method, topology, momentum, options)
    workers = Simulation(
        rule, topology, np.zeros((topology.n, 1)), momentum, loss=loss, loss_of=loss_of, participation=participation,
        delay=delay, seed=seed, **options,
    )  # fmt: skip
    if rule.average == "gradient" or topology.n == 1:
        return Verdict(0.0, 0.0)
    schemes, memory, rows = workers.schemes, 1 / (1 - momentum), steps.topology
    if not schemes.everybody or schemes.delays.size > 1:
        return Verdict(*_followed(workers, memory)[:2])
    late = Delayed(steps, schemes.longest) if schemes.late else steps
    if not schemes.random:
        return Verdict(*growth_of(late, rows, momentum))
    return Verdict(*spectrum.estimate(Lossy(rows, schemes), rows.n, late.without_gradient, memory)[:2])


class Delayed(Steps):
    """Steps whose pulls are of the messages of d steps ago, which are values of a worker: V, y of one step ago, ...

    Step k has the matrix of step k and the rest of step k + d: the messages that W_k brings arrive d steps later.
    """

    differ = False

    def __init__(self, steps: Steps, d: int):
        self.steps, self.d = steps, d
        self.rule, self.topology = steps.rule, steps.topology

    def at(self, k: int) -> Equations:
        of = self.steps.at(k + self.d)
        return delayed(of, self.d)


def delayed(of: Equations, d: int) -> Equations:
    """[k + d m] values in the place of k."""
    k, m = of.B.shape
    A = np.zeros((k + d * m, k + d * m))
    A[:k, :k], A[k : k + m, :k] = of.A, of.C
    A[k + m :, k:-m] = np.eye((d - 1) * m)
    G, B, C = np.zeros(len(A)), np.zeros((len(A), m)), np.zeros((m, len(A)))
    G[:k], G[k : k + m], B[:k], C[:, -m:] = of.G, of.S, of.B, np.eye(m)
    return Equations(A, G, B, C, np.zeros(m))


class Lossy:
    """A step's matrix without the messages that are lost."""

    def __init__(self, topology: Topology, schemes: Schemes):
        self.topology, self.schemes = topology, schemes
        self.local = identity(topology.n)

    def __call__(self, step: int) -> Phase:
        sent = edges(self.topology.phase(step))
        if not len(sent.i):
            return self.local
        return sparse(self.topology.n, *sent.where(~self.schemes.lost(step, sent)))


def _followed(workers: Simulation, memory: float) -> spectrum.Growth:
    """By following all values, and the messages under way, through steps without gradients: `spectrum.estimate`."""
    rule, topology, schemes = workers.rule, workers.topology, workers.schemes
    keeps_sums = topology.is_symmetric and (schemes.in_pairs or not schemes.loses)
    alike = np.array([True, *(schemes.everybody or (keeps_sums and name in rule.centered) for name in rule.state)])
    draw = np.random.RandomState(np.random.Philox(key=topology.n))
    start = draw.standard_normal((len(alike), topology.n, 1))
    start[alike] -= start[alike].mean(axis=1, keepdims=True)
    start /= np.linalg.norm(start)

    def put(values: np.ndarray) -> None:
        x, *state = values.view(type(workers.x))
        workers.x, workers.state = x, rule.State(*state)

    put(start)
    sizes: list[float] = []
    path, exchanged, still = math.ceil(max(EXCHANGES, 64 * memory)), 0, 0.0 * workers.x
    while exchanged < path and len(sizes) < LOCAL * path:
        exchanged += exchanges(topology, workers.steps)
        workers.step(still, 1.0)
        V = np.stack([workers.x, *workers.state]).view(np.ndarray)
        V[alike] -= V[alike].mean(axis=1, keepdims=True)
        size = math.sqrt(np.vdot(V, V) + schemes.under_way())
        if size < EXACT:
            put(start)
            schemes.scale(0.0)
            size = 0.0
        else:
            put(V / size)
            schemes.scale(1 / size)
        sizes.append(size)
    return spectrum.measured(sizes)
