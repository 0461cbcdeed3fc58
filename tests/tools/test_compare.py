"""Promises of `fused-dlam compare` and of what it computes:

- the limiting bias, solved for, is where a long simulation ends, to 1e-9 of the start's error, whatever is conserved;
- the paper's verification figures: DmSGD is faster than DSGD and more biased, DecentLaM as fast as DmSGD and as
  accurate as DSGD;
- every method of the optimizer can be compared;
- the command prints these figures, draws them, and tells what is wrong with a wrong call in one line.
"""

import math

import numpy as np
import pytest
from test_cli import assert_png, call, cells

from fused_dlam import rules, simulate, topology, verdict
from fused_dlam.theory.regression import Regression, limiting_bias
from fused_dlam.tools.cli import main


@pytest.fixture(scope="module")
def problem():
    return Regression(5, d=4, seed=1)


def test_gradient_and_optimum(problem):
    """The gradient is the derivative of the loss (central differences, 1e-6) and vanishes on average at the optimum."""
    x = np.random.default_rng(0).standard_normal((5, 4))
    loss = lambda x: np.einsum("nd,nde,ne->n", x, problem.H, x) / 2 - (problem.c * x).sum(1)  # noqa: E731
    for i in range(4):
        step = 1e-6 * np.eye(4)[i]
        assert (loss(x + step) - loss(x - step)) / 2e-6 == pytest.approx(problem.grad(x)[:, i], abs=1e-6)
    at_optimum = problem.grad(np.tile(problem.optimum, (5, 1)))
    assert abs(at_optimum.mean(axis=0)).max() < 1e-12 and problem.heterogeneity > 1
    many = problem.grad(np.stack([x, 2 * x], axis=1))
    assert np.allclose(many[:, 1], problem.grad(2 * x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "graph", "hyper"),
    [
        ("dsgd", topology.exponential(5), {}),
        ("dmsgd", topology.one_peer_exponential(5), {}),
        ("decentlam", topology.ring(5), {}),
        ("decentlam", topology.ring(5), {"schedule": "awc"}),
        ("pc-dmsgd", topology.one_peer_exponential(5), {}),
        ("pc-dmsgd", topology.one_peer_exponential(5), {"correction_gain": math.inf}),  # conserves the mean of p
        ("qg-dmsgd", topology.star(5), {}),
        ("exact-diffusion", topology.ring(5), {}),
        ("gradient-tracking", topology.exponential(5), {}),
        ("nids", topology.ring(5), {}),
        ("extra", topology.ring(5).every(2), {}),
        ("led", topology.ring(5).lazy().every(3), {}),
        ("proxskip", topology.one_peer_exponential(5), {"probability": 0.5}),
        ("k-gt", topology.ring(5).every(3), {}),
        ("pmsgd", topology.ring(5), {}),
    ],
    ids=str,
)
def test_the_fixed_point_is_where_the_workers_end(problem, method, graph, hyper):
    solved = limiting_bias(method, graph, problem, 0.01, 0.8, **hyper)
    x = simulate(method, graph, lambda k, x: problem.grad(x), np.zeros((5, 4)), 6000, 0.01, 0.8, **hyper)
    assert solved == pytest.approx(problem.error(x[-graph.period :]).mean(), rel=1e-6, abs=1e-9)


def test_a_limit_is_one_without_chances(problem):
    with pytest.raises(ValueError, match="a limit is solved for without loss, participation, delay and noise"):
        limiting_bias("dsgd", topology.ring(5), problem, 0.01, loss=0.1)


def test_what_diverges_has_no_bias(problem):
    assert limiting_bias("decentlam", topology.one_peer_exponential(5), problem, 0.01, 0.9) == math.inf
    assert limiting_bias("dsgd", topology.ring(5), problem, 10.0) == math.inf


def test_the_command_reproduces_the_papers_figures(tmp_path):
    text = call("compare", "--out", tmp_path / "out.png", "--topology", "symmetric-exponential")
    rows = {name: cells(text, name) for name in ("pmsgd", "dsgd", "dmsgd", "decentlam")}
    steps = {name: [math.inf if c == "never" else int(c) for c in row[2:7]] for name, row in rows.items()}
    final = {name: float(row[7]) for name, row in rows.items()}
    assert steps["decentlam"][3] <= 1.05 * steps["pmsgd"][3] < steps["dsgd"][3] / 9  # to 1e-4: fast
    assert steps["dmsgd"][1] < steps["dsgd"][1] / 9 and steps["dmsgd"][4] == math.inf  # fast and biased
    assert final["dmsgd"] > 30 * final["dsgd"] and final["decentlam"] == pytest.approx(final["dsgd"], rel=0.05)
    assert_png(tmp_path / "out.png")


def test_divergence_is_said_and_drawn(tmp_path):
    settings = ("-n", 8, "--steps", 400, "--out", tmp_path / "out.png", "--topology", "one_peer_exponential", "ring")
    text = call("compare", "decentlam", "da-dmsgd", *settings)
    assert [line for line in text.splitlines() if "decentlam" in line and "diverges" in line]
    assert_png(tmp_path / "out.png")


def test_every_method_is_compared(tmp_path):
    """Adam's and Nesterov's too; the help names them all."""
    text = call("compare", *rules.ALL, "--topology", "ring", "--steps", 70, "--out", tmp_path / "out.png")
    for name, rule in rules.ALL.items():
        row = cells(text, name)
        assert row[0] == ("all-reduce" if name == "pmsgd" else "ring") and len(row) >= 8, rule


def test_what_goes_wrong_is_compared(tmp_path):
    """The error is that of a simulation with the same chances, and the growth is the verdict's."""
    settings = ("--topology", "ring", "-n", 5, "--steps", 300, "--out", tmp_path / "out.png")
    schemes = {"loss": 0.2, "loss_of": "pairs", "participation": 0.8, "noise": 0.01}
    given = [word for name, value in schemes.items() for word in (f"--{name.replace('_', '-')}", value)]
    text = call("compare", "dsgd", "exact-diffusion", *settings, *given)
    assert "has 20 % of the pairs lost, 20 % of the workers absent, noise 0.01 on messages." in text
    problem, graph = Regression(5), topology.ring(5)
    x = simulate("dsgd", graph, lambda k, x: problem.grad(x), np.zeros((5, 10)), 300, 2e-3, 0.9, seed=3, **schemes)
    quiet = {name: value for name, value in schemes.items() if name != "noise"}
    growth, error = verdict("dsgd", graph, 0.9, seed=3, **quiet)
    row = cells(text, "dsgd")
    assert row[1] == f"{growth:.3f} ± {error:.3f}" and row[7] == f"{problem.error(x[1:])[-64:].mean():.1e}"
    assert cells(text, "pmsgd")[1] == "0.000"
    late = call("compare", "dsgd", *settings, "--delay", 2)
    assert "has messages 2 steps late." in late
    assert cells(late, "dsgd")[1] == f"{verdict('dsgd', graph, 0.9, delay=2).growth:.3f}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lion"], "unknown method 'lion'"),
        (["--topology", "circle"], "unknown topology 'circle'"),
        (["--lr", "-1"], "--lr must be a positive number"),
        (["--momentum", "1"], "--momentum must be from 0 to below 1"),
        (["--loss", "1.5"], "loss must be a probability, from 0 to 1, not 1.5"),
        (["--delay", "-1"], "delay must be an integer >= 0"),
        (["da-dmsgd", "--schedule", "awc"], "'awc' needs a method with one message"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count("\n") == 1
