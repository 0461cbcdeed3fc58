"""Promises about the outer methods of low-communication training, in float64 in one process. A round is some inner
steps from the anchor x to y, and one step of the outer method with g = x - y.

- GASLoC and NoLoCo are their papers' recursions (outer_forms.py) to 1e-12, on 1, 2, 3, 5 and 8 workers, on directed
  graphs, on graphs that change and whose columns do not sum to one, under schedules of the outer rate;
- at a constant rate their mean moves like torch's SGD on the mean outer gradient, Nesterov's and the heavy ball's;
- on random pairs the mean square of the disagreement shrinks where gossip_rate < 2 (1 - beta^2) / (1 - beta/(n - 1));
- DiLoCo is `nesterov-pmsgd`: torch.optim.SGD on the mean outer gradient, as torchft and OpenDiLoCo step it, to 1e-12,
  and torchft's own figures to the digit;
- SlowMo is `pmsgd`, as the layer SlowMo has it, and Factored Gossip DiLoCo's settings are what README.md says.
"""

import math
from itertools import islice

import numpy as np
import oracle
import outer_forms as forms
import pytest
import torch
from against_oracle import doubly_stochastic, growing_scale, matrices, row_stochastic

from fused_dlam import Rule, Simulation, SlowMo, consensus_growth, jit, simulate, topology

ROUNDS, H, INNER_LR = 40, 4, 0.05
RATES = {
    "constant": lambda k: 0.7,
    "warm-up, cosine, zero": lambda k: 0.7 * min(1, k / 5) * (1 + math.cos(math.pi * min(k, 34) / 34)) / 2,
}
GRAPHS = [
    *(topology.random_match(n) for n in (1, 2, 3, 5, 8)),
    *(topology.one_peer_exponential(n) for n in (2, 3, 5, 8)),
    topology.exponential(5),
    topology.full(3),
    topology.ring(8).every(2),
    doubly_stochastic(5, 7),
    row_stochastic(5, 7),
    row_stochastic(8, 1),
]


def inner(n):
    """y(x): H steps of every worker's SGD on its own least squares."""
    problem = oracle.LeastSquares(n, gradient_noise=0.3, seed=n)

    def rounds(x):
        y = np.array(x)
        for k in range(H):
            y = y - INNER_LR * problem(k, y)
        return y

    return rounds


def start(n):
    """Unlike anchors."""
    return np.random.default_rng(n).standard_normal((n, 3))


def ours(method, top, x, lr, momentum, rounds=ROUNDS, **options):
    """The anchors after every round, x itself first."""
    workers, y = Simulation(method, top, x, momentum, **options), inner(len(x))
    path = [x]
    for k in range(rounds):
        path.append(np.array(workers.step(workers.x - y(workers.x), lr(k))))
    return np.stack(path)


def same(path, form, tolerance=1e-12):
    expected = np.stack([path[0], *islice(form, len(path) - 1)])
    return bool((abs(path - expected).max(axis=(1, 2)) <= tolerance * growing_scale(expected)).all())


# -- GASLoC and NoLoCo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", RATES)
@pytest.mark.parametrize("top", GRAPHS, ids=repr)
def test_they_are_their_papers_recursions(top, lr):
    x, W, y, lr = start(top.n), matrices(top), inner(top.n), RATES[lr]
    for momentum, rate in ((0.5, 1.0), (0.9, 0.3)):
        path = ours("gasloc", top, x, lr, momentum, gossip_rate=rate)
        assert same(path, forms.gasloc(W, y, x, lr, momentum, rate))
    for momentum, rate in ((0.5, 0.7), (0.3, 1.2)):
        path = ours("noloco", top, x, lr, momentum, gossip_rate=rate)
        assert same(path, forms.noloco(W, y, x, lr, momentum, rate))
    assert np.array_equal(ours("gasloc", top, x, lr, 0.5), ours("gasloc", top, x, lr, 0.5, gossip_rate=1.0))
    assert np.array_equal(ours("noloco", top, x, lr, 0.5), ours("noloco", top, x, lr, 0.5, gossip_rate=0.7))


def test_the_comparison_would_notice_a_reversed_graph():
    """The control: against W transposed no path is the same."""
    top, lr = topology.exponential(5), RATES["constant"]
    x, y, back = start(5), inner(5), lambda k: top.weights(k).T
    assert not same(ours("gasloc", top, x, lr, 0.5), forms.gasloc(back, y, x, lr, 0.5, 1.0), 1e-3)
    assert not same(ours("noloco", top, x, lr, 0.5), forms.noloco(back, y, x, lr, 0.5, 0.7), 1e-3)


def test_a_step_of_noloco_by_hand():
    """Two workers, after a round that left the displacements (0.2, -0.3): the authors' code has 0.45 and -0.25.

    delta = 0.5 (0.2, -0.3) + 0.7 (-0.4 - 0.6)/2 + 0.7 (2 - 1, 2 - 3) = (0.45, -1.2)
    """
    workers = Simulation("noloco", topology.full(2), np.array([[0.8], [3.3]]), 0.5)
    workers.step(np.array([[0.0], [0.0]]), 0.0)  # x' = x + 0.7 pull: nothing of it stays but the displacement
    workers.x[:], workers.state[0][:] = [[1.0], [3.0]], [[0.2], [-0.3]]
    x = workers.step(np.array([[0.4], [0.6]]), 0.7)
    assert abs(x - [[1.45], [1.8]]).max() < 1e-15


@pytest.mark.parametrize("top", [g for g in GRAPHS if g.is_doubly_stochastic], ids=repr)
@pytest.mark.parametrize("method, nesterov", [("gasloc", True), ("noloco", False)])
def test_the_mean_is_torchs_sgd(method, nesterov, top):
    """At a constant rate, on every doubly stochastic graph; of gasloc that is DiLoCo's anchor."""
    n, x, y = top.n, start(top.n), inner(top.n)
    workers = Simulation(method, top, x, 0.5, 0.01)
    p = torch.nn.Parameter(torch.from_numpy(x.mean(axis=0)))
    sgd = torch.optim.SGD([p], lr=0.7, momentum=0.5, weight_decay=0.01, nesterov=nesterov)
    for _ in range(ROUNDS):
        g = workers.x - y(workers.x)
        p.grad = torch.from_numpy(np.array(g.mean(axis=0)))
        sgd.step()
        workers.step(g, 0.7)
        scale = abs(workers.x).max()
        assert abs(workers.x.mean(axis=0) - p.detach().numpy()).max() < 1e-12 * scale, n


def test_without_gradients_gasloc_is_decentlam():
    """On any graph and at any momentum, and noloco with gossip_rate 1 is too. (Double eigenvalues: to 1e-6.)"""
    for top in GRAPHS:
        for momentum in (0.5, 0.9):
            lam = consensus_growth("decentlam", top, momentum)
            assert consensus_growth("gasloc", top, momentum) == pytest.approx(lam, rel=1e-6, abs=1e-12)
            assert consensus_growth("noloco", top, momentum, gossip_rate=1.0) == pytest.approx(lam, rel=1e-6, abs=1e-12)


def mean_square_growth(n, momentum, rate):
    """Of the disagreement's mean square, a step on random pairs of n workers: by all pairings, as they are equally
    likely. x' = x + d', d' = momentum d + rate (W x - x) is both methods' step without gradients."""

    def pairings(left):
        if not left:
            yield []
        for j in left[1:]:
            for rest in pairings([i for i in left[1:] if i != j]):
                yield [(left[0], j), *rest]

    apart = np.linalg.qr(np.eye(n) - 1 / n)[0][:, : n - 1]  # what sums to zero
    moments = []
    for pairs in pairings(list(range(n))):
        W = np.eye(n)
        for i, j in pairs:
            W[np.ix_((i, j), (i, j))] = 0.5
        pull = rate * (apart.T @ W @ apart - np.eye(n - 1))
        step = np.block([[np.eye(n - 1) + pull, momentum * np.eye(n - 1)], [pull, momentum * np.eye(n - 1)]])
        moments.append(np.kron(step, step))
    return abs(np.linalg.eigvals(np.mean(moments, axis=0))).max()


@pytest.mark.parametrize("n", [2, 4, 6])
def test_the_largest_gossip_rate_on_random_pairs(n):
    """2 (1 - beta^2) / (1 - beta/(n - 1)), exactly; for many workers 2 (1 - beta^2)."""
    for momentum in (0.0, 0.3, 0.5, 0.9):
        limit = 2 * (1 - momentum**2) / (1 - momentum / (n - 1))
        assert mean_square_growth(n, momentum, 0.999 * limit) < 1 < mean_square_growth(n, momentum, 1.001 * limit)


# -- DiLoCo, SlowMo, local SGD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_diloco_is_nesterov_pmsgd(n):
    """AdamW inside, as in the paper. The reference is the loop of torchft and OpenDiLoCo: the mean of x - y is the
    gradient of torch.optim.SGD(lr=0.7, momentum=0.9, nesterov=True) at x. Every anchor of 50 rounds, to 1e-12."""
    problem, x0 = oracle.LeastSquares(n, seed=n), np.ones(3)

    def inner_steps():
        ys = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(n)]
        optimizers = [torch.optim.AdamW([y], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95)) for y in ys]

        def run(x):
            with torch.no_grad():
                for y, row in zip(ys, x, strict=True):
                    y.copy_(torch.as_tensor(np.array(row)))
            for k in range(H):
                grads = problem(k, np.stack([y.detach().numpy() for y in ys]))
                for y, optimizer, g in zip(ys, optimizers, grads, strict=True):
                    y.grad = torch.from_numpy(np.array(g))
                    optimizer.step()
            return np.stack([y.detach().numpy() for y in ys])

        return run

    theirs, run = torch.nn.Parameter(torch.from_numpy(x0.copy())), inner_steps()
    outer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    workers, ours_run = Simulation("nesterov-pmsgd", topology.full(n), np.tile(x0, (n, 1)), 0.9), inner_steps()
    for _ in range(50):
        x = theirs.detach().numpy().copy()
        theirs.grad = torch.from_numpy(np.mean([x - y for y in run(np.tile(x, (n, 1)))], axis=0))
        outer.step()
        workers.step(workers.x - ours_run(workers.x), 0.7)
        assert abs(workers.x - theirs.detach().numpy()).max() < 1e-12


# The anchors of two fragments in torchft's fixtures (diloco_regression_test, mocked updates, no delay): rounds of six
# inner steps of -2, the first of fragment 0 of three, outer SGD at rate 2; `mix` of y stays in the next round's start.
TORCHFT = {0.0: ([1, -11, -35], [1, -23, -47]), 0.5: ([1, -11, -29], [1, -23, -35])}


@pytest.mark.parametrize("mix", TORCHFT)
def test_torchfts_figures(mix):
    for fragment, anchors in enumerate(TORCHFT[mix]):
        workers, y = Simulation("psgd", topology.full(2), np.full((2, 1), 1.0)), 1.0
        for steps, anchor in zip([(3, 6), (6, 6)][fragment], anchors[1:], strict=True):
            y = y - 2.0 * steps
            workers.step(workers.x - y, 2.0)
            assert (workers.x == anchor).all()
            y = (1 - mix) * anchor + mix * y


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.5), (0.7, 0.9), (1.0, 0.0)])
def test_slowmo_is_outer_pmsgd(n, alpha, beta):
    """At a constant inner rate, to 1e-12; beta = 0 and alpha = 1 is periodic averaging, and then `dsgd` on `full`."""
    problem = oracle.LeastSquares(n, gradient_noise=0.3, seed=n)
    local = topology.full(n).every(H)
    around = [SlowMo(H, beta, alpha)]
    layer = simulate("dsgd", local, lambda k, x: problem(k % H, x), np.ones(3), H * ROUNDS, INNER_LR, layers=around)[
        ::H
    ]
    outer = ours("pmsgd", topology.full(n), np.ones((n, 3)), lambda k: alpha, beta)
    assert abs(layer - outer).max() < 1e-12
    if (alpha, beta) == (1.0, 0.0):
        averaged = ours("dsgd", topology.full(n), np.ones((n, 3)), lambda k: 1.0, beta)
        assert abs(averaged - outer).max() < 1e-12


# -- Factored Gossip DiLoCo --------------------------------------------------------------------------------------------


@jit
def send_both(x, g, s, h):
    return x, g


@jit
def update_factored(x, g, s, pull, h):
    mixed = g + pull[1]
    m = h.momentum * s.momentum_buffer + mixed
    return x + pull[0] - h.lr * (mixed + h.momentum * m), (m,)


one_graph = Rule("factored", send_both, update_factored, ("momentum_buffer",))


@pytest.mark.parametrize("top", GRAPHS, ids=repr)
def test_factored_gossip_diloco(top):
    """Mix1 alone is Nesterov's dmsgd under "awc", whatever the graph. Both mixings by one W are "atc", if W is the same
    in all rounds or without momentum; where it changes they take a rule of two messages, x and g. Mix2 by all-reduce,
    from equal anchors, is DiLoCo whatever Mix1 is."""
    n, W, lr = top.n, matrices(top), RATES["warm-up, cosine, zero"]
    none, all_of_them = (lambda k: np.eye(n)), (lambda k: np.full((n, n), 1 / n))
    x, y = start(n), inner(n)
    mix1 = ours("nesterov-dmsgd", top, x, lr, 0.9, schedule="awc")
    assert same(mix1, forms.factored(W, none, y, x, lr, 0.9))
    assert np.array_equal(mix1, ours("nesterov-awc-dmsgd", top, x, lr, 0.9))
    assert same(ours("dsgd", top, x, lr, 0.0), forms.factored(W, W, y, x, lr, 0.0))
    assert same(ours(one_graph, top, x, lr, 0.9), forms.factored(W, W, y, x, lr, 0.9))
    atc = ours("nesterov-dmsgd", top, x, lr, 0.9)
    changes = any(not np.array_equal(W(k), W(0)) for k in range(ROUNDS))
    assert same(atc, forms.factored(W, W, y, x, lr, 0.9), 1e-3 if changes else 1e-12) != changes
    alike = np.tile(x[:1], (n, 1))
    diloco = ours("nesterov-pmsgd", topology.full(n), alike, lr, 0.9)
    assert same(diloco, forms.factored(W, all_of_them, y, alike, lr, 0.9))
