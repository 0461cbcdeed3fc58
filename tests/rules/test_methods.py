"""Promises about the methods' equations, checked in float64 in one process:

- the simulator agrees with the papers' own statements (oracle.py) to 1e-11 for every method, schedule, topology and
  learning-rate schedule, zero rates included;
- the laws of the methods hold to 1e-12: what the workers' mean does, what is left with one worker or with W = J;
- equal workers stay bit-equal;
- a rule written outside the package is simulated and certified like the package's own; mistakes in one are told.
"""

import functools
import math
import warnings

import numpy as np
import oracle
import pytest
import torch

from fused_dlam import Rule, Simulation, SlowMo, Topology, consensus_growth, jit, rules, simulate, topology
from fused_dlam.layers.lars import Lars

STEPS, LR = 200, 0.02
METHODS = list(rules.ALL)
AWC = [m for m in METHODS if m not in oracle.ONLY_ATC and "awc" not in m]
VARIANTS = [(method, "atc") for method in METHODS] + [(method, "awc") for method in AWC]

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


def matrices(top):
    return functools.cache(top.weights)


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
        hyper.setdefault("correction_rate", oracle.auto_rate(momentum, top.rho))
    theirs = oracle.run(
        method, Ws or matrices(top), grad, x0, lr, momentum, 0.01, steps=steps, schedule=schedule, **hyper
    )
    assert np.isfinite(theirs).all()
    return (abs(ours - theirs).max(axis=(1, 2)) / growing_scale(theirs)).max()


# -- against the papers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n"), family([1, 2, 3, 5, 8, 16]))
def test_every_method_on_every_topology_is_the_papers(name, n):
    top = topology.get(name, n)
    for method, schedule in VARIANTS:
        assert disagreement_with_oracle(method, schedule, top, everything) < 1e-11, (method, schedule)


@pytest.mark.parametrize("lr", LRS)
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


# -- layers around any rule --------------------------------------------------------------------------------------------

LAYERS = {
    "lars": ({"lars": Lars(0.02, [slice(0, 2)])}, {"lars": (0.02, [slice(0, 2)])}),
    "slowmo": ({"slowmo": SlowMo(12, 0.7, 0.9)}, {"slowmo": (12, 0.7, 0.9)}),
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
        got = simulate(method, top, grad, start, STEPS, lr, 0.5, 0.01, **ours)
        hyper = {}
        if "correction_rate" in rules.ALL[method].hyper:
            hyper["correction_rate"] = oracle.auto_rate(0.5, top.slowest_rho)
        x0 = np.tile(start, (n, 1))
        want = oracle.run(method, matrices(top), grad, x0, lr, 0.5, 0.01, steps=STEPS, **theirs, **hyper)
        assert np.isfinite(want).all() and abs(want[-1] - want[0]).max() > 1e-3
        assert (abs(got - want).max(axis=(1, 2)) / growing_scale(want)).max() < 1e-11, top


def test_slowmo_without_slow_momentum_averages_exactly():
    """beta_s = 0, alpha = 1: after every H steps the workers are at their mean, to 1e-12, also at a zero rate; DmSGD
    then is Gossip-PGA, whose average takes the place of the last exchange."""
    grad, top = oracle.LeastSquares(6, gradient_noise=0.3), topology.one_peer_exponential(6)
    slow = simulate("decentlam", top, grad, np.ones(3), STEPS, everything, momentum=0.5, slowmo=SlowMo(8, 0.0))
    assert abs(slow - slow.mean(axis=1, keepdims=True))[8::8].max() < 1e-12
    pga = simulate("dmsgd", top.with_global_average(8), grad, np.ones(3), STEPS, everything)
    slow = simulate("dmsgd", top, grad, np.ones(3), STEPS, everything, slowmo=SlowMo(8, 0.0))
    assert abs(pga - slow).max() < 1e-12


@pytest.mark.parametrize("method", ["pc-dmsgd", "adamw", "psgd", "gradient-tracking"])
def test_a_simulation_in_torch_is_the_one_in_numpy(method):
    """float64 to 1e-12; float32 stays float32."""
    grad, top = oracle.LeastSquares(5), topology.one_peer_exponential(5)
    layers = {"lars": Lars(0.1, [slice(0, 2)]), "slowmo": SlowMo(7)}
    want = simulate(method, top, grad, np.ones(3), 60, LR, 0.9, 0.01, **layers)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        workers = Simulation(method, top, torch.ones(5, 3, dtype=dtype), 0.9, 0.01, **layers)
        for k in range(60):
            x = workers.step(torch.from_numpy(grad(k, workers.x.double().numpy())).to(dtype), LR)
        assert x.dtype == dtype and abs(x.double().numpy() - want[-1]).max() < tolerance


# -- laws ------------------------------------------------------------------------------------------------------------


def heavy_ball(gradients, x0, lr, momentum, weight_decay):
    """Momentum SGD on given gradients [steps, ...]: every x, from x0 on."""
    x, m = [x0], np.zeros_like(x0)
    for k, g in enumerate(gradients):
        m = momentum * m + g + weight_decay * x[-1]
        x.append(x[-1] - lr(k) * m)
    return np.stack(x)


@pytest.mark.parametrize("lr", [LRS["constant"], LRS["cosine to zero"], everything], ids=["constant", "cosine", "all"])
@pytest.mark.parametrize("schedule", ["atc", "awc"])
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
@pytest.mark.parametrize("method", ["dmsgd", "decentlam", "pc-dmsgd", "exact-diffusion", "momentum-tracking"])
def test_the_mean_moves_like_all_reduce_momentum_sgd(method, top, schedule, lr):
    """With doubly stochastic W the pulls cancel: the mean is momentum SGD on the mean of the workers' gradients, to
    1e-12, whatever the graph and the noise. (beta = 0.5 for DecentLaM, which diverges on most of these at 0.9: the
    law would still hold, but drown in the rounding of the huge disagreement.)"""
    if schedule == "awc" and method in oracle.ONLY_ATC:
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


@pytest.mark.parametrize("schedule", ["atc", "awc"])
@pytest.mark.parametrize("top", [topology.exponential(5), row_stochastic(5, 3)], ids=repr)
def test_pc_dmsgd_without_correction_is_dmsgd(top, schedule):
    """Bit for bit."""
    grad = oracle.LeastSquares(5, gradient_noise=1.0)
    pc = simulate("pc-dmsgd", top, grad, np.ones(3), STEPS, everything, 0.9, 0.01, schedule, correction_rate=0.0)
    assert np.array_equal(pc, simulate("dmsgd", top, grad, np.ones(3), STEPS, everything, 0.9, 0.01, schedule))


TORCH = {  # what every method is with one worker
    **dict.fromkeys(["psgd", "dsgd"], (torch.optim.SGD, {})),
    **dict.fromkeys(
        [m for m in METHODS if m.startswith("nesterov")], (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})
    ),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}
SELF_AVERAGING = ("qg-dmsgd", "nesterov-qg-dmsgd")  # their momentum is a mean of displacements


@pytest.mark.parametrize("lr", [*LRS.values(), everything], ids=[*LRS, "everything"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in SELF_AVERAGING])
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


@pytest.mark.parametrize(("name", "n"), family([2, 3, 5, 8, 16]))
def test_equal_workers_stay_bit_equal(name, n):
    """Pulls between equal messages are exactly zero, so homogeneous workers never drift apart by rounding."""
    h, top = np.array([1.0, 0.3, 1 / 7]), topology.get(name, n)
    for method, schedule in VARIANTS:
        x = simulate(method, top, lambda k, x: h * x - 1 / 3, np.full((n, 3), 0.3), 60, everything, schedule=schedule)
        assert (x == x[:, :1]).all(), (method, schedule)


# -- a rule from outside the package ---------------------------------------------------------------------------------


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


# -- mistakes --------------------------------------------------------------------------------------------------------


def simulate_two_steps(method="dmsgd", top="ring", grad=lambda k, x: x, x0=None, **options):
    return simulate(method, top, grad, np.ones((4, 3)) if x0 is None else x0, 2, 0.1, **options)


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="unknown method 'lion'; known: psgd, .*pc-dmsgd"):
        simulate_two_steps("lion")
    with pytest.raises(TypeError, match="method must be a name or a Rule"):
        simulate_two_steps(3)
    with pytest.raises(TypeError, match="'dmsgd' has no hyper-parameter 'mu'; it has lr, momentum, weight_decay"):
        simulate_two_steps("dmsgd", mu=0.1)
    with pytest.raises(TypeError, match="'pc-dmsgd' has no hyper-parameter 'gain'; it has .*correction_gain"):
        consensus_growth("pc-dmsgd", topology.ring(4), gain=3)
    with pytest.raises(ValueError, match="unknown topology 'circle'"):
        simulate_two_steps(top="circle")


@pytest.mark.parametrize("certify", [False, True])
def test_schedules_are_checked(certify):
    def attempt(method, schedule):
        if certify:
            return consensus_growth(method, topology.ring(4), schedule=schedule)
        return simulate_two_steps(method, schedule=schedule)

    for method in oracle.ONLY_ATC:
        with pytest.raises(ValueError, match=f"'awc' needs .*'{method}' is not one"):
            attempt(method, "awc")
    with pytest.raises(ValueError, match="'atc' or 'awc', not 'overlap'"):
        attempt("dmsgd", "overlap")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"grad returned shape \(4, 2\), expected \(4, 3\)"):
        simulate_two_steps(grad=lambda k, x: x[:, :2])
    with pytest.raises(ValueError, match=r"x0 must be \[n, d\]"):
        simulate_two_steps(x0=np.ones(3))
    with pytest.raises(ValueError, match="for 5 workers, but there are 4"):
        simulate_two_steps(top=topology.ring(5))


@jit
def send_no_tuple(x, g, s, h):
    return x - h.lr * g


@jit
def update_bare(x, g, s, pull, h):
    return x + pull[0]


@jit
def update_state_not_in_tuple(x, g, s, pull, h):
    return x + pull[0], s.momentum_buffer + g


@jit
def update_two_buffers(x, g, s, pull, h):
    return x + pull[0], (g, g)


def plain(x, g, s, h):
    return (x,)


def test_a_rule_of_the_wrong_form_is_refused():
    with pytest.raises(TypeError, match="'mine': send must be decorated with @fused_dlam.jit"):
        Rule("mine", plain, update_lookahead)
    with pytest.raises(TypeError, match="'mine': update must be decorated"):
        Rule("mine", send_lookahead, plain)
    with pytest.raises(ValueError, match="'mine': send must return a non-empty tuple"):
        Rule("mine", send_no_tuple, update_bare)
    for update in (update_bare, update_state_not_in_tuple, update_two_buffers):
        with pytest.raises(ValueError, match=r"'mine': update must return x', \(one value for each of"):
            Rule("mine", rules.dsgd.send, update, ("momentum_buffer",))
    with pytest.raises(ValueError, match="average must be 'neighbors' or 'gradient', not 'all'"):
        Rule("mine", rules.dsgd.send, rules.dsgd.update, average="all")
