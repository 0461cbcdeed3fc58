"""Promise: nothing that the two certificates accept diverges.

A case is a linear gossip method under one of its schedules, a momentum, a random doubly stochastic sequence (directed,
symmetric, matchings, one peer, skipped exchanges), no curvature, equal or unlike curvature, and a learning rate. It is
accepted if `consensus_growth` is below one and the rate is below `rate_limit`. Then the dense matrix that the paper's
statement makes of a period must have no eigenvalue outside the unit circle.

Four rates are drawn for each method on a graph: two from all-reduce's range, two just below the limit. The stream is
one: by default its first 1,200 cases are tried, with -m slow 20,000, or as many as LINEAR_CASES says (100,000 take some
20 minutes). With -n0 -s it prints how many were accepted.
"""

import itertools
import os
import time
from collections import defaultdict

import networkx as nx
import numpy as np
import pytest
from dense_statements import SCHEDULES, correction, growth

from fused_dlam import Topology, consensus_growth, rate_limit, topology

METHODS = [(method, schedule) for method, schedules in SCHEDULES.items() for schedule in schedules]
RATES = 4
ROUNDING = 1e-7  # of eigenvalues next to a multiple one


def permutations(n, random, symmetric=False):
    """A mixture of random permutations, with any weight on the worker itself. Birkhoff: they can make any W."""
    own, count = random.random() ** 2, random.integers(1, 4)
    W = own * np.eye(n)
    for share in random.dirichlet(np.ones(count)):
        W += (1 - own) * share * np.eye(n)[random.permutation(n)]
    return (W + W.T) / 2 if symmetric else W


def matching(n, random):
    """Random pairs; with an odd number one worker is alone."""
    W, order, share = np.eye(n), random.permutation(n), random.choice([0.5, 0.5, random.random()])
    for i, j in order[: n // 2 * 2].reshape(-1, 2):
        W[i, i] = W[j, j] = 1 - share
        W[i, j] = W[j, i] = share
    return W


def sequence(random):
    """The matrices of one period."""
    n, kind = int(random.integers(2, 17)), random.integers(6)
    length = int(random.integers(2, 7))
    if kind == 0:
        return [permutations(n, random)]
    if kind == 1:
        return [permutations(n, random, symmetric=True)]
    if kind == 2:
        graph = nx.gnp_random_graph(n, random.uniform(0.1, 0.6), seed=int(random.integers(1 << 30)))
        graph.add_edges_from((i, int(random.integers(i))) for i in range(1, n))
        return [topology.metropolis_hastings(graph)]
    if kind == 3:
        return [permutations(n, random) for _ in range(length)]
    if kind == 4:
        return [matching(n, random) for _ in range(length)]
    build = random.choice([topology.one_peer_exponential, topology.exponential, topology.one_way_ring, topology.ring])
    return [phase.dense() for phase in build(n).phases]


def drawn(random):
    """A connected graph. In a third of them most steps, or a few, are local."""
    while True:
        Ws = sequence(random)
        if random.random() < 1 / 3:
            Ws = list(itertools.chain(*([W] + [np.eye(len(W))] * random.integers(0, 6) for W in Ws)))[:12]
        try:
            return Topology(Ws)
        except ValueError:  # not connected
            pass


def curvatures(n, kind, random):
    if kind == 0:
        return np.zeros(n)
    if kind == 1:
        return np.full(n, np.exp(random.normal()))
    h = np.exp(random.uniform(0.2, 3) * random.standard_normal(n))
    return h * (random.random(n) < random.choice([1.0, 1.0, 0.5])) if h.any() else h


def accepted(kind, random):
    """(method, schedule, matrices, h * lr of the accepted rates, beta, the correction's rate and gain)."""
    method, schedule = METHODS[random.integers(len(METHODS))]
    beta = float(random.choice([0.0, 0.95, random.uniform(0, 0.95)]))
    graph = drawn(random)
    h = curvatures(graph.n, kind, random)
    uniform, wide, near, nearer = random.random(RATES)
    range_of_all_reduce = 2 * (1 + beta) / max(h.max(), 1e-300)
    if consensus_growth(method, graph, beta, schedule=schedule) >= 1:
        return None
    limit = rate_limit(method, graph, beta, h, schedule=schedule)
    end = min(limit, 1e6)
    lrs = np.array([1.1 * uniform * range_of_all_reduce, 1e-4**wide * range_of_all_reduce,
                    end * (1 - 0.1 * near), end * (1 - 1e-3 * nearer)])  # fmt: skip
    lrs = np.array([1e-3, 0.1, 1.0, 10.0]) if kind == 0 else lrs[lrs < limit]
    hyper = correction(method, beta, graph.slowest_rho, graph.is_static)
    return method, schedule, np.stack([graph.weights(t) for t in range(graph.period)]), lrs[:, None] * h, beta, hyper


def check(count, seed=0):
    """Tries `count` cases. Those of one shape are tried in one go."""
    random, start = np.random.default_rng(seed), time.perf_counter()
    batches, tried = defaultdict(list), 0
    for index in range(count // RATES):
        case = accepted(index % 3, random)
        if case is not None and len(case[3]):
            batches[case[0], case[1], case[2].shape].append(case[2:])
            tried += len(case[3])
    worst, diverging = (0.0, ""), 0
    for (method, schedule, shape), cases in batches.items():
        repeat = [len(h) for _, h, _, _ in cases]

        def of_each(values, repeat=repeat):
            return np.repeat(np.array(values, dtype=float), repeat, axis=0)[..., None, None]

        Ws = np.moveaxis(of_each([c[0] for c in cases])[..., 0, 0], 1, 0)
        hyper = {name: of_each([c[3][name] for c in cases]) for name in cases[0][3]}
        found = growth(
            method, schedule, Ws, np.concatenate([c[1] for c in cases]), of_each([c[2] for c in cases]), **hyper
        )
        diverging += int((found >= 1 + ROUNDING).sum())
        worst = max(worst, (float(found.max()), f"{method}, {schedule}, {shape}, case {found.argmax()} of its shape"))
    seconds = time.perf_counter() - start
    print(f"\n{count:,} cases, {tried:,} accepted, {diverging} of these diverge; {seconds:.0f} s; the largest {worst}")
    assert worst[0] < 1 + ROUNDING, worst
    assert tried > count / 2


def test_nothing_accepted_diverges():
    check(1_200)


@pytest.mark.slow
def test_nothing_accepted_diverges_in_more_cases():
    check(int(os.environ.get("LINEAR_CASES", "20000")))
