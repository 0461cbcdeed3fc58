"""Promises about LARS and SlowMo on one worker: the simulator's steps, one rounding, and no step out of nothing."""

import pytest
import torch
from torch import nn

from fused_dlam import GossipSGD, Simulation
from fused_dlam.layers import Lars, SlowMo


@pytest.mark.parametrize("method", ["dmsgd", "adamw"])
def test_lars_takes_weight_decay_over(method):
    """Coupled or decoupled: the simulator's steps to 1e-12, in float64."""
    p = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    optimizer = GossipSGD([p], lr=0.1, weight_decay=0.3, method=method, layers=[Lars(0.05)])
    alone = Simulation(
        method, "ring", torch.ones(1, 6, dtype=torch.float64), 0.9, 0.3, layers=[Lars(0.05, [slice(0, 6)])]
    )
    for step in range(5):
        p.grad = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        alone.step(p.grad.reshape(1, 6).clone(), 0.1)
        optimizer.step()
        torch.testing.assert_close(p.detach().reshape(1, 6), alone.x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_lars_rounds_once(dtype):
    """16-bit gradients of 1e-6 under a loss scale: one rounding, whatever their size; complex ones are a layer too."""
    random = torch.Generator().manual_seed(0)
    x, g = (torch.randn(32, 32, generator=random, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    p = nn.Parameter(x.to(dtype))
    optimizer = GossipSGD([p], lr=1.0, method="dsgd", layers=[Lars(1e-3)])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    p.grad = (g * 1e-6 * 2.0**16).to(dtype)
    x, g = (t.detach().to(torch.promote_types(dtype, torch.float64)) for t in (p, p.grad))
    g = g / 2**16
    optimizer.step()
    moved = optimizer.state[p].get("master", p.detach()).to(x.dtype) - x
    expected = -1e-3 * x.norm() / (g.norm() + 1e-8) * g
    assert (moved - expected).norm() < max(torch.finfo(dtype).eps / 2, 1e-4) * expected.norm()


def test_slowmo_starts_from_what_was_loaded():
    """A model loaded after construction is where the first round starts, not a step: without a gradient it stays."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = GossipSGD([p], lr=0.1, layers=[SlowMo(every=2)])
    with torch.no_grad():
        p.fill_(10.0)
    for _ in range(6):
        p.grad = torch.zeros(3)
        optimizer.step()
        assert (p == 10.0).all()


@pytest.mark.parametrize("method", ["adam", "adamw"])
def test_a_late_parameter_is_decayed_once(method):
    """Bit-equal: under LARS, a parameter's first step at the group's fourth is its first step in a new optimizer."""

    def first_step(late):
        generator = torch.Generator().manual_seed(3)
        a, b = (nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(2))
        optimizer = GossipSGD([a, b], lr=0.1, weight_decay=0.1, method=method, layers=[Lars(0.1)])
        for step in range(late + 1):
            a.grad, b.grad = torch.ones(4, 3), torch.full((4, 3), 2.0) if step == late else None
            optimizer.step()
        return b.detach().clone()

    assert torch.equal(first_step(3), first_step(0))
