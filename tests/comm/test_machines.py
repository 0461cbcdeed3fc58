"""Promises about machines as workers, with real processes over gloo, 2 x 2, 3 x 2 and 2 x 3 (machines x ranks):

- within 1e-5 of the dense float64 oracle in which a machine is one worker with the mean gradient of its ranks;
- the ranks of a machine are bit-equal after every step;
- all ranks of a machine together send one message per neighboring machine.
"""

import numpy as np
import oracle
import pytest
import torch
import workers
from test_processes import network_gradient

from fused_dlam import GossipSGD, topology
from fused_dlam.tools.launch import run_workers

STEPS = 20


def expected_path(method, graph, machine_of, schedule):
    ranks = len(machine_of)
    single = network_gradient(ranks)
    members = [[r for r in range(ranks) if machine_of[r] == m] for m in range(graph.n)]

    def grad(step, X):
        each = single(step, X[machine_of])
        return np.stack([each[m].mean(axis=0) for m in members])

    hyper = {"correction_rate": oracle.auto_rate(method, graph, 0.9)} if method in ("pc-dmsgd", "mi-dmsgd") else {}
    x0 = np.tile(workers.trained(workers.Tied(torch.float64)).numpy(), (graph.n, 1))
    return oracle.run(
        method, graph.weights, grad, x0, workers.lr_at, 0.9, 1e-2, steps=STEPS, schedule=schedule, **hyper
    )


CASES = [
    (2, 2, False, {"method": "pc-dmsgd"}),
    (3, 2, False, {"method": "decentlam", "topology": "ring"}),  # on three machines W = J: by all-reduce
    (2, 3, True, {"method": "da-dmsgd"}),
    (3, 2, True, {"method": "pc-dmsgd", "schedule": "awc"}),
    (3, 2, False, {"method": "dmsgd", "overlap": False, "topology": "one-peer-exponential"}),
]


@pytest.fixture(scope="module")
def of_ranks():
    """By case, what the ranks return; those of as many ranks share processes."""
    out = {}
    for ranks in sorted({n * size for n, size, *_ in CASES}):
        calls = {
            str(case): (workers.machines, case[1], case[3], case[2]) for case in CASES if case[0] * case[1] == ranks
        }
        out |= workers.run_together(ranks, calls)
    return out


@pytest.mark.parametrize("n, size, use_mesh, options", CASES)
def test_machines_follow_the_oracle(n, size, use_mesh, options, of_ranks):
    name = options.get("topology", "one-peer-exponential")
    graph = topology.FAMILY[name](n)
    machine_of = [r % n if use_mesh else r // size for r in range(n * size)]
    expected = expected_path(options["method"], graph, machine_of, options.get("schedule", "auto"))
    results = of_ranks[str((n, size, use_mesh, options))]
    for rank, (path, sent, moved, distance) in enumerate(results):
        machine = machine_of[rank]
        first = results[machine_of.index(machine)][0]
        assert torch.equal(path[1:], first[1:]), "ranks of a machine differ"
        assert abs(path[-1].double().numpy() - expected[-1, machine]).max() < 1e-5
        if not graph.averages_exactly():
            messages = 2 if options["method"] == "da-dmsgd" else 1
            steps = [len(graph.peers(machine, t).destinations) for t in range(STEPS)]
            ahead = steps[-1] if options.get("schedule") == "awc" else 0
            assert sent[-1] * size == (sum(steps) + ahead) * moved * messages
        disagreement = np.sqrt(((expected[-1] - expected[-1].mean(0)) ** 2).sum(-1).mean())
        assert distance == pytest.approx(disagreement, rel=1e-3, abs=1e-6)


def test_what_is_no_set_of_machines_is_refused():
    """One process alone: hierarchical= has nothing to do, and is checked where there are ranks."""
    model = workers.Tied()
    assert GossipSGD(model.parameters(), hierarchical=True)._engine.place.alone
    for error in run_workers(workers.wrong_machines, 3):
        assert "to divide the 3 ranks" in error
