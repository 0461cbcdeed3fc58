"""Promises of a step in which some workers have no gradient, for 3 and 4 gloo workers in float64.

- Every method follows its dense statement (oracle.py) within 1e-10, in both schedules, on graphs with several neighbors
  and with one, weight decay included.
- After one missing gradient in step 3 every method that promises zero bias ends at the mean of the workers' targets,
  within 1e-6: buffers whose sum over the workers is zero keep that sum.
"""

import functools
import math

import join_workers as workers
import numpy as np
import oracle
import pytest
from workers import run_together

from fused_dlam import rules, topology

STEPS, LONG = 12, 700
MISSING = ((0, 0), (3, 1), (4, 1), (4, 2), (7, 0), (7, 1), (7, 2), (9, 2))  # (step, rank)
VARIANTS = [(m, "auto") for m in rules.ALL] + [
    (m, "awc") for m in rules.ALL if m not in oracle.ONLY_ATC + oracle.ONLY_AWC
]
GRAPHS = ("ring", "one-peer-exponential")
DAILY = ("mi-dmsgd",)  # of the 700 steps; four workers take them with every method


@functools.cache
def cases(n):
    """The graphs in turn, three workers and four crosswise."""
    out = []
    for k, graph in enumerate(GRAPHS):
        for method, schedule in VARIANTS[(k + n + 1) % 2 :: 2]:
            options = {"topology": graph, "schedule": schedule, "allow_unstable": True}
            if "correction_rate" in rules.ALL[method].hyper:
                options["correction_rate"] = 0.04
            out.append((method, options, MISSING))
    return out


def no_bias(n):
    """Methods without bias, with settings under which they reach 1e-6 in time. Three on a ring average exactly."""
    # mi-adamw ends where the workers' steps sum to zero, not their gradients.
    methods = [m for m, rule in rules.ALL.items() if rule.centered and rule.counts is None]
    out = []
    for k, method in enumerate(methods):
        if n == 3 and method not in DAILY:
            continue
        options = {"topology": GRAPHS[k % 2 if n == 4 else 1], "allow_unstable": True, "lr": 0.1}
        if "correction_gain" in rules.ALL[method].hyper:
            options["correction_gain"] = math.inf
        out.append((method, options))
    return out


@functools.cache
def results(n):
    return run_together(
        n, {"path": (workers.lacking, cases(n), STEPS), "end": (workers.ends, no_bias(n), LONG)}, deadline=400
    )


def numbered(of):
    """(n, i) for each case i of n workers."""
    return [
        pytest.param(n, i, id=f"{n}-{case[0]}-{'-'.join(map(str, list(case[1].values())[:2]))}", marks=marks)
        for n, marks in ((3, ()), (4, pytest.mark.slow))
        for i, case in enumerate(of(n))
    ]


@pytest.mark.parametrize("n, i", numbered(cases))
def test_every_method_follows_its_statement(n, i):
    method, options, _ = cases(n)[i]
    top = topology.get(options["topology"], n)
    hyper = {k: v for k, v in options.items() if k == "correction_rate"}
    path = oracle.run(
        method, top.weights, workers.problem(n), np.ones((n, workers.DIMENSION)), lambda k: workers.LR,
        workers.MOMENTUM, workers.DECAY, steps=STEPS, schedule=options["schedule"],
        without=lambda k: [r for step, r in MISSING if step == k], **hyper,
    )  # fmt: skip
    for rank in range(n):
        got = results(n)["path"][rank][i].numpy()
        assert np.abs(got - path[:, rank]).max() <= 1e-10 * np.abs(path).max()


@pytest.mark.parametrize("n, i", numbered(no_bias))
def test_one_missing_gradient_leaves_no_bias(n, i):
    for end in (r[i] for r in results(n)["end"]):
        assert abs(end - (n - 1) / 2) < 1e-6
