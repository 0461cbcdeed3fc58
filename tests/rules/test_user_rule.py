"""Promises about a rule of ten lines outside the package. It gets everything, with no other code:

- it is simulated, to 1e-12 of a plain loop, and certified by its equations, not by its name;
- it is trained by real worker processes as it is simulated, to 1e-5 in float32, and compiled by numba;
- what is missing, or belongs to another method, is told.

(Triton's interpreter and the gate take the same rule: test_triton_interpreter.py, test_gate.py.)
"""

import copy
import math

import numpy as np
import oracle
import pytest
import torch
import workers
from against_oracle import LR, matrices, row_stochastic
from my_rule import mine
from test_processes import network_gradient

from fused_dlam import GossipSGD, Rule, consensus_growth, jit, rules, simulate, topology
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


# -- simulated and certified -------------------------------------------------------------------------------------------


@jit
def send_lookahead(x, g, s, h):
    u = h.momentum * s.momentum_buffer + g
    return (x - h.lr * (h.lookahead * u + g),)


@jit
def update_lookahead(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + g
    return x - h.lr * (h.lookahead * u + g) + pull[0], (u,)


LOOKAHEAD = Rule(
    "nesterov-dmsgd",
    send_lookahead,
    update_lookahead,
    ("momentum_buffer",),
    hyper={"lookahead": lambda momentum, rho: momentum},
)


@pytest.mark.parametrize("top", [topology.one_peer_exponential(6), row_stochastic(6, 3)], ids=repr)
def test_a_users_rule_is_simulated(top):
    """DmSGD with Nesterov's lookahead, against a plain loop, to 1e-12."""
    grad, W = oracle.LeastSquares(6), matrices(top)
    for lookahead in (0.9, 0.5):
        x, m = [np.ones((6, 3))], np.zeros((6, 3))
        for k in range(200):
            g = grad(k, x[-1])
            m = 0.9 * m + g
            x.append(W(k) @ (x[-1] - LR * (lookahead * m + g)))
        hyper = {} if lookahead == 0.9 else {"lookahead": lookahead}
        ours = simulate(LOOKAHEAD, top, grad, np.ones(3), 200, LR, **hyper)
        assert abs(ours - np.stack(x)).max() <= 1e-12 * abs(np.stack(x)).max()


@pytest.mark.parametrize(("n", "growth"), [(8, 0.9), (16, (1 + 2 * math.cos(math.pi / 8)) / 3)])
def test_a_users_rule_is_certified(n, growth):
    """Without gradients x' = W (x - lr beta^2 m), m' = beta m: it grows by beta or by the ring's own rho."""
    assert consensus_growth(LOOKAHEAD, topology.ring(n), 0.9) == pytest.approx(growth, abs=1e-9)
    assert consensus_growth(LOOKAHEAD, topology.ring(n), 0.9, schedule="awc") == pytest.approx(growth, abs=1e-9)


def test_an_unstable_users_rule_is_found_out():
    """DecentLaM written once more, outside the package: the certificate knows nothing of names."""
    again = Rule(
        "mine", rules.decentlam.send, rules.decentlam.update, ("momentum_buffer",), derive=rules.decentlam.derive
    )
    assert (
        consensus_growth(again, topology.exponential(8)) == consensus_growth("decentlam", topology.exponential(8)) > 1
    )
