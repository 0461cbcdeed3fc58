"""With symmetric weights the workers' mean does not drift, though messages are bfloat16: 2000 steps by torch, and 20 in
the interpreted Triton kernels.
"""

import pytest
import torch
from everyday import everyday
from triton_problem import INTERPRETED, interpreted

from fused_dlam import rules
from fused_dlam.kernels.torch_passes import TorchPasses
from fused_dlam.rules.scalars import Scalars

WORKERS, N = 8, 96


def drift(steps, method):
    """How far the workers' mean is from float64 momentum SGD on the mean gradient, relative.

    Quadratics with one curvature and targets of their own, so that the mean gradient depends on the mean alone.
    `method(x, g, k)` makes step k on the workers' rows of x, in place.
    """
    torch.manual_seed(0)
    curvature, targets = torch.logspace(-3, 0, N), 1 + torch.randn(WORKERS, N)
    x, mean = torch.zeros(WORKERS, N), torch.zeros(N, dtype=torch.float64)
    m = torch.zeros_like(mean)
    for k in range(steps):
        method(x, curvature * (x - targets), k)
        m = 0.9 * m + curvature.double() * (mean - targets.double().mean(0))
        mean = mean - 0.05 * m
    return float((x.double().mean(0) - mean).norm() / mean.norm())


def gossip(rule, make):
    """One step of `rule` at every worker, bfloat16 messages over a ring with weights 1/3."""
    neighbors = [[(i - 1) % WORKERS, (i + 1) % WORKERS] for i in range(WORKERS)]
    passes = [make(rule) for _ in range(WORKERS)]
    state = [tuple(torch.zeros(N) for _ in rule.state) for _ in range(WORKERS)]
    messages = torch.zeros(WORKERS, rule.messages, N, dtype=torch.bfloat16)
    for p in passes:
        p.set(Scalars(rule.scalars(0.05, 0.9, 0.0, rho=0.8), (1 / 3, 1 / 3)))

    def step(x, g, k):
        for i, p in enumerate(passes):
            p.pack(x[i], g[i], state[i], messages[i])
        for i, p in enumerate(passes):
            p.combine(x[i], g[i], state[i], messages[neighbors[i]])

    return step


def literal():
    """One step of DmSGD with averages where the rules have pulls: x = sum_j w_ij Q(x_j - lr m_j)."""
    m = torch.zeros(WORKERS, N)

    def step(x, g, k):
        m.mul_(0.9).add_(g)
        y = (x - 0.05 * m).bfloat16().float()
        x.copy_((y + y.roll(1, 0) + y.roll(-1, 0)) / 3)

    return step


MIXED = [rules.dmsgd, rules.decentlam, rules.pc_dmsgd]


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton's")
@pytest.mark.parametrize("rule", everyday(MIXED, [rules.pc_dmsgd]), ids=lambda rule: rule.name)
def test_the_mean_does_not_drift_in_2000_steps(rule):
    assert drift(2000, gossip(rule, TorchPasses)) < 2e-5


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton's")
def test_the_mean_drifts_with_averages_instead_of_pulls():
    assert drift(2000, literal()) > 1e-3


@interpreted
def test_the_mean_does_not_drift_in_the_kernels():
    from fused_dlam.kernels.triton_passes import TritonPasses

    assert drift(20, gossip(rules.pc_dmsgd, lambda rule: TritonPasses(rule, "cpu", block=128))) < 1e-6
