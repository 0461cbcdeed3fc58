"""A worker is killed, and those that are left follow the equations, float64, to 1e-12 of every step.

Promise: each of them takes one local step in every step. In the broken step who had combined keeps what it had, the
others get no pull; who is behind takes steps alone until all are at the largest. Before that one MI-DmSGD's p is
centered over those that are left, and from it on they average over the graph of their number. Who had combined is a
matter of timing, so the workers tell; the rest is computed here, written from the equations, with dense matrices.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from everyday import everyday
from recovery_run import DIMENSION, problem

from fused_dlam import topology
from fused_dlam.rules.mi_dmsgd import auto_displacement_rate

NOBODY = -1
STEPS, DIES_AT, LR, BETA, KAPPA = 24, 9, 0.05, 0.9, 300.0
THETA = {"atc": 1.0, "midpoint": 0.5, "awc": 0.0}
CASES = [("mi-dmsgd", "midpoint", 4, 1), ("mi-dmsgd", "awc", 3, 0), ("dmsgd", "atc", 5, 2)]


@pytest.mark.parametrize("method, schedule, n, victim", everyday(CASES, CASES[:1]))
def test_survivors_follow_the_equations(tmp_path, method, schedule, n, victim):
    assert error_of(tmp_path, method, schedule, n, victim) < 1e-12


@pytest.mark.parametrize("method, schedule, n, victim", everyday(CASES, CASES[1:2]))
def test_where_the_device_waits_and_hears_nothing_too(tmp_path, method, schedule, n, victim):
    """As over NCCL: see streamed_transport.py."""
    assert error_of(tmp_path, method, schedule, n, victim, STREAMED="1") < 1e-12


@pytest.mark.slow
def test_combined_before_it_is_there_it_is_another_run(tmp_path):
    """The negative control: a host that does not wait for the device. Nobody dies."""
    with pytest.raises(AssertionError):
        assert error_of(tmp_path, "mi-dmsgd", "midpoint", 4, NOBODY, STREAMED="careless") < 1e-3
    assert error_of(tmp_path, "mi-dmsgd", "midpoint", 4, NOBODY, STREAMED="1") < 1e-12


def error_of(tmp_path, method, schedule, n, victim, **environment):
    """The largest of all steps and survivors."""
    command = [sys.executable, str(Path(__file__).with_name("recovery_run.py")), str(tmp_path), method, schedule]
    done = subprocess.run(
        [*command, *map(str, (n, victim, DIES_AT, STEPS))],
        timeout=180,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = {i: torch.load(tmp_path / f"{i}.pt") for i in range(n) if i != victim}
    survivors = tuple(ends)
    assert {end["members"] for end in ends.values()} == {survivors}
    events = {event for end in ends.values() for event in end["events"]}
    ((resumes, members),) = events if victim != NOBODY else {(STEPS, survivors)}
    assert members == survivors and (DIES_AT <= resumes <= DIES_AT + 4 or victim == NOBODY)
    combined = {i: end["combined"] for i, end in ends.items()}
    assert all(len(steps) == STEPS for steps in combined.values())  # one local step each
    assert all(all(steps[:DIES_AT]) and all(steps[resumes:]) for steps in combined.values())
    found = np.stack([ends[i]["path"].numpy() for i in survivors], 1)
    expected = dense(method, schedule, n, victim, resumes, combined)
    return np.abs(found - expected[:, list(survivors)]).max()


def dense(method, schedule, n, victim, resumes, combined):
    """[STEPS + 1, n, d]; the victim's rows are of no meaning once it is dead."""
    A, b = (np.stack([problem(i)[k].numpy() for i in range(n)]) for k in (0, 1))
    x = np.ones((n, DIMENSION))
    m, p, path = np.zeros_like(x), np.zeros_like(x), [x]
    left = [i for i in range(n) if i != victim]
    for k in range(STEPS):
        members = list(range(n)) if k < resumes else left
        graph = topology.get("one-peer-exponential", len(members))
        if k == resumes and method == "mi-dmsgd":
            p[left] -= p[left].mean(0)
        e = auto_displacement_rate(BETA, graph.slowest_rho, graph.is_static) if method == "mi-dmsgd" else 0.0
        u = BETA * m + np.einsum("nij,nj->ni", A, x) - b
        d = p - LR * u
        q = x + THETA[schedule] * d
        W = np.eye(n)
        W[np.ix_(members, members)] = graph.weights(k)
        for i in left:
            if not combined[i][k]:
                W[i] = np.eye(n)[i]
        pull = W @ q - q
        x, m, p = x + d + pull, u, (1 - e / KAPPA) * p + e * pull
        path.append(x)
    return np.stack(path)
