"""The second certificate: up to which learning rate do all workers together stay stable?

On quadratics, f_i(x) = h_i x^2 / 2, a linear rule's step with g = h x is a linear map of all workers' (x, state) that
depends on the learning rate through lr * h alone. Its growth per step is followed upwards from small rates, to the
first that is above one. The first certificate, in stability.py, is this map at rate 0, without the workers' mean.

With equal curvature the mean takes steps in which nobody pulls, so all-reduce's limit counts for every method. With
unlike curvature disagreement moves the mean, and the map is taken whole; so it is where workers have masses, for a step
is divided by the worker's own: its curvature counts as h_i / w_i. Either way a buffer whose mean over the
workers is zero, such as an integral of pulls, has no mean in the map: it would be a growth of exactly one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from ..rules.jit import Array
from ..rules.rule import Rule
from ..rules.scalars import number
from ..topology.matrix import identity
from ..topology.spectrum import EXACT, EXCHANGES, LOCAL, PARTS
from ..topology.topology import Topology
from .equations import Equations, Steps
from .stability import Growth, Map, asked, half_of_modes, of_each_mode, of_modes, pulls

GROWS = 1 + 1e-9  # more than the rounding of an eigenvalue; what grows by less takes 1e8 steps for a tenth
PRECISION = 2e-4  # of a limit, relative
LARGEST_MAP = 600  # rows of the largest map whose eigenvalues are taken: 0.2 s for each rate
FEW_ROWS = 64  # of a map whose growth is cheap enough for rates that are close
MANY_MODES = 300  # from here on all modes are tried at these shares of the limit alone, and at all rates the worst
SHARES = np.array([0, 1e-3, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 1 - PRECISION])
WORST = 24  # modes, at each share


def rate_limit(
    method: str | Rule,
    topology: Topology,
    momentum: float = 0.9,
    curvature: Sequence[float] | None = None,
    **hyper,
) -> float:
    """The largest learning rate times curvature up to which every smaller one is stable too, on quadratics.

    For a loss whose largest curvature (eigenvalue of the Hessian) is h, learning rates below limit / h are stable.
    All-reduce momentum SGD has 2 (1 + beta), and Nesterov's form 2 (1 + beta) / (1 + 2 beta).

    Args:
        method: a name or a `Rule`. Its equations must be linear in x, gradient and state.
        topology: a `Topology`, e.g. `fused_dlam.topology.exponential(8)`. It may have one worker.
        momentum: beta.
        curvature: None for equal curvature on all workers; the result is then lr * h, a pure number. Or the workers'
            curvatures h_1, ..., h_n, at least 0; the result is then the largest lr, in units of 1 / h. So `[2.0] * n`
            gives half of what None gives.
        hyper: the method's own hyper-parameters, and `schedule`, as for `consensus_growth`.

    The rate is constant; weight decay counts as curvature. The limit is 0.0 for a method whose disagreement grows
    without any gradient, and infinite where nothing ever grows, as without any curvature. Where gradients are averaged
    equal workers stay equal, so their mean curvature decides.

    The figure is at most 3e-4 too small, relatively, where eigenvalues can be taken: for equal curvature on graphs
    with common eigenvectors (65,536 workers take seconds), else up to 600 rows, k n with k = 1 + the number of state
    buffers. Others are followed along 2,048 exchanges or more, and must shrink by two standard errors. Rates are tried
    every 2 % (maps of more than 64 rows, and followed ones: 6 %); in between, where the slopes allow a growth.

    Raises TypeError or ValueError for bad input, and ValueError for a rule that is not linear, such as Adam.
    """
    rule, steps = asked("rate_limit", method, topology, momentum, hyper)
    topology = steps.topology
    _check_linear(rule, steps.plain.h(), steps.plain.at(0))
    n, h = topology.n, _curvatures(curvature, topology.n)
    kept = [k for k, name in enumerate(("x", *rule.state)) if name not in rule.centered]
    mean = _first(partial(_of_mean, steps.plain, kept), np.geomspace(1e-4, 1e4, 320), math.inf, precision=1e-9)
    if rule.average == "gradient" or n == 1:
        return mean / float(h.mean()) if h.any() else math.inf

    memory = 1 / (1 - momentum)
    if steps.differ:
        return _limit_with_masses(steps, h, mean, memory)
    modes, all_values = half_of_modes(topology), [True] * (1 + len(rule.state))
    apart: Growth = (  # of disagreement, for curvature 1
        _whole(steps, topology, np.ones(n), all_values, memory) if modes is None else partial(of_modes, steps, modes)
    )
    if 0 < h.min() == h.max():
        limit = _first(apart, _grid(mean, apart), mean) if modes is None else _limit_of_modes(steps, modes, mean)
        return limit / float(h[0])
    if apart(np.zeros(1))[0] > GROWS:
        return 0.0
    if not h.any():
        return math.inf
    centered = [name in rule.centered and topology.is_doubly_stochastic for name in ("x", *rule.state)]
    unit = (mean if 0 < mean < math.inf else 1.0) / float(h.mean())
    low, high = 1e-3 * unit * float(h.mean() / h.max()), 100 * unit
    growth = _whole(steps, topology, h, centered, memory)
    return _first(growth, np.geomspace(low, high, math.ceil(math.log(high / low) / _spacing(growth))), math.inf)


def _limit_with_masses(steps: Steps, h: np.ndarray, mean: float, memory: float) -> float:
    """Where workers have masses. What a rule centers sums to zero all the same: A keeps sums."""
    topology, centered = steps.topology, [name in steps.rule.centered for name in steps.rule.state]
    if _whole(steps, topology, h, [True, *centered], memory)(np.zeros(1))[0] > GROWS:
        return 0.0
    if not h.any():
        return math.inf
    growth = _whole(steps, topology, h, [False, *centered], memory)
    smallest = min(float(topology.mass(t).min()) for t in range(len(topology.phases)))
    unit = mean if 0 < mean < math.inf else 1.0
    low, high = 1e-3 * unit * min(1.0, smallest) / float(h.max()), 100 * unit / float(h.mean())
    return _first(growth, np.geomspace(low, high, math.ceil(math.log(high / low) / _spacing(growth))), math.inf)


def _curvatures(curvature: Sequence[float] | None, n: int) -> np.ndarray:
    if curvature is not None and np.ndim(curvature) != 1:
        raise TypeError(f"curvature must be None or a sequence of {n} numbers, not {curvature!r}")
    h = np.array([1.0] * n if curvature is None else [number("a curvature", value) for value in curvature])
    if len(h) != n:
        raise ValueError(f"curvature has {len(h)} values, but there are {n} workers")
    if not (np.isfinite(h).all() and h.min() >= 0):
        raise ValueError(f"curvatures must be finite and at least 0, not {h[~((h >= 0) & (h < math.inf))][0]:g}")
    return h


def _check_linear(rule: Rule, scalars, step: Equations) -> None:
    """Raises ValueError unless the equations are what they are on unit vectors."""
    k, m = len(step.A), len(step.S)
    values = np.random.default_rng(0).standard_normal((k + 1 + m, 8)).view(Array)
    (x, *state), g, pull = values[:k], values[k], values[k + 1 :]
    with np.errstate(all="ignore"):
        x_new, state_new = rule.update.fn(x, g, rule.State(*state), tuple(pull), scalars)
        result = np.stack([*np.broadcast_arrays(x_new, *state_new, *rule.send.fn(x, g, rule.State(*state), scalars))])
    matrix = np.block([[step.A, step.G[:, None], step.B], [step.C, step.S[:, None], np.zeros((m, m))]])
    if not np.allclose(result, matrix @ values, rtol=1e-9, atol=1e-9):
        raise ValueError(f"method {rule.name!r} is not linear in x, gradient and state: it has no such limit")


# -- the first rate at which something grows ---------------------------------------------------------------------------


def _spacing(growth: Growth) -> float:
    """Between two rates, relative. Methods may be unstable in a narrow window of rates: PC-DmSGD on a random graph of 9
    with curvatures from 0.09 to 29 was in one of 3.5 %, while a slow mode's growth of 0.9999 showed nothing near it.
    """
    return 0.02 if isinstance(growth, Map) and growth.rows <= FEW_ROWS else 0.06


def _grid(end: float, growth: Growth | None = None) -> np.ndarray:
    """Rate 0, and rates from end / 1000 to end."""
    spacing = 0.02 if growth is None else _spacing(growth)
    low = np.geomspace(1e-3, 0.5, math.ceil(math.log(500) / spacing))
    return np.concatenate([[0.0], low[:-1], np.linspace(0.5, 1 - PRECISION, math.ceil(1 / spacing))]) * min(end, 1e4)


def _first(growth: Growth, grid: np.ndarray, end: float, precision: float = PRECISION) -> float:
    """The largest rate up to which nothing grows at any rate of the grid, or where between two it seems to; else end.

    The grid is taken in parts, for large rates need not be tried where smaller ones are unstable.
    """
    at_once = getattr(growth, "at_once", len(grid))
    a = g = np.empty(0)
    for part in np.array_split(grid, math.ceil(len(grid) / at_once)):
        a, g = np.append(a[-2:], part), np.append(g[-2:], growth(part))
        between = _suspects(a, g)
        if between.size:
            order = np.argsort(a := np.append(a, between))
            a, g = a[order], np.append(g, growth(between))[order]
        unstable = np.flatnonzero(g > GROWS)
        if unstable.size:
            first = unstable[0]
            low = float(a[first - 1]) if first else 0.0
            return _refined(growth, low, float(a[first]), getattr(growth, "precision", precision))
    return end


def _suspects(a: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Rates between two stable ones, where g would be above one if it went on as before them or as after them."""
    rise = np.diff(g)
    before, after = np.append(0.0, rise[:-1]), np.append(rise[1:], 0.0)
    hidden = np.maximum(g[:-1] + before, g[1:] - after) > GROWS
    stable = (g[:-1] <= GROWS) & (g[1:] <= GROWS)
    inside = [np.linspace(a[i], a[i + 1], 10)[1:-1] for i in np.flatnonzero(hidden & stable)]
    return np.concatenate(inside) if inside else np.empty(0)


def _refined(growth: Growth, low: float, high: float, precision: float) -> float:
    """The first rate that grows lies above low, which is stable, and not above high, which is not. Returns low then."""
    smallest, count = 1e-9 * high, getattr(growth, "at_once", 16) // 2
    while high - low > precision * high:
        a = np.linspace(low, high, count + 2)[1:-1]
        unstable = np.flatnonzero(growth(a) > GROWS)
        first = unstable[0] if unstable.size else count
        low, high = float(a[first - 1]) if first else low, float(a[first]) if first < count else high
        if high < smallest:
            return 0.0
    return low


# -- the growth per step, by the ways that stability.py does not have --------------------------------------------------


def _of_mean(steps: Steps, kept: list[int], a: np.ndarray) -> np.ndarray:
    """Of the workers' mean, where nobody pulls. kept: the values whose mean is not zero by definition."""
    product, period = np.eye(len(kept)), (steps.topology.period or 1) if steps.rule.rounds else 1
    for t in range(period):
        step = steps.at(t)
        maps = np.repeat(step.A[None], len(a), axis=0)
        maps[:, :, 0] += a[:, None] * step.G
        product = maps[:, kept][:, :, kept] @ product
    return abs(np.linalg.eigvals(product)).max(axis=1) ** (1 / period)


def _limit_of_modes(steps: Steps, modes: np.ndarray, end: float) -> float:
    """The limit of all modes. Of many, most are tried at `SHARES` of the limit, until none grows below it."""
    grid, count = _grid(end), modes.shape[1]
    if count <= MANY_MODES:
        return _first(partial(of_modes, steps, modes), grid, end)
    followed, limit = np.linspace(0, count - 1, 64).astype(int), end
    while True:
        rates = SHARES * min(limit, 1e4)
        growths = of_each_mode(steps, modes, rates)
        followed = np.union1d(followed, np.argpartition(-growths, WORST, axis=0)[:WORST])
        grid = np.union1d(grid, rates)
        limit = _first(partial(of_modes, steps, modes[:, followed]), grid, end)
        if limit == 0 or growths.max() <= GROWS:
            return limit


def _whole(steps: Steps, topology: Topology, h: np.ndarray, zero_mean: list[bool], memory: float) -> Growth:
    """The growth of all workers' values. zero_mean: the values whose mean over the workers is left out."""
    rows = len(zero_mean) * topology.n - sum(zero_mean)
    return (
        Followed(steps, topology, h, zero_mean, memory)
        if topology.period is None or rows > LARGEST_MAP
        else Map(steps, topology, h, zero_mean)
    )


class Followed:
    """By following one vector along the steps that training takes: `spectrum.estimate`, for several rates at once.

    The result is the growth plus two standard errors. It is 0 where what is followed vanishes, sooner or later.
    """

    at_once = 128  # a whole grid: the steps take nearly the same time for few rates and for many
    precision = 1e-3

    def __init__(self, steps: Steps, topology: Topology, h: np.ndarray, zero_mean: list[bool], memory: float):
        self.steps, self.topology, self.h, self.zero_mean = steps, topology, h, np.array(zero_mean)
        self.path = math.ceil(max(EXCHANGES, 64 * memory))
        start = np.random.RandomState(np.random.Philox(key=topology.n)).standard_normal((len(zero_mean), topology.n, 1))
        self.start = self._normalized(start)[0]

    def __call__(self, a: np.ndarray) -> np.ndarray:
        curvature, local = self.h[:, None] * a, identity(self.topology.n)
        V = np.repeat(self.start, len(a), axis=2)
        sizes: list[np.ndarray] = []
        exchanges = 0
        while exchanges < self.path and len(sizes) < LOCAL * self.path:
            phase = self.topology.phase(len(sizes))
            alone = phase == local
            V = self.steps.at(len(sizes)).step(V, curvature, np.zeros_like if alone else partial(pulls, phase))
            V, size = self._normalized(V)
            exchanges += not alone
            if size.min() < EXACT:
                V, size = np.where(size < EXACT, self.start, V), np.where(size < EXACT, 0.0, size)
            sizes.append(size)
        logs = np.log(np.maximum(sizes, EXACT))
        traveled = logs[len(logs) // 4 :].cumsum(axis=0)
        scatter = np.std([_slope(part) for part in np.array_split(traveled, PARTS)], axis=0, ddof=1) / math.sqrt(PARTS)
        first, second = (_slope(half) for half in np.array_split(traveled, 2))
        growth = np.exp(_slope(traveled)) * (1 + 2 * np.maximum(scatter, abs(second - first) / 2))
        return np.where(np.min(sizes, axis=0) == 0, 0.0, growth)

    def _normalized(self, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        V[self.zero_mean] -= V[self.zero_mean].mean(axis=1, keepdims=True)
        size = np.sqrt((V * V).sum(axis=(0, 1)))
        return V / np.where(size > 0, size, 1.0), size


def _slope(traveled: np.ndarray) -> np.ndarray:
    """By least squares along the first axis."""
    step = np.arange(len(traveled)) - (len(traveled) - 1) / 2
    return step @ traveled / (step @ step)
