"""Promises about what the methods must obey whatever the data, checked in float64 in one process:

- with doubly stochastic W the workers' mean moves like momentum SGD with all-reduce, to 1e-12;
- with one worker, or with W = J, a method is torch's optimizer or all-reduce momentum SGD, to 1e-12;
- equal workers stay bit-equal.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from against_oracle import (
    LRS,
    METHODS,
    STEPS,
    VARIANTS,
    doubly_stochastic,
    everything,
    family,
    growing_scale,
    row_stochastic,
)
from everyday import everyday

from fused_dlam import rules, simulate, topology
from fused_dlam.rules.jit import Array


def heavy_ball(gradients, x0, lr, momentum, weight_decay):
    """Momentum SGD on given gradients [steps, ...]: every x, from x0 on."""
    x, m = [x0], np.zeros_like(x0)
    for k, g in enumerate(gradients):
        m = momentum * m + g + weight_decay * x[-1]
        x.append(x[-1] - lr(k) * m)
    return np.stack(x)


@pytest.mark.parametrize("lr", [LRS["constant"], LRS["cosine to zero"], everything], ids=["constant", "cosine", "all"])
@pytest.mark.parametrize("schedule", oracle.SCHEDULES)
@pytest.mark.parametrize(
    "top",
    [
        topology.ring(8),
        topology.exponential(8),
        topology.one_peer_exponential(6),
        doubly_stochastic(7, 1),
        doubly_stochastic(7, 11),
        doubly_stochastic(16, 5).every(3),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "method", ["dmsgd", "decentlam", "pc-dmsgd", "mi-dmsgd", "exact-diffusion", "momentum-tracking"]
)
def test_the_mean_moves_like_all_reduce_momentum_sgd(method, top, schedule, lr):
    """With doubly stochastic W the pulls cancel: the mean is momentum SGD on the mean of the workers' gradients, to
    1e-12, whatever the graph and the noise. (beta = 0.5 for DecentLaM, which diverges on most of these at 0.9: the
    law would still hold, but drown in the rounding of the huge disagreement.)"""
    if schedule != "atc" and method in oracle.ONLY_ATC:
        pytest.skip("has no such schedule")
    momentum = 0.5 if method == "decentlam" else 0.9
    grad = oracle.LeastSquares(top.n, gradient_noise=1.0)
    seen = []

    def recorded(step, x):
        seen.append(grad(step, x))
        return seen[-1]

    x0 = np.random.default_rng(2).standard_normal((top.n, 3))
    x = simulate(method, top, recorded, x0, 300, lr, momentum, 0.01, schedule)
    expected = heavy_ball([g.mean(axis=0) for g in seen], x0.mean(axis=0), lr, momentum, 0.01)
    assert (abs(x.mean(axis=1) - expected).max(axis=1) <= 1e-12 * growing_scale(x)).all()


@pytest.mark.parametrize("lr", [*LRS.values(), everything], ids=[*LRS, "everything"])
@pytest.mark.parametrize("gain", [1.0, 10.0, math.inf])
def test_pc_dmsgd_with_exact_averaging_is_all_reduce_momentum_sgd(gain, lr):
    """W = J: every worker is pmsgd, to 1e-12."""
    grad = oracle.LeastSquares(5, gradient_noise=1.0)
    pc, pm = (
        simulate(method, topology.full(5), grad, np.ones(3), STEPS, lr, 0.9, 0.01, **hyper)
        for method, hyper in (("pc-dmsgd", {"correction_gain": gain}), ("pmsgd", {}))
    )
    assert abs(pc - pm).max() <= 1e-12 * abs(pm).max()


@pytest.mark.parametrize("schedule", oracle.SCHEDULES)
@pytest.mark.parametrize("method", ["pc-dmsgd", "mi-dmsgd", "nesterov-pc-dmsgd", "nesterov-mi-dmsgd"])
@pytest.mark.parametrize("top", [topology.exponential(5), row_stochastic(5, 3)], ids=repr)
def test_without_correction_they_are_dmsgd(top, method, schedule):
    """Bit for bit: PC-DmSGD and MI-DmSGD are corrections of one method, under each schedule of the family."""
    grad = oracle.LeastSquares(5, gradient_noise=1.0)
    run = (top, grad, np.ones(3), STEPS, everything, 0.9, 0.01, schedule)
    ours = simulate(method, *run, correction_rate=0.0)
    assert np.array_equal(ours, simulate("nesterov-dmsgd" if "nesterov" in method else "dmsgd", *run))


@pytest.mark.parametrize("method", ["dmsgd", "pc-dmsgd", "mi-dmsgd", "adamw", "exact-diffusion"])
def test_the_family_of_schedules(method):
    """The message is x + theta d with theta = 1, 1/2, 0, where d is the worker's own step; to 1e-15 of x."""
    x, g, pull = (np.random.default_rng(k).standard_normal((4, 3)).view(Array) for k in range(3))
    rule = rules.get(method)
    s = rule.State(
        *(np.abs(np.random.default_rng(9 + k).standard_normal((4, 3))).view(Array) for k in range(len(rule.state)))
    )
    d = None
    for schedule, theta in (("atc", 1.0), ("midpoint", 0.5), ("awc", 0.0)):
        of = rule.under(schedule)
        h = of.scalars(0.1, 0.9, 0.01, 0.5)
        (message,) = of.send.fn(x, g, s, h)
        d = message - x if d is None else d
        assert abs(message - (x + theta * d)).max() <= 1e-15 * abs(x).max(), schedule
        new_x, new_s = of.update.fn(x, g, s, (pull,), h)
        same_x, same_s = rule.update.fn(x, g, s, (pull,), rule.scalars(0.1, 0.9, 0.01, 0.5))
        assert np.array_equal(new_x, same_x) and all(map(np.array_equal, new_s, same_s)), schedule


TORCH = {  # what every method is with one worker
    **dict.fromkeys(["psgd", "dsgd"], (torch.optim.SGD, {})),
    **dict.fromkeys(
        [m for m in METHODS if m.startswith("nesterov")], (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})
    ),
    "adam": (torch.optim.Adam, {}),
    **dict.fromkeys(["adamw", "mi-adamw"], (torch.optim.AdamW, {})),
}
SELF_AVERAGING = ("qg-dmsgd", "nesterov-qg-dmsgd")  # their momentum is a mean of displacements
OUTER = ("gasloc", "noloco")  # their momentum is a displacement: torch's at a constant rate, see test_outer.py


@pytest.mark.parametrize("lr", [*LRS.values(), everything], ids=[*LRS, "everything"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in SELF_AVERAGING + OUTER])
def test_one_worker_is_torchs_optimizer(method, lr):
    """torch.optim.SGD, Adam or AdamW with momentum and weight decay, in float64, to 1e-12 under any schedule."""
    grad = oracle.LeastSquares(1, gradient_noise=1.0)
    p = torch.nn.Parameter(torch.ones(1, 3, dtype=torch.float64))
    build, options = TORCH.get(method, (torch.optim.SGD, {"momentum": 0.9}))
    sgd = build([p], lr=1.0, weight_decay=0.01, **options)
    expected = [p.detach().numpy().copy()]
    for k in range(STEPS):
        p.grad = torch.from_numpy(grad(k, p.detach().numpy()))
        sgd.param_groups[0]["lr"] = lr(k)
        sgd.step()
        expected.append(p.detach().numpy().copy())
    expected = np.stack(expected)
    for name in ("one-peer-exponential", "random-match"):  # all of them: test_every_method_on_every_topology...
        ours = simulate(method, name, grad, np.ones((1, 3)), STEPS, lr, 0.9, 0.01)
        assert abs(ours - expected).max() <= 1e-12 * abs(expected).max(), name


@pytest.mark.parametrize("name, n", everyday(family([2, 3, 5, 8, 16]), family([8])))
def test_equal_workers_stay_bit_equal(name, n):
    """Pulls between equal messages are exactly zero, so homogeneous workers never drift apart by rounding."""
    h, top = np.array([1.0, 0.3, 1 / 7]), topology.get(name, n)
    for method, schedule in VARIANTS:
        x = simulate(method, top, lambda k, x: h * x - 1 / 3, np.full((n, 3), 0.3), 60, everything, schedule=schedule)
        assert (x == x[:, :1]).all(), (method, schedule)
