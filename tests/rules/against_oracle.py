"""What the tests of this folder share: learning-rate schedules, mixing matrices, and the comparison with oracle.py."""

import functools
import math
import warnings

import numpy as np
import oracle

from fused_dlam import Topology, rules, simulate, topology

STEPS, LR = 200, 0.02
METHODS = list(rules.ALL)
AWC = [m for m in METHODS if m not in oracle.ONLY_ATC and "awc" not in m]
VARIANTS = [(m, "awc" if "awc" in m else "atc") for m in METHODS]
VARIANTS += [(m, s) for m in AWC for s in ("midpoint", "awc")]

LRS = {
    "constant": lambda k: LR,
    "step": lambda k: LR * (1, 0.1)[k >= 100],
    "cosine to zero": lambda k: LR * (1 + math.cos(math.pi * k / (STEPS - 1))) / 2,
    "warm-up from zero": lambda k: LR * min(1, k / 20),
    "zero in the middle": lambda k: 0.0 if 80 <= k < 90 else LR,
}


def everything(k):
    """Warm-up from zero, a constant rate, a step, exactly zero, a restart, a tiny rate, a restart, a cosine to zero."""
    if k < 120:
        return LR * (min(1, k / 12), 1, 0.1, 0.0, 1, 1e-6)[k // 20]
    return LR * (1 + math.cos(math.pi * (k - 120) / (STEPS - 1 - 120))) / 2


def family(sizes):
    return [(name, n) for name in topology.FAMILY for n in sizes if "hypercube" not in name or n & (n - 1) == 0]


def doubly_stochastic(n, period, seed=0):
    """Random, directed, time-varying: convex combinations of four permutations."""
    rng = np.random.default_rng(seed)
    phases = [sum(w * np.eye(n)[rng.permutation(n)] for w in rng.dirichlet(np.ones(4))) for _ in range(period)]
    return Topology(phases, "random doubly stochastic")


def row_stochastic(n, period, seed=0):
    """Random, directed, time-varying, sparse; the columns do not sum to one."""
    rng = np.random.default_rng(seed)
    cycle = np.roll(np.eye(n), 1, axis=0)  # keeps it connected
    W = rng.random((period, n, n)) * (rng.random((period, n, n)) < 0.3) + np.eye(n) + cycle
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Topology(W / W.sum(axis=2, keepdims=True), "random row stochastic")


def column_stochastic(n, period, seed=0):
    """Random, directed, time-varying, sparse; the rows do not sum to one."""
    phases = [row_stochastic(n, 1, seed + k).weights().T for k in range(period)]
    return Topology(phases, "random column stochastic", sums="columns")


def matrices(top):
    return functools.cache(top.weights)


def pushed(top):
    """(A, w): matrices whose columns sum to one, and the masses before the first step. Where rows sum to one these are
    A = diag(w') W diag(1/w), with the w of all steps for which w' W = w. Found here by eigenvectors."""
    matrix, period = matrices(top), top.period
    if period is None:
        return matrix, np.ones(top.n)

    def perron(steps):
        product = np.linalg.multi_dot([np.eye(top.n), *(matrix(k) for k in reversed(steps)), np.eye(top.n)])
        values, vectors = np.linalg.eig(product if top.sums == "columns" else product.T)
        w = vectors[:, abs(values - 1).argmin()].real
        return w * top.n / w.sum()

    if top.sums == "columns" or np.allclose(sum(matrix(k).sum(0) for k in range(period)), period):
        return matrix, perron(range(period))
    w = [perron(range(k, k + period)) for k in range(period)]
    rows = [np.diag(w[(k + 1) % period]) @ matrix(k) @ np.diag(1 / w[k]) for k in range(period)]
    return lambda k: rows[k % period], w[0]


def growing_scale(trajectory):
    """The largest entry so far. An error is compared with it step by step, so that the comparison is as strict at the
    start as at the end, also where a method is unstable on a topology and the workers end 1e45 apart."""
    return np.maximum.accumulate(abs(trajectory).max(axis=(1, 2)))


def disagreement_with_oracle(method, schedule, top, lr, steps=STEPS, momentum=0.9, Ws=None, **hyper):
    """The largest relative difference over all steps, weight decay and noisy gradients included."""
    n = top.n
    grad = oracle.LeastSquares(n, gradient_noise=0.3, seed=n)
    start = np.random.default_rng(1).standard_normal(3)
    x0 = np.tile(start, (n, 1))
    ours = simulate(method, top, grad, start, steps, lr, momentum, 0.01, schedule, **hyper)
    if "correction_rate" in rules.ALL[method].hyper:
        hyper.setdefault("correction_rate", oracle.auto_rate(method, top, momentum))
    A, mass = pushed(top) if method in oracle.PUSHED else (matrices(top), None)
    theirs = oracle.run(
        method, Ws or A, grad, x0, lr, momentum, 0.01, steps=steps, schedule=schedule, mass=mass, **hyper
    )
    assert np.isfinite(theirs).all()
    return (abs(ours - theirs).max(axis=(1, 2)) / growing_scale(theirs)).max()
