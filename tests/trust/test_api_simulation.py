"""Promises about the simulator and the certificates, whatever they are asked for:

- `simulate` is the methods as their papers state them (tests/oracle.py), for any number of workers, graph, schedule and
  hyper-parameter that is accepted; what is not is refused in words before the first step;
- `consensus_growth` and `rate_limit` are numbers of at least 0, or words; the limit agrees with the dense statements of
  tests/theory/dense_statements.py: below it nothing grows, right above it something does.
"""

import math

import dense_statements
import numpy as np
import oracle
import torch
from api_examples import fuzzed, refused
from hypothesis import assume
from hypothesis import strategies as st

from fused_dlam import Simulation, Topology, consensus_growth, rate_limit, rules, simulate, topology
from fused_dlam.layers import Lars, SlowMo

ODD = st.sampled_from(
    [-1, -1e-9, 1, 1.5, True, None, "0.1", "auto", "", float("nan"), float("inf"), -float("inf"), np.float32(0.5),
     [0.1], np.array([0.5]), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5, 0.5]), 1j, 10**400, {},
     object(), b"1"]
)  # fmt: skip
# Not below 1e-6 but zero: some methods divide what a step has moved by its rate, and the rounding with it.
RATE = st.sampled_from([0.0, 1e-6, 1e-3, 0.05, 0.1, 0.3]) | st.floats(1e-4, 0.5)
MOMENTUM = st.sampled_from([0.0, 0.5, 0.9, 0.99]) | st.floats(0, 0.999)
METHOD = st.sampled_from(sorted(rules.ALL))
HYPER = {
    "mu": st.floats(0, 1, exclude_max=True), "correction_rate": st.floats(0.01, 0.5),
    "correction_gain": st.floats(2, 1000), "beta2": st.floats(0.5, 0.9999), "eps": st.floats(1e-8, 0.1),
    "probability": st.floats(0.05, 1.0), "gossip_rate": st.floats(0.05, 1.5),
}  # fmt: skip


@st.composite
def graphs(draw, most=8):
    n = draw(st.integers(1, most))
    names = [name for name in topology.FAMILY if "hypercube" not in name or n & (n - 1) == 0]
    graph = topology.FAMILY[draw(st.sampled_from(names))](n)
    change = draw(st.sampled_from(["", "", "lazy", "every", "with_global_average", "row stochastic"]))
    if change == "row stochastic":
        W = np.random.default_rng(draw(st.integers(0, 99))).random((n, n)) + np.eye(n)
        return Topology(W / W.sum(1, keepdims=True))
    return getattr(graph, change)(*((2,) if change != "lazy" else ())) if change else graph


def hypers(draw, method):
    chosen = {name: draw(HYPER[name]) for name in rules.ALL[method].hyper if draw(st.booleans())}
    return chosen if draw(st.booleans()) else {}


@fuzzed(30, 0.1, graph=graphs(), method=METHOD, schedule=st.sampled_from(["auto", "atc", "midpoint", "awc"]),
        momentum=MOMENTUM, weight_decay=st.sampled_from([0.0, 0.01, 1.0]), rates=st.lists(RATE, min_size=1, max_size=4),
        slowmo=st.none() | st.tuples(st.integers(1, 4), st.floats(0, 0.9), st.floats(0.1, 1.5)),
        lars=st.none() | st.floats(1e-3, 1), spikes=st.booleans(), data=st.data())  # fmt: skip
def test_simulate(graph, method, schedule, momentum, weight_decay, rates, slowmo, lars, spikes, data):
    hyper, steps = hypers(data.draw, method), 8
    grad = oracle.LeastSquares(graph.n, gradient_noise=0.3, seed=graph.n)
    x0 = np.random.default_rng(1).standard_normal((graph.n, 3))
    x0 = x0[0] if data.draw(st.booleans()) else x0
    layers = ([] if lars is None else [Lars(lars)]) + ([] if slowmo is None else [SlowMo(*slowmo)])

    def lr(k):
        return rates[k % len(rates)]

    with np.errstate(over="ignore", invalid="ignore"):
        ours, error = refused(
            lambda: simulate(
                method, graph, grad, x0, steps, lr, momentum, weight_decay, schedule, layers=layers,
                clip="spikes" if spikes else None, **hyper,
            )
        )  # fmt: skip
    if error is not None:
        assert "schedule" in str(error), error
        return
    own = {**hyper}
    if "correction_rate" in rules.ALL[method].hyper:
        own.setdefault("correction_rate", oracle.auto_rate(method, graph, momentum))
    theirs = oracle.run(
        method, graph.weights, grad, np.broadcast_to(x0, (graph.n, 3)), lr, momentum, weight_decay, steps=steps,
        schedule=schedule, slowmo=slowmo, lars=None if lars is None else (lars, None),
        spikes=[slice(0, 3)] if spikes else None, **own,
    )  # fmt: skip
    assume(np.isfinite(theirs).all())
    scale = np.maximum.accumulate(abs(theirs).max(axis=(1, 2)))
    assert (abs(ours - theirs).max(axis=(1, 2)) <= 1e-7 * scale).all(), abs(ours - theirs).max()


SOMETHING = ("method", "topology", "x0", "steps", "lr", "momentum", "weight_decay", "schedule", "layers", "clip",
             "grad", "mu", "correction_rate", "unknown", "lars", "slowmo")  # fmt: skip
STARTS = st.sampled_from(
    [np.ones(3), np.ones((4, 3)), np.ones((5, 3)), np.ones((4, 0)), np.ones((4, 2, 2)), np.ones(()), [], [[1, 2]] * 4,
     [[1], [1, 2]], np.ones((4, 3), int), np.ones((4, 3), complex), np.full((4, 3), "1"), np.full((4, 3), None),
     np.full((4, 3), np.nan), torch.ones(4, 3), None, "x", np.ones((0, 3))]
)  # fmt: skip
GRADIENTS = st.sampled_from(
    [lambda k, x: x[0], lambda k, x: None, lambda k, x: "x", lambda k, x: x.T, lambda k, x: torch.ones(x.shape),
     lambda k, x: x.tolist(), lambda k, x: 1j * x, lambda k, x: 1.0, None, 3]
)  # fmt: skip


@fuzzed(40, 0.06, wrong=st.dictionaries(st.sampled_from(SOMETHING), ODD, min_size=1, max_size=2), data=st.data(),
        method=st.sampled_from(["dmsgd", "mi-dmsgd", "qg-dmsgd", "adam"]), by_name=st.booleans())  # fmt: skip
def test_what_makes_no_sense(wrong, method, by_name, data):
    options = dict(method=method, topology="ring" if by_name else topology.ring(4), grad=lambda k, x: 0.5 * x,
                   x0=np.ones((4, 3)), steps=2, lr=0.1)  # fmt: skip
    options.update(wrong)
    if "x0" in wrong:
        options["x0"] = data.draw(STARTS)
    if "grad" in wrong:
        options["grad"] = data.draw(GRADIENTS)
    out, error = refused(lambda: simulate(**options))
    if error is None:
        finite = np.isfinite(np.array(options["x0"], dtype=np.float64)).all()
        assert out.dtype == np.float64 and out.ndim == 3 and (np.isfinite(out).all() or not finite), options
    x = data.draw(STARTS)
    made, error = refused(lambda: Simulation(method, "ring" if by_name else topology.ring(4), x))
    if error is None:
        g = data.draw(st.sampled_from([made.x, None, 3, "x", np.ones((4, 3)), torch.ones(4, 3), [[1.0] * 3] * 4]))
        refused(lambda: made.step(g, data.draw(ODD | RATE)))


@fuzzed(12, 0.05, graph=graphs(6), method=st.sampled_from(sorted(dense_statements.SCHEDULES)), momentum=MOMENTUM,
        scale=st.floats(0.1, 10), data=st.data())  # fmt: skip
def test_limits(graph, method, momentum, scale, data):
    schedule = data.draw(st.sampled_from(dense_statements.SCHEDULES[method]))
    growth = consensus_growth(method, graph, momentum, schedule=schedule)
    limit = rate_limit(method, graph, momentum, schedule=schedule)
    assert math.isfinite(growth) and growth >= 0 and math.isfinite(limit) and limit >= 0
    full = 2 * (1 + momentum) / (1 + 2 * momentum if method.startswith("nesterov-") else 1)
    if method.removeprefix("nesterov-") in ("dmsgd", "decentlam", "pc-dmsgd", "mi-dmsgd"):  # all-reduce's, for one
        assert limit <= full * (1 + 1e-3) and (graph.n > 1 or limit >= full * (1 - 1e-3))
    if graph.period is None:
        return
    same = rate_limit(method, graph, momentum, [scale] * graph.n, schedule=schedule)
    np.testing.assert_allclose(same * scale, limit, rtol=1e-3)
    assert growth <= 1 + 1e-9 or limit == 0
    Ws = np.stack([graph.weights(t) for t in range(graph.period)])
    own = dense_statements.correction(method, momentum, graph.slowest_rho, graph.is_static)
    h = np.array([0.5, 0.9, 1 - 1e-3, 1 + 1e-2])[:, None] * limit * np.ones(graph.n)
    *below, above = dense_statements.growth(method, schedule, Ws, h, momentum, **own)
    if limit > 0:
        assert max(below) <= 1 + 1e-6 and above > 1 - 1e-6, (below, above, limit)


CURVATURES = st.lists(st.sampled_from([0.0, 1.0, 3.0, 1e-3, 1e6, -1.0, float("nan"), "1", None]), max_size=6)


@fuzzed(40, 0.05, name=METHOD, graph=graphs(5) | ODD, momentum=MOMENTUM | ODD, data=st.data(),
        curvature=st.none() | ODD | CURVATURES)  # fmt: skip
def test_certificates_refuse_in_words(name, graph, momentum, curvature, data):
    names = st.sampled_from(["schedule", "correction_rate", "correction_gain", "mu", "unknown"])
    hyper = data.draw(st.dictionaries(names, ODD, max_size=1))
    if isinstance(graph, Topology) and data.draw(st.booleans()):
        curvature = data.draw(st.lists(st.floats(0, 10), min_size=graph.n, max_size=graph.n))
    growth, error = refused(lambda: consensus_growth(name, graph, momentum, **hyper))
    assert error is not None or (math.isfinite(growth) and growth >= 0)
    limit, error = refused(lambda: rate_limit(name, graph, momentum, curvature, **hyper))
    assert error is not None or limit >= 0
