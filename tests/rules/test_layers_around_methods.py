"""Promises about LARS and SlowMo around a method, in float64 in one process:

- around every method they agree with the papers' own statements (oracle.py) to 1e-11;
- SlowMo without slow momentum is an exact average, to 1e-12;
- a simulation in torch is the one in numpy, layers included, to 1e-12.
"""

import numpy as np
import oracle
import pytest
import torch
from against_oracle import LR, METHODS, STEPS, everything, growing_scale, matrices

from fused_dlam import Simulation, SlowMo, rules, simulate, topology
from fused_dlam.layers.lars import Lars

LAYERS = {
    "lars": (Lars(0.02, [slice(0, 2)]), {"lars": (0.02, [slice(0, 2)])}),
    "slowmo": (SlowMo(12, 0.7, 0.9), {"slowmo": (12, 0.7, 0.9)}),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_layers_around_every_method(method, layer):
    """LARS (biases, here the third parameter, left out) and SlowMo, under the schedule with zero and tiny rates."""
    ours, theirs = LAYERS[layer]
    for top in (topology.one_peer_exponential(6), topology.star(5), topology.ring(1)):
        n, start = top.n, np.random.default_rng(1).standard_normal(3)
        grad = oracle.LeastSquares(n, gradient_noise=0.3, seed=n)
        lr = everything if layer == "slowmo" else (lambda k: 5 * everything(k))
        got = simulate(method, top, grad, start, STEPS, lr, 0.5, 0.01, layers=[ours])
        hyper = {}
        if "correction_rate" in rules.ALL[method].hyper:
            hyper["correction_rate"] = oracle.auto_rate(method, top, 0.5)
        x0 = np.tile(start, (n, 1))
        want = oracle.run(
            method,
            matrices(top),
            grad,
            x0,
            lr,
            0.5,
            0.01,
            steps=STEPS,
            **theirs,
            **hyper,
        )
        assert np.isfinite(want).all() and abs(want[-1] - want[0]).max() > 1e-3
        assert (abs(got - want).max(axis=(1, 2)) / growing_scale(want)).max() < 1e-11, top


def test_slowmo_without_slow_momentum_averages_exactly():
    """beta_s = 0, alpha = 1: after every H steps the workers are at their mean, to 1e-12, also at a zero rate; DmSGD
    then is Gossip-PGA, whose average takes the place of the last exchange."""
    grad, top = oracle.LeastSquares(6, gradient_noise=0.3), topology.one_peer_exponential(6)
    slow = simulate("decentlam", top, grad, np.ones(3), STEPS, everything, momentum=0.5, layers=[SlowMo(8, 0.0)])
    assert abs(slow - slow.mean(axis=1, keepdims=True))[8::8].max() < 1e-12
    pga = simulate("dmsgd", top.with_global_average(8), grad, np.ones(3), STEPS, everything)
    slow = simulate("dmsgd", top, grad, np.ones(3), STEPS, everything, layers=[SlowMo(8, 0.0)])
    assert abs(pga - slow).max() < 1e-12


@pytest.mark.parametrize("method", ["pc-dmsgd", "adamw", "psgd", "gradient-tracking"])
def test_a_simulation_in_torch_is_the_one_in_numpy(method):
    """float64 to 1e-12; float32 stays float32."""
    grad, top = oracle.LeastSquares(5), topology.one_peer_exponential(5)
    layers = [Lars(0.1, [slice(0, 2)]), SlowMo(7)]
    want = simulate(method, top, grad, np.ones(3), 60, LR, 0.9, 0.01, layers=layers)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        workers = Simulation(method, top, torch.ones(5, 3, dtype=dtype), 0.9, 0.01, layers=layers)
        for k in range(60):
            x = workers.step(torch.from_numpy(grad(k, workers.x.double().numpy())).to(dtype), LR)
        assert x.dtype == dtype and abs(x.double().numpy() - want[-1]).max() < tolerance
