"""The certificate: does disagreement between workers die out under a method, on a topology, at a momentum?

With zero gradient a rule's equations are a linear map of all workers' (x, state). The disagreement is everything but
what all workers share. Its growth per step is the map's spectral radius over one period of the topology; where the
graph is drawn anew at every step it is an estimate of exp(largest Lyapunov exponent). Below one, workers forget the
disagreement that data and rounding stir up. Above one it overflows, whatever the learning rate.

Where workers have masses (topology/mass.py) the map is that of x / w, and each worker has scalars of its own in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import rules
from ..rules.rule import Rule
from ..rules.scalars import number
from ..topology import spectrum
from ..topology.matrix import Circulant, Phase
from ..topology.topology import Topology
from .equations import Steps

REFUSED = 1 - 1e-9  # a method is refused from this growth on

Growth = Callable[[np.ndarray], np.ndarray]  # per step, at each of several values of lr * curvature


def consensus_growth(method: str | Rule, topology: Topology, momentum: float = 0.9, **hyper) -> float:
    """The factor by which disagreement between workers grows per step, gradients left out. Stable: below 1.

    Args:
        method: a name or a `Rule`. The growth is computed from its equations, which must be linear in x and state.
        topology: a `Topology`, e.g. `fused_dlam.topology.exponential(8)`.
        momentum: beta.
        hyper: the method's own hyper-parameters, e.g. `correction_rate`, `correction_gain`, `mu`; and
            `schedule="atc"`, `"midpoint"` or `"awc"`, else the method's own.

    Methods that average gradients exactly keep equal workers equal: 0. Circulant topologies are decomposed into
    Fourier modes (65,536 workers take seconds), a single matrix into its eigenvalues. Otherwise the whole map is
    formed, [k n, k n] with k = 1 + the number of state buffers. For random graphs it is an estimate: see `growth`.
    """
    return growth(method, topology, momentum, **hyper)[0]


def growth(method: str | Rule, topology: Topology, momentum: float = 0.9, **hyper) -> tuple[float, float]:
    """`consensus_growth` and its standard error, which is 0 where the matrices repeat.

    On a random graph it is exp(largest Lyapunov exponent), measured along the first 2,048 exchanges or more. These are
    the exchanges that training makes, so the estimate is the same on every rank up to rounding.
    """
    rule, steps = asked("consensus_growth", method, topology, momentum, hyper)
    if rule.average == "gradient" or topology.n == 1:
        return 0.0, 0.0
    return growth_of(steps, steps.topology, momentum)


def growth_of(steps: Steps, topology: Topology, momentum: float) -> tuple[float, float]:
    """(growth, standard error) of what the workers do not share, for any linear steps."""
    if topology.period is None:
        # With masses too, as if they were one. Of the methods here that is exact: without gradients m and y do not hear
        # x, so the exponents are those of R on x, of A on y, and beta. A = diag(w') R diag(1/w) is R in other
        # coordinates, and w stays between bounds.
        return spectrum.estimate(topology.phase, topology.n, steps.plain.without_gradient, 1 / (1 - momentum))[:2]
    modes, alike = None if steps.differ else half_of_modes(topology), np.ones(topology.n)
    # Equal buffers with unlike masses do not stay equal. x does, and what sums to zero keeps its sum.
    centered = [name in steps.rule.centered for name in steps.rule.state]
    apart = [True, *centered] if steps.differ else [True] * len(steps.at(0).A)
    ours: Growth = Map(steps, topology, alike, apart) if modes is None else partial(of_modes, steps, modes)
    return float(ours(np.zeros(1))[0]), 0.0


def asked(caller: str, method: str | Rule, topology: Topology, momentum: float, hyper: dict[str, Any]) -> tuple:
    """(the rule, its steps at rate 1), after a check of everything that a user gave."""
    if not isinstance(topology, Topology):
        raise TypeError(f"{caller} needs a Topology, e.g. fused_dlam.topology.ring(8), not a name")
    rule = rules.get(method).under(hyper.pop("schedule", "auto"))
    rule.check_hyper(hyper, ("schedule", "topology"))
    if not 0 <= number("momentum", momentum) < 1:
        raise ValueError(f"Invalid momentum value: {momentum}, must be in [0, 1)")
    return rule, Steps(rule, rows_for(rule, topology), momentum, hyper)


def rows_for(rule: Rule, topology: Topology) -> Topology:
    """The topology on which a rule averages: rows that sum to one.

    Raises ValueError for one whose columns alone sum to one, if the rule knows no masses.
    """
    if topology.sums == "columns" and not (rule.mass or topology.is_doubly_stochastic or rule.average == "gradient"):
        raise ValueError(
            f"the columns of topology {topology.name!r} sum to one and its rows do not, and method {rule.name!r} would"
            " lose what a worker sends. 'push-sum' divides by the masses; 'push-diging' and 'push-pull' do, and track"
            " the mean gradient"
        )
    return topology.as_rows


def is_stable(method: str | Rule, topology: Topology, momentum: float, **hyper) -> bool:
    """Whether the growth is below one. An estimate must be below by two standard errors."""
    factor, error = growth(method, topology, momentum, **hyper)
    return factor + 2 * error < REFUSED


def remedies(rule: Rule, topology: Topology, momentum: float, factor: float, error: float = 0.0, **hyper) -> str:
    """What to tell a user whose choice is unstable. Every remedy is tried before it is named.

    factor, error: the growth and its standard error, as from `growth`.
    """
    found = []
    schedule = "awc" if rule.schedule == "awc" else "auto"
    for ours in (rules.mi_dmsgd, rules.pc_dmsgd):
        if (
            topology.sums == "rows"
            and rule.name != ours.name
            and is_stable(ours, topology, momentum, schedule=schedule)
        ):
            found.append(f"method={ours.name!r}, which is stable here")
            break
    symmetric = topology.symmetrize() if topology.is_doubly_stochastic and not topology.is_symmetric else None
    if symmetric is not None and is_stable(rule, symmetric, momentum, **hyper):
        found.append("a symmetric graph such as 'symmetric-exponential' or topology.symmetrize()")
    if is_stable(rule, topology.lazy(), momentum, **hyper):
        found.append("the lazy graph, topology.lazy()")
    smaller = next((b for b in np.arange(round(momentum, 2), 0, -0.05) if b < momentum
                    and is_stable(rule, topology, float(b), **hyper)), None)  # fmt: skip
    if smaller is not None:
        found.append(f"momentum={smaller:.2f} or less")
    estimated = ""
    if topology.period is None:
        estimated = f" (an estimate, +- {error:.4f}, for the graph is random; two errors are added)"
    return (
        f"method {rule.name!r} is unstable on {topology.name!r} with {topology.n} workers at momentum {momentum:g}:"
        f" disagreement between workers would grow {factor:.4f}-fold per step{estimated}. What would work: "
        + ("; ".join(found) if found else "nothing we know of")
        + ". (allow_unstable=True overrides this.)"
    )


# -- the growth per step at each of several rates a, on quadratics; a = 0 is without gradients -------------------------


def half_of_modes(topology: Topology) -> np.ndarray | None:
    """`topology.modes`, without those that are the complex conjugates of others."""
    modes = topology.modes
    if modes is not None and all(isinstance(phase, Circulant) for phase in topology.phases):
        return modes[:, : topology.n // 2]
    return modes


def of_each_mode(steps: Steps, modes: np.ndarray, a: np.ndarray) -> np.ndarray:
    """[modes, rates], for equal curvature 1, when every phase acts on a mode as a number, `modes` [period, modes].

    Computed in chunks of modes, because 65,536 workers times 16 phases would take 0.5 GB at once.
    """
    k, period, parts = len(steps.at(0).A), len(modes), []
    for chunk in np.array_split(modes, math.ceil(modes.shape[1] * len(a) / 8192), axis=1):
        shape = (k, k, chunk.shape[1], len(a))
        V = np.broadcast_to(np.eye(k, dtype=chunk.dtype)[..., None, None], shape)
        log_scale = np.zeros(shape[2:])
        for t, factor in enumerate(chunk[..., None] - 1):
            V = steps.at(t).step(V, a, partial(np.multiply, factor))
            V, log_scale = _scaled(V, log_scale)
        parts.append(_root(np.moveaxis(V, (0, 1), (-2, -1)), log_scale, period))
    return np.concatenate(parts)


def of_modes(steps: Steps, modes: np.ndarray, a: np.ndarray) -> np.ndarray:
    return of_each_mode(steps, modes, a).max(axis=0)


class Map:
    """For curvatures h: by eigenvalues of the map of all workers' values over a period.

    zero_mean: the values of V whose mean over the workers is left out. With equal curvature these may be all.
    """

    def __init__(self, steps: Steps, topology: Topology, h: np.ndarray, zero_mean: list[bool]):
        self.steps, self.phases, self.h, n = steps, topology.phases, h[:, None, None], topology.n
        # Q is an orthonormal basis of the vectors that sum to zero. Rows of W sum to one, so values that are equal on
        # all workers stay equal, and the map of the rest is that of what differs, whatever the columns sum to.
        Q = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, : n - 1]]))[0][:, 1:]
        self.bases, self.zero_mean = [Q if zero else np.eye(n) for zero in zero_mean], np.array(zero_mean)
        self.rows = sum(basis.shape[1] for basis in self.bases)
        self.at_once = int(np.clip(2_000_000 // (self.rows * n * len(zero_mean)), 2, 32))

    def __call__(self, a: np.ndarray) -> np.ndarray:
        k, n = len(self.bases), len(self.h)
        V, column = np.zeros((k, n, self.rows, len(a))), 0
        for value, basis in zip(V, self.bases, strict=True):
            value[:, column : column + basis.shape[1]] = basis[..., None]
            column += basis.shape[1]
        log_scale = np.zeros(len(a))
        for t, phase in enumerate(self.phases):
            V = self.steps.at(t).step(V, self.h * a, partial(pulls, phase))
            # Rounding brings the mean back. It does not shrink as the rest does, which it would swamp in 1,000 steps.
            V[self.zero_mean] -= V[self.zero_mean].mean(axis=1, keepdims=True)
            V, log_scale = _scaled(V, log_scale)
        maps = np.concatenate([np.tensordot(basis.T, v, 1) for basis, v in zip(self.bases, V, strict=True)])
        return _root(np.moveaxis(maps, -1, 0), log_scale, len(self.phases))


def pulls(phase: Phase, messages: np.ndarray) -> np.ndarray:
    return np.stack([phase.pull(y) for y in messages])


def _scaled(V: np.ndarray, log_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V with largest entries of one: long periods neither overflow nor vanish. The last axes are those of log_scale."""
    scale = abs(V).max(axis=tuple(range(V.ndim - log_scale.ndim)))
    scale[scale == 0] = 1.0
    return V / scale, log_scale + np.log(scale)


def _root(maps: np.ndarray, log_scale: np.ndarray, period: int) -> np.ndarray:
    """The spectral radii per step of maps over a period, [..., rows, rows]."""
    radius = abs(np.linalg.eigvals(maps)).max(axis=-1)
    with np.errstate(divide="ignore"):
        return np.exp((np.log(radius) + log_scale) / period)
