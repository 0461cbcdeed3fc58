"""Promises of GossipSGD on directed graphs that are not doubly stochastic, with four real processes in float64:

- push-sum, push-diging and push-pull are the papers' dense recursions (oracle.py) to 1e-12: columns that sum to one,
  static, by turns, other ones in every step, seldom, and rows that sum to one; with schedules, weight decay, missing
  gradients, ranks that run out of data, local steps and machines as workers;
- push-diging ends at the optimum of unlike data within 1e-12;
- a checkpoint goes on bit for bit where the graph never repeats;
- methods that know no masses are refused before anything is sent, also in a recovery's choice of a graph.
"""

import warnings

import numpy as np
import oracle
import push_workers
import pytest
import torch
from against_oracle import pushed
from push_workers import DECAY, LR, MOMENTUM, lr_at
from workers import run_together

from fused_dlam import GossipSGD, rules, topology
from fused_dlam.optim.succession import Succession

N, STEPS = 4, 30
MISSING = ((0, 0), (3, 1), (4, 1), (4, 2), (7, 0), (7, 1), (7, 2), (7, 3), (9, 2), (26, 3))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    GRAPHS = {f.__name__: f(N) for f in (push_workers.lopsided, push_workers.by_turns, push_workers.changing,
                                         push_workers.seldom, push_workers.rows)}  # fmt: skip
CASES = [(method, graph, {}, STEPS, ()) for method in oracle.PUSHED for graph in GRAPHS.values()]
CASES += [(method, GRAPHS[name], {}, STEPS, MISSING) for method in oracle.PUSHED for name in ("by_turns", "changing")]
CASES += [("push-sum", GRAPHS["changing"], {"overlap": True}, STEPS, ())]
COUNTS = (3, 1, 2, 4)
PAIR = topology.Topology([[[0.9, 0.5], [0.1, 0.5]], [[0.3, 0.4], [0.7, 0.6]]], "pair", sums="columns")
JOINED = (7, 4, 5, 7)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    return run_together(N, {
        "refused": (push_workers.refused,),
        "cases": (push_workers.train_each, CASES),
        "local": (push_workers.train, "push-sum", GRAPHS["by_turns"], {"local_steps": True}, 12, (), COUNTS),
        "end": (push_workers.settle, "push-diging", GRAPHS["by_turns"], 0.1, 500),
        "resumed": (push_workers.resumed, push_workers.changing, folder),
        "joined": (push_workers.joined, "push-diging", GRAPHS["by_turns"], JOINED),
        "machines": (push_workers.machines, "push-diging", PAIR, 20),
    })  # fmt: skip


def dense(method, graph, steps, lrs=lr_at, grad=None, n=N, **options):
    A, mass = pushed(graph)
    start = np.ones((n, push_workers.least_squares().c.shape[1]))
    return oracle.run(method, A, grad or push_workers.least_squares(), start, lrs, MOMENTUM, DECAY, steps=steps,
                      mass=mass, **options)  # fmt: skip


@pytest.mark.parametrize("k", range(len(CASES)), ids=lambda k: f"{CASES[k][0]}-{CASES[k][1].name}-{k}")
def test_the_papers_by_real_processes(told, k):
    method, graph, _, steps, missing = CASES[k]
    lacking = (lambda step: [r for s, r in missing if s == step]) if missing else None
    expected = dense(method, graph, steps, without=lacking)
    ours = np.stack([told["cases"][rank][k].numpy() for rank in range(N)], axis=1)
    assert abs(ours - expected).max() < 1e-12
    assert np.ptp(ours[-1], axis=0).max() > 1e-4  # workers differ, or there is nothing to see


def test_unlike_data_have_no_bias(told):
    optimum = push_workers.least_squares().optimum
    for rank in range(N):
        assert abs(told["end"][rank].numpy() - optimum).max() < 1e-12


def test_local_steps(told):
    """Between two exchanges worker i takes c_i steps at the rate lr c / c_i / w_i, c the mean: the dense statement."""
    graph, grad, c = GRAPHS["by_turns"], push_workers.least_squares(), np.array(COUNTS)
    A, w = pushed(graph)
    x, m, s_last = np.ones((N, grad.c.shape[1])), np.zeros((N, grad.c.shape[1])), np.ones(N)
    for k in range(12):
        lr, s, x_0 = lr_at(k), c.mean() / c, x
        x = x.copy()
        for taken in range(c.max() - 1):
            g = grad(0, x)
            for i in np.flatnonzero(c - 1 > taken):
                m[i] = MOMENTUM * m[i] + g[i] + DECAY * x[i]
                x[i] = x[i] - s_last[i] * lr / w[i] * m[i]
        g = grad(0, x)
        x = x_0 + (s / s_last)[:, None] * (x - x_0)
        m = MOMENTUM * m + g + DECAY * x
        moved, before = A(k) @ (w[:, None] * x - s[:, None] * lr * m), w
        w = A(k) @ before
        x, s_last = moved / w[:, None], s
        ours = np.stack([told["local"][rank][k + 1].numpy() for rank in range(N)])
        assert abs(ours - x).max() < 1e-12, k


def test_ranks_that_run_out_of_data(told):
    """Who is through takes no local step; its tracked gradient goes on, as that of one whose gradient is zero."""
    steps = max(JOINED)
    expected = dense("push-diging", GRAPHS["by_turns"], steps, lambda k: LR,
                     without=lambda k: [rank for rank in range(N) if k >= JOINED[rank]])  # fmt: skip
    for rank in range(N):
        x, taken = told["joined"][rank]
        assert taken == steps and abs(x.numpy() - expected[-1, rank]).max() < 1e-12


def test_machines_have_masses(told):
    """Ranks 0 and 1 are worker 0, whose gradient is their mean."""
    ranks = push_workers.least_squares()

    def grad(step, x):
        return ranks(0, np.repeat(x, 2, axis=0)).reshape(2, 2, -1).mean(axis=1)

    expected = dense("push-diging", PAIR, 20, lambda k: LR, grad, n=2)
    for rank in range(N):
        assert abs(told["machines"][rank].numpy() - expected[:, rank // 2]).max() < 1e-12


def test_a_checkpoint_goes_on(told):
    assert told["resumed"] == [True] * N


def test_methods_without_masses_are_refused(told):
    for said in told["refused"]:
        assert len(said) == 4 and all("'push-sum' divides by the masses" in text for text in said)
        assert "method 'mi-dmsgd' would lose" in said[0] and "method 'gossip' would lose" in said[2]


def test_the_graph_of_a_recovery():
    """The same function for fewer workers; for a method without masses one of the substitutes."""
    groups = [{"momentum": 0.9, "lr": 0.1}]
    graph = Succession(push_workers.lopsided, rules.get("push-sum"), groups=lambda: groups)(3)
    assert (graph.n, graph.name, graph.sums) == (3, "lopsided", "columns")
    for rule in (rules.get("dmsgd"), None):
        assert Succession(push_workers.lopsided, rule, True, lambda: groups)(3).name == "one-peer-exponential"


def test_one_worker_is_torch_sgd():
    ours, theirs = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    one = GossipSGD([ours], lr=0.1, weight_decay=0.1, method="push-sum", topology=push_workers.changing)
    two = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.1)
    for k in range(6):
        ours.grad, theirs.grad = (torch.arange(4.0) - k for _ in range(2))
        one.step()
        two.step()
    assert torch.allclose(ours, theirs, rtol=1e-6)
