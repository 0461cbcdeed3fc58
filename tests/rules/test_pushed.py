"""Promises about push-sum, Push-DIGing and push-pull, in float64 in one process:

- they are the papers' recursions in their own variables (oracle.py), to 1e-12, on graphs of any kind whose columns or
  rows sum to one: static, directed, one-peer, changing at every step, for 1 to 8 workers, rates and weight decay that
  change included; the control, masses left out, is 1e9 times as far off;
- on doubly stochastic graphs push-sum is DmSGD, and push-diging and push-pull are gradient tracking, digit by digit;
- sum_i w_i z_i moves as all-reduce momentum SGD, and the tracking methods end at the optimum to 1e-12;
- the certificates are those of the map of all workers, columns by columns of the simulator itself;
- a method that knows no masses refuses columns, and says what takes them.
"""

import math
from functools import partial

import networkx as nx
import numpy as np
import oracle
import pytest
import torch
from against_oracle import (
    LRS,
    column_stochastic,
    disagreement_with_oracle,
    doubly_stochastic,
    everything,
    pushed,
    row_stochastic,
)
from everyday import everyday

from fused_dlam import Rule, Topology, consensus_growth, jit, rate_limit, rules, simulate, topology
from fused_dlam.theory.simulator import Simulation


def drawn(n, step):
    """Columns that sum to one, of another graph in every step."""
    rng = topology.generator(11, step)
    A = rng.rand(n, n) * (rng.rand(n, n) < 0.4) + 0.5 * np.eye(n)
    return A / A.sum(axis=0)


def graphs(n):
    """Directed and static; by turns; columns, rows and both that change; one that never repeats."""
    line = nx.DiGraph([(i, (i + 1) % n) for i in range(n)] + [(i, 0) for i in range(n)])
    return [
        topology.push(line), topology.one_peer(topology.star(n)), topology.one_peer(topology.grid(n)).every(2),
        column_stochastic(n, 3), row_stochastic(n, 2), topology.one_peer_exponential(n),
        topology.changing(partial(drawn, n), n, name="drawn", sums="columns"),
    ]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("method", oracle.PUSHED)
def test_the_papers_on_every_kind_of_graph(method, n):
    for top in graphs(n):
        assert disagreement_with_oracle(method, "auto", top, everything, steps=120, momentum=0.8) < 1e-12, top


@pytest.mark.parametrize("lr", everyday(LRS, ["zero in the middle"]))
@pytest.mark.parametrize("method", oracle.PUSHED)
def test_every_learning_rate_schedule_and_momentum(method, lr):
    for momentum in (0.0, 0.95):
        for top in (column_stochastic(5, 4), topology.one_peer(topology.grid(6))):
            assert disagreement_with_oracle(method, "atc", top, LRS[lr], momentum=momentum) < 1e-11, (top, momentum)


def test_the_comparison_would_notice_masses_left_out():
    top = column_stochastic(5, 4)
    A, w = pushed(top)
    assert np.ptp(w) > 0.2
    grad = oracle.LeastSquares(5)
    ours = simulate("push-sum", top, grad, np.zeros(3), 60, 0.05)
    right = oracle.run("push-sum", A, grad, np.zeros((5, 3)), lambda k: 0.05, 0.9, 0.0, steps=60, mass=w)
    wrong = oracle.run("push-sum", A, grad, np.zeros((5, 3)), lambda k: 0.05, 0.9, 0.0, steps=60)
    assert abs(ours - right).max() < 1e-12 < 1e-3 < abs(ours - wrong).max()


@pytest.mark.parametrize("kind", [np.float64, torch.float32])
def test_on_doubly_stochastic_graphs_they_are_known_methods(kind):
    """Bit by bit, with a rate and a momentum, in numpy and in torch."""
    top, grad = doubly_stochastic(5, 3), oracle.LeastSquares(5)
    pairs = [("push-sum", "dmsgd"), ("push-diging", "gradient-tracking"), ("push-pull", "gradient-tracking")]
    x0 = np.random.default_rng(0).standard_normal((5, 3))
    for ours, known in pairs:
        runs = []
        for method in (ours, known):
            start = x0 if kind is np.float64 else torch.tensor(x0, dtype=kind)
            workers = Simulation(method, top, start, 0.9, 0.01)
            for k in range(50):
                g = grad(k, np.asarray(workers.x, dtype=np.float64))
                workers.step(g if kind is np.float64 else torch.tensor(g, dtype=kind), 0.02)
            runs.append(np.asarray(workers.x))
        np.testing.assert_array_equal(*runs)


# -- unbiased ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [column_stochastic(5, 3), topology.one_peer(topology.grid(8)), row_stochastic(5, 2)])
def test_the_mass_weighted_mean_moves_as_all_reduce(top):
    """Momentum SGD on sum_i g_i / n, with each worker's gradient where it is; for Push-DIGing too."""
    n, grad = top.n, oracle.LeastSquares(top.n)
    for method in ("push-sum", "push-diging"):
        path = simulate(method, top, grad, np.zeros(3), 80, 0.02)
        mean, m = np.zeros(3), np.zeros(3)
        for k in range(80):
            m = 0.9 * m + grad(k, path[k]).mean(axis=0)
            mean = mean - 0.02 * m
            np.testing.assert_allclose(top.mass(k + 1) @ path[k + 1] / n, mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("top", [column_stochastic(5, 3), topology.one_peer(topology.grid(8)), row_stochastic(5, 2)])
def test_tracking_ends_at_the_optimum(top):
    grad = oracle.LeastSquares(top.n)
    for method in ("push-diging", "push-pull"):
        assert grad.error(simulate(method, top, grad, np.zeros(3), 1500, 0.03, momentum=0.5))[-1] < 1e-24, method
    biased = row_stochastic(5, 2)
    ends = [oracle.LeastSquares(5).error(simulate(m, biased, oracle.LeastSquares(5), np.zeros(3), 1500, 0.03, 0.5))[-1]
            for m in ("gradient-tracking", "push-diging")]  # fmt: skip
    assert ends[1] < 1e-24 < 1e-3 < ends[0]  # the same graph without masses


# -- certificates ------------------------------------------------------------------------------------------------------


def period_map(method, top, lr, h, momentum):
    """The simulator's own map over a period of all workers' values, column by column, gradients h x."""
    rule = rules.get(method)
    k, n = 1 + len(rule.state), top.n
    points = np.eye(k * n).reshape(k, n, k * n)
    workers = Simulation(rule, top, points[0], momentum)
    workers.state = rule.State(*points[1:])
    for _ in range(top.period):
        workers.step(h[:, None] * np.asarray(workers.x), lr)
    return np.stack([workers.x, *workers.state]).reshape(k * n, k * n)


@pytest.mark.parametrize("top", [column_stochastic(4, 3), topology.one_peer(topology.star(4)), row_stochastic(5, 2)])
def test_the_growth_is_that_of_the_whole_map(top):
    """Less the eigenvalue one of equal workers, and that of the sum of the tracked gradients, which is kept."""
    for method in oracle.PUSHED:
        values = abs(np.linalg.eigvals(period_map(method, top, 1.0, np.zeros(top.n), 0.7)))
        kept = 1 + len(rules.get(method).centered)
        assert np.sort(values)[-kept] == pytest.approx(1, abs=1e-6)
        expected = np.sort(values)[-kept - 1] ** (1 / top.period)
        assert consensus_growth(method, top, 0.7) == pytest.approx(expected, abs=1e-6), method
        # As if masses were one: the same, for in these methods nothing hears x without gradients.
        dsgd = np.sort(abs(np.linalg.eigvals(period_map("dsgd", top.as_rows, 1.0, np.zeros(top.n), 0))))
        ones = max(0.7, dsgd[-2] ** (1 / top.period))
        assert expected == pytest.approx(ones, abs=1e-6)


@pytest.mark.parametrize("curvature", [None, [1.0, 0.2, 2.0, 0.5]])
@pytest.mark.parametrize(
    "top", [column_stochastic(4, 3), topology.push(nx.DiGraph([(0, 1), (1, 2), (2, 3), (3, 0), (1, 0)]))]
)
def test_the_largest_rate_is_that_of_the_whole_map(top, curvature):
    """Stable just below it and not just above."""
    for method in oracle.PUSHED:
        limit = rate_limit(method, top, 0.5, curvature)
        h = np.ones(4) if curvature is None else np.array(curvature)
        assert 0 < limit < 10
        for share, grows in ((0.99, False), (1.01, True)):
            A = period_map(method, top, share * limit, h, 0.5)
            if method != "push-sum":  # sum of t stays zero: leave it out
                n, T = 4, np.kron(np.eye(3), np.eye(4))
                T[8:, 8:] = np.linalg.qr(np.column_stack([np.ones(n), np.eye(n)[:, :3]]))[0]
                keep = [i for i in range(12) if i != 8]
                A = (T.T @ A @ T)[np.ix_(keep, keep)]
            assert (abs(np.linalg.eigvals(A)).max() > 1) == grows, (method, share)


def test_rates_on_a_static_graph_are_those_of_divided_curvatures():
    """push-sum is DmSGD over R with curvatures h_i / w_i."""
    top = column_stochastic(4, 1)
    h = np.array([1.0, 0.2, 2.0, 0.5])
    ours = rate_limit("push-sum", top, 0.9, h)
    assert ours == pytest.approx(rate_limit("dmsgd", top.as_rows, 0.9, h / top.mass()), rel=1e-3)


def test_a_changing_graph_has_its_certificate():
    top, grad = topology.changing(partial(drawn, 4), 4, sums="columns"), oracle.LeastSquares(4)
    assert consensus_growth("push-diging", top, 0.5) == pytest.approx(max(top.rho, 0.5), abs=0.02)
    assert grad.error(simulate("push-diging", top, grad, np.zeros(3), 1200, 0.04, 0.5))[-1] < 1e-24


@pytest.mark.slow
@pytest.mark.parametrize("method", oracle.PUSHED)
def test_the_largest_rate_on_a_changing_graph(method):
    """Half of it ends, twice of it does not."""
    top = topology.changing(partial(drawn, 4), 4, sums="columns")
    limit = rate_limit(method, top, 0.5)
    for share, ends in ((0.5, True), (2.0, False)):
        path = simulate(method, top, lambda k, x: x, np.ones(2), 1500, share * limit, 0.5)
        assert (abs(path[-1]).max() < 1e-3) == ends


@jit
def send(x, g, s, h):
    return (x - h.lr * h.inverse_mass * (h.momentum * s.m + g),)


@jit
def update(x, g, s, pull, h):
    u = h.momentum * s.m + g
    return x - h.lr * h.inverse_mass * u + pull[0], (u - h.mass * h.inverse_lr * pull[0],)


def test_a_rule_of_a_users_own_that_hears_x():
    """Where momentum hears the pull, masses of one would tell another growth."""
    mine = Rule("mine", send, update, ("m",), derive=lambda h, memory: {"inverse_lr": 0.5 / h["lr"]},
                mass=("mass", "inverse_mass"))  # fmt: skip
    top = column_stochastic(4, 3)
    n, k = 4, 2
    points = np.eye(k * n).reshape(k, n, k * n)
    workers = Simulation(mine, top, points[0], 0.7)
    workers.state = mine.State(points[1])
    for _ in range(3):
        workers.step(np.zeros((n, k * n)), 1.0)
    A = np.stack([workers.x, *workers.state]).reshape(k * n, k * n)
    values = np.sort(abs(np.linalg.eigvals(A)))
    expected = values[-2] if abs(values[-1] - 1) < 1e-9 else values[-1]
    assert consensus_growth(mine, top, 0.7) == pytest.approx(expected ** (1 / 3), abs=1e-9)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_methods_without_masses_refuse_columns():
    top = column_stochastic(4, 2)
    message = "method 'mi-dmsgd' would lose what a worker sends. 'push-sum' divides by the masses"
    for call in (lambda: consensus_growth("mi-dmsgd", top), lambda: rate_limit("mi-dmsgd", top),
                 lambda: Simulation("mi-dmsgd", top, np.zeros((4, 1)))):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    assert consensus_growth("pmsgd", top) == 0.0  # averages gradients by all-reduce
    doubly = Topology(topology.ring(4).phases, "ring", sums="columns")
    assert consensus_growth("mi-dmsgd", doubly) == consensus_growth("mi-dmsgd", topology.ring(4))
    for schedule in ("awc", "midpoint"):
        with pytest.raises(ValueError, match="without masses.*'push-sum' is not one"):
            rules.get("push-sum").under(schedule)
    with pytest.raises(ValueError, match="mass names \\('weight',\\), but there are"):
        Rule("mine", send, update, ("m",), mass=("weight",))
    h = rules.get("push-diging").scalars(0.1, 0.9, 0.0, mass=(0.5, 0.25))
    assert (h.lr, h.inverse_mass, h.next_mass, h.change) == (0.2, 2.0, 0.25, 0.5)
    assert math.isclose(rules.get("push-pull").scalars(0.1, 0.9, 0.0, mass=(0.5, 0.25)).lr, 0.1)
