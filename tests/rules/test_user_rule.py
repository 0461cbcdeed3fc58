"""A rule of ten lines outside the package gets everything, with no other code: certified, simulated, trained by real
worker processes (here), and interpreted, compiled and gated (test_triton_interpreter.py, test_gate.py).
"""

import copy

import numpy as np
import pytest
import torch
import workers
from my_rule import mine
from test_processes import network_gradient

from fused_dlam import GossipSGD, consensus_growth, simulate, topology
from fused_dlam.kernels import numba_passes as compiled
from fused_dlam.tools.launch import run_workers


def test_certified_simulated_and_trained():
    """Three processes, float32, against the simulator in float64: 1e-5 after 50 steps, both schedules."""
    graph = topology.one_peer_exponential(3)
    assert consensus_growth(mine, graph, 0.9) < 1
    cases = [(mine, "one-peer-exponential", {"boost": 0.2, "schedule": s}) for s in ("atc", "awc")]
    x0 = np.tile(workers.trained(workers.Tied(torch.float64)).numpy(), (3, 1))
    results = run_workers(workers.train_each, 3, cases, 50)
    for c, (_, _, options) in enumerate(cases):
        path = simulate(mine, graph, network_gradient(3), x0, 50, workers.lr_at, 0.9, **options)
        for rank in range(3):
            assert abs(results[rank][c]["path"][-1].double().numpy() - path[-1, rank]).max() < 1e-5


@pytest.mark.skipif(not compiled.available(), reason="numba is not installed")
def test_compiled():
    """fused=True on the CPU: within 1e-6 of the reference passes after 20 steps."""
    models = [workers.Tied(), workers.Tied()]
    optimizers = [
        GossipSGD(m.parameters(), lr=0.05, method=mine, boost=0.2, fused=f)
        for m, f in zip(models, (True, False), strict=True)
    ]
    assert [o.backend for o in optimizers] == ["numba", "torch"]
    for _ in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model.loss(workers.data(0)).backward()
            optimizer.step()
    torch.testing.assert_close(workers.trained(models[0]), workers.trained(models[1]), rtol=1e-6, atol=1e-6)


def test_what_is_not_there_is_told():
    """fused=True names what is missing; a checkpoint of the rule is refused by another method."""
    model = workers.Tied()
    optimizer = GossipSGD(model.parameters(), lr=0.05, method=mine)
    with pytest.raises(ValueError, match="method 'mine'"):
        GossipSGD(workers.Tied().parameters()).load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(TypeError, match="no hyper-parameter 'bost'"):
        GossipSGD(workers.Tied().parameters(), method=mine, bost=0.2)
