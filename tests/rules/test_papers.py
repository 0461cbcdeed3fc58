"""Promises about the methods' equations, checked in float64 in one process:

- the simulator agrees with the papers' own statements (oracle.py) to 1e-11, for every method, schedule, topology and
  learning-rate schedule, zero rates included;
- so it does with forms of three methods that are published elsewhere, to 1e-11 and 1e-12.
"""

import math

import numpy as np
import oracle
import pytest
from against_oracle import (
    LR,
    LRS,
    VARIANTS,
    disagreement_with_oracle,
    doubly_stochastic,
    everything,
    family,
    growing_scale,
    matrices,
    row_stochastic,
)
from everyday import everyday

from fused_dlam import simulate, topology


@pytest.mark.parametrize("name, n", everyday(family([1, 2, 3, 5, 8, 16]), family([3])))
def test_every_method_on_every_topology_is_the_papers(name, n):
    """Five workers run all of them every day; of the rest some sizes have one half, the others the other half."""
    top = topology.get(name, n)
    half = (list(topology.FAMILY).index(name) + n.bit_length()) % 2
    for method, schedule in VARIANTS if n == 5 else VARIANTS[half::2]:
        assert disagreement_with_oracle(method, schedule, top, everything) < 1e-11, (method, schedule)


@pytest.mark.parametrize("lr", everyday(LRS, ["zero in the middle"]))
@pytest.mark.parametrize(("method", "schedule"), VARIANTS)
def test_every_learning_rate_schedule(method, schedule, lr):
    for name, n in [("ring", 3), ("exponential", 5), ("one-peer-exponential", 8), ("star", 5)]:
        assert disagreement_with_oracle(method, schedule, topology.get(name, n), LRS[lr]) < 1e-11, (name, n)


@pytest.mark.parametrize("top", [doubly_stochastic(5, 7), row_stochastic(5, 7), row_stochastic(8, 1)], ids=repr)
def test_custom_directed_time_varying_matrices(top):
    for method, schedule in VARIANTS:
        assert disagreement_with_oracle(method, schedule, top, everything) < 1e-11, (method, schedule)


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("qg-dmsgd", {"mu": 0.1}),
        ("qg-dmsgd", {"mu": 0.99}),
        ("pc-dmsgd", {"correction_gain": 1.0}),
        ("pc-dmsgd", {"correction_gain": math.inf}),
        ("pc-dmsgd", {"correction_rate": 0.003, "correction_gain": 4.0}),
        ("pc-dmsgd", {"correction_rate": 0.3}),
    ],
)
def test_hyper_parameters_and_momentum(method, hyper):
    for momentum in (0.0, 0.5, 0.95):
        for schedule in ("atc", "awc"):
            error = disagreement_with_oracle(
                method, schedule, topology.one_peer_exponential(8), everything, momentum=momentum, **hyper
            )
            assert error < 1e-11, (momentum, schedule)


def test_the_comparison_would_notice_a_reversed_graph():
    """The control: with W transposed in the oracle the difference is 1e9 times the tolerance."""
    top = topology.exponential(5)
    error = disagreement_with_oracle("dmsgd", "atc", top, LRS["constant"], Ws=lambda k: top.weights(k).T)
    assert error > 1e-2


def test_decentlam_is_the_papers_second_form():
    """x^{k+1} = W (x^k - lr g^k) + beta (x^k - x^{k-1}) for a constant rate, also where it diverges."""
    for top in (topology.symmetric_exponential(8), topology.one_peer_exponential(8)):
        grad, W = oracle.LeastSquares(8), matrices(top)
        x = [np.zeros((8, 3))] * 2
        for k in range(200):
            x.append(W(k) @ (x[-1] - LR * grad(k, x[-1])) + 0.9 * (x[-1] - x[-2]))
        expected, ours = np.stack(x[1:]), simulate("decentlam", top, grad, x[0], 200, LR)
        assert (abs(ours - expected).max(axis=(1, 2)) <= 1e-12 * np.maximum(growing_scale(expected), 1e-3)).all()


def test_exact_diffusion_is_its_published_form():
    """psi = x - lr g; phi = psi + x - psi_prev; x = (I + W)/2 phi, a constant rate, no momentum, to 1e-11."""
    for top in (topology.symmetric_exponential(8), topology.ring(5)):
        grad, W = oracle.LeastSquares(top.n), (top.weights() + np.eye(top.n)) / 2
        x = [np.zeros((top.n, 3))]
        psi_prev = x[0]
        for k in range(1500):
            psi = x[-1] - LR * grad(k, x[-1])
            x.append(W @ (psi + x[-1] - psi_prev))
            psi_prev = psi
        ours = simulate("exact-diffusion", top, grad, x[0], 1500, LR, momentum=0.0)
        assert abs(ours - np.stack(x)).max() < 1e-11
        assert grad.error(ours)[-1] < 1e-4  # and exact, where DSGD keeps a bias


def test_momentum_tracking_is_gradient_tracking_of_momentum():
    """y = m - c follows y' = W y + m' - m, y_0 = m_0: Takezawa et al.'s form is a tracked momentum, to 1e-12."""
    top = topology.exponential(5)
    grad, W = oracle.LeastSquares(5), top.weights()
    x, m, y = np.zeros((5, 3)), np.zeros((5, 3)), np.zeros((5, 3))
    for k in range(200):
        m, before = 0.9 * m + grad(k, x), m
        y = W @ y + m - before
        x = W @ x - 0.005 * y
    ours = simulate("momentum-tracking", top, grad, np.zeros((5, 3)), 200, 0.005)
    assert abs(ours[-1] - x).max() < 1e-12
