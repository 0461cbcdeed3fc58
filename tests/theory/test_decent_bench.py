"""Promise, where decent-bench is installed (`pip install decent-bench`; it needs Python 3.13, so CI, which has none,
skips this file): on quadratics with unlike workers simulations are what decent-bench 0.3.0 computes, entry by entry and
step by step, to 1e-11 of the largest value, for all methods that both have. It runs as a program of its own
(decent_bench_program.py); nothing of its text is here.

Aug-DGM is here as a rule of two steps, for it needs two exchanges in turn; what the rules of the package have that
decent-bench has not (momentum, directed graphs, graphs that change) is compared with plain loops elsewhere.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from fused_dlam import Rule, jit, simulate, topology

STEPS, LR = 60, 0.05
HERE = Path(__file__).resolve().parent


@jit
def send_aug_dgm(x, g, s, h):
    y = s.tracking + h.begins * g
    return (h.moves * (x - h.lr * y) + h.tracks * (s.tracking + g - s.gradient),)


@jit
def update_aug_dgm(x, g, s, pull, h):
    y = s.tracking + h.begins * g
    new = s.tracking + g - s.gradient + pull[0]
    moved = x - h.lr * y + pull[0]
    kept = s.gradient + h.begins * g
    return h.moves * moved + h.tracks * x, (h.moves * y + h.tracks * new, h.moves * kept + h.tracks * g)


def in_turns(h, memory):
    """x' = W (x - lr y) in one step, y' = W (y + g' - g) in the next, where g' is at x'. At first y is g."""
    memory["turn"], begins = 1.0 - memory.get("turn", 0.0), float("turn" not in memory)
    return {"begins": begins, "moves": memory["turn"], "tracks": 1.0 - memory["turn"]}


AUG_DGM = Rule("aug-dgm", send_aug_dgm, update_aug_dgm, ("tracking", "gradient"), derive=in_turns)

K = 4
CASES = {  # theirs, its arguments; ours, its graph, schedule and hyper-parameters; our steps for one of theirs
    "ATC": ({}, "dsgd", lambda g: g, {}, 1),
    "DGD": ({}, "dsgd", lambda g: g, {"schedule": "awc"}, 1),
    "ED": ({}, "exact-diffusion", lambda g: g, {}, 1),
    "NIDS": ({}, "nids", lambda g: g, {}, 1),
    "EXTRA": ({}, "extra", lambda g: g, {}, 1),
    "ATC_Tracking": ({}, "gradient-tracking", lambda g: g, {}, 1),
    "AugDGM": ({}, AUG_DGM, lambda g: g, {}, 2),
    "KGT": ({"num_local_steps": K, "aux_step_size": 1.0}, "k-gt", lambda g: g.every(K), {}, K),
    "LED": ({"num_local_steps": K, "aux_step_size": 1 / K}, "led", lambda g: g.every(K), {}, K),
    "ProxSkip": ({"comm_probability": 1.0, "aux_step_size": 0.3}, "proxskip", lambda g: g, {"probability": 0.3}, 1),
}


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    n, d = 7, 3
    B = random.standard_normal((n, d, d))
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 0), (0, 3), (1, 5)])
    return {
        "graph": graph,
        "A": B @ B.transpose(0, 2, 1) / d + 0.3 * np.eye(d),
        "b": random.standard_normal((n, d)),
        "x0": np.tile(random.standard_normal(d), (n, 1)),
    }


@pytest.fixture(scope="module")
def theirs(problem):
    if importlib.util.find_spec("decent_bench") is None:
        pytest.skip("decent-bench is not installed: pip install decent-bench, with Python 3.13")
    runs = [[name, {"step_size": LR, **arguments}, STEPS] for name, (arguments, *_) in CASES.items()]
    given = {"edges": [list(edge) for edge in problem["graph"].edges], "runs": runs}
    given |= {name: problem[name].tolist() for name in ("A", "b", "x0")}
    program = subprocess.run(
        [sys.executable, HERE / "decent_bench_program.py"],
        input=json.dumps(given), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert program.returncode == 0, program.stderr
    return json.loads(program.stdout)


def ours(problem, name):
    _, method, of, options, steps = CASES[name]

    def grad(step, x):
        return np.einsum("nde,ne->nd", problem["A"], x) + problem["b"]

    graph = of(topology.from_networkx(problem["graph"]))
    path = simulate(method, graph, grad, problem["x0"], STEPS * steps, LR, 0.0, **options)
    return path[::steps] if method is not AUG_DGM else np.concatenate([path[:1], path[1::2]])


def test_the_weights_are_the_same(problem, theirs):
    weights = topology.from_networkx(problem["graph"]).weights()
    assert abs(weights - np.array(theirs["weights"])).max() < 1e-15


@pytest.mark.parametrize("name", CASES)
def test_a_simulation_is_what_decent_bench_computes(problem, theirs, name):
    want = np.array(theirs["paths"][list(CASES).index(name)])
    error = abs(ours(problem, name) - want).max() / abs(want).max()
    print(f"{name}: {error:.1e} with decent-bench {theirs['version']}")
    assert error < 1e-11 and abs(want[-1] - want[0]).max() > 0.1


def test_aug_dgm_is_its_papers_recursion(problem):
    """Without decent-bench too: x' = W (x - lr y), y' = W (y + g' - g) from y = g, to 1e-12; a step takes two."""
    W = topology.from_networkx(problem["graph"]).weights()
    x = problem["x0"]

    def grad(x):
        return np.einsum("nde,ne->nd", problem["A"], x) + problem["b"]

    y, path = grad(x), [x]
    for _ in range(STEPS):
        before, x = x, W @ (x - LR * y)
        y = W @ (y + grad(x) - grad(before))
        path.append(x)
    assert abs(ours(problem, "AugDGM") - np.stack(path)).max() < 1e-12
