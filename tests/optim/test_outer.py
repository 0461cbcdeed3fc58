"""Promises of `Gossip(inner, outer=..., every=H)`:

- with real processes, every outer method follows its float64 statement with the way of H inner steps for a gradient:
  within 1e-12 in float64, 1e-5 in float32 (AdamW inside), on directed and changing graphs, under schedules of the rate;
- H = 1 around plain SGD is the method itself;
- a round sends its message once, M bytes to one peer; under "awc" each of its steps sends its part, no step more than
  one bucket beyond M/H;
- unequal and changing H weigh all workers' data alike, as the statement has it;
- a checkpoint in the midst of a round goes on bit for bit;
- `averaged` and `consensus_distance` are of the parameters, in the midst of a round too;
- what a script writes into parameters between rounds is no way that was gone, or is refused while x is sent;
- what cannot be is refused before anything is sent.
"""

import math

import numpy as np
import oracle
import outer_workers as outer
import pytest
import torch
import workers
from everyday import everyday

import fused_dlam
from fused_dlam import Gossip, topology
from fused_dlam.optim.outer import advise

ROUNDS = 7
# inner, every, options, dtype, whether outer_lr is scheduled
CASES = {
    "DiLoCo": ("adamw", 3, {"outer": "nesterov-pmsgd", "topology": "full"}, "float64", True),
    "SlowMo": ("momentum", 2, {"outer": "pmsgd", "momentum": 0.5, "lr": 1.0}, "float64", False),
    "local AdamW": ("adamw", 3, {}, "float64", False),
    "local AdamW, awc": ("adamw", 3, {"schedule": "awc"}, "float64", False),
    "local AdamW, midpoint": ("adamw", 2, {"schedule": "midpoint", "topology": "exponential"}, "float64", False),
    "MI": ("adamw", 3, {"outer": "mi-dmsgd"}, "float64", True),
    "MI, awc": ("adamw", 3, {"outer": "mi-dmsgd", "schedule": "awc", "bucket_mb": 1e-5}, "float64", True),
    "MI, directed": ("momentum", 2, {"outer": "mi-dmsgd", "topology": "exponential"}, "float64", False),
    "MI, H = 1": ("adamw", 1, {"outer": "mi-dmsgd", "lr": 0.5}, "float64", False),
    "PC": ("sgd", 2, {"outer": "pc-dmsgd", "bucket_mb": 1e-5}, "float64", True),
    "DecentLaM": ("adamw", 2, {"outer": "decentlam", "topology": "symmetric-exponential"}, "float64", True),
    "two messages": ("adamw", 2, {"outer": "da-dmsgd", "topology": "ring"}, "float64", False),
    "GASLoC": ("adamw", 2, {"outer": "gasloc", "topology": "ring", "momentum": 0.5}, "float64", True),
    "NoLoCo": (
        "adamw", 3, {"outer": "noloco", "topology": "random-match", "momentum": 0.3, "allow_unstable": True},
        "float64", False,
    ),
    "float32": ("adamw", 3, {"outer": "mi-dmsgd"}, "float32", False),
    "float32, awc, 16-bit messages": (
        "sgd", 2, {"outer": "mi-dmsgd", "schedule": "awc", "comm_dtype": torch.bfloat16}, "float32", False,
    ),
    "int8": ("sgd", 2, {"outer": "mi-dmsgd", "compress": "int8"}, "float32", False),
    "16-bit parameters": ("sgd", 3, {"outer": "dsgd", "lr": 1.0}, "bfloat16", False),
}  # fmt: skip
PLAIN = [("dmsgd", "exponential"), ("mi-dmsgd", "one-peer-exponential"), ("pmsgd", "full")]
MACHINES = [{"outer": "mi-dmsgd"}, {"outer": "mi-dmsgd", "schedule": "awc"}, {}]
LOSSY = {"float32, awc, 16-bit messages": 1e-2, "int8": 2e-2, "16-bit parameters": 5e-2}
UNEQUAL = {
    "MI": ("sgd", [1, 4, 2], {"outer": "mi-dmsgd", "local_steps": True}, "float64", False),
    "MI, awc": ("adamw", [3, 1], {"outer": "mi-dmsgd", "schedule": "awc", "local_steps": True}, "float64", True),
    "DiLoCo": ("sgd", [2, 5, 1], {"outer": "nesterov-pmsgd", "local_steps": True}, "float64", False),
    "averages": ("sgd", [2, 5, 1], {"local_steps": True, "topology": "ring"}, "float64", False),
}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def statement(n, inner, every, options, dtype="float64", scheduled=False, rounds=ROUNDS):
    """The same rounds in one process: n inner optimizers, and the outer method as a dense W @ X (tests/oracle.py)."""
    options = dict(options)
    for name in ("bucket_mb", "comm_dtype", "compress", "local_steps", "allow_unstable"):
        options.pop(name, None)
    method = options.pop("outer", None)
    lr = options.pop("lr", 0.7 if method else 1.0)
    momentum = options.pop("momentum", 0.9 if method else 0.0)
    graph = topology.get(options.pop("topology", "one-peer-exponential"), n)
    models = [workers.Tied(torch.float64) for _ in range(n)]
    optimizers = [outer.inner_of(inner, model.parameters()) for model in models]
    data = [workers.data(rank, torch.float64) for rank in range(n)]

    def way(k, X):
        """(c / c_i) (x - y), after each worker's inner steps from x."""
        counts = [outer.own_every(every, rank, k) for rank in range(n)]
        out = np.empty_like(X)
        for i in range(n):
            outer.put(models[i], torch.tensor(X[i]))
            for _ in range(counts[i]):
                optimizers[i].zero_grad()
                models[i].loss(data[i]).backward()
                optimizers[i].step()
            out[i] = np.mean(counts) / counts[i] * (X[i] - outer.vector(models[i]).numpy())
        return out

    hyper = {}
    if method in ("mi-dmsgd", "pc-dmsgd"):
        hyper = {name: rule_default(method, name, momentum, graph) for name in ("correction_rate", "correction_gain")}
    x0 = np.tile(outer.vector(models[0]).numpy(), (n, 1))
    lrs = (lambda k: outer.outer_lr(k, lr)) if scheduled else (lambda k: lr)
    return oracle.run(
        method or "dsgd", graph.weights, way, x0, lrs, momentum, 0.0, steps=rounds,
        **{"schedule": "atc" if method is None else "auto", **options}, **hyper,
    )  # fmt: skip


def rule_default(method, name, momentum, graph):
    h = fused_dlam.rules.ALL[method].hyper[name]
    if not callable(h.default):
        return h.default
    return h.auto(momentum, graph.slowest_rho, graph.is_static)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{n: {call: [by rank]}}: everything, by one set of processes for each n."""
    folder, cases = tmp_path_factory.mktemp("outer"), {**CASES, **{f"unequal {k}": case for k, case in UNEQUAL.items()}}
    train = [(inner, every, options, ROUNDS, dtype, scheduled)
             for inner, every, options, dtype, scheduled in cases.values()]  # fmt: skip
    calls = {"cases": (outer.train_each, train)}
    three = {
        **{("plain", method): (outer.plain, method, graph, 12) for method, graph in PLAIN},
        **{("looks", schedule): (outer.looks, schedule) for schedule in ("auto", "awc")},
        **{("written", schedule): (outer.written, schedule) for schedule in ("atc", "awc")},
        **{("scaled", kind): (outer.scaled, kind) for kind in ("ours", "torch's")},
        **{
            ("goes on", schedule, at): (outer.goes_on, schedule, 4, at, str(folder / f"{schedule}{at}"))
            for schedule in ("auto", "awc")
            for at in (3, 4, 6)
        },
    }
    four = {
        "refused": (outer.refused,),
        **{("machines", k): (outer.machines, "momentum", 2, options) for k, options in enumerate(MACHINES)},
    }
    found = {3: workers.run_together(3, {**calls, **three}), 4: workers.run_together(4, {**calls, **four})}
    for results in found.values():
        for k, name in enumerate(cases):
            results[name] = [rank[k] for rank in results["cases"]]
    return found


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("name", CASES)
def test_a_round_is_the_outer_methods_step_on_the_way_of_the_inner_steps(runs, n, name):
    inner, every, options, dtype, scheduled = CASES[name]
    expected = statement(n, inner, every, options, dtype, scheduled)
    for rank, (path, *_) in enumerate(runs[n][name]):
        np.testing.assert_allclose(path.numpy(), expected[:, rank], rtol=0, atol=LOSSY.get(name) or TOLERANCE[dtype])


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_and_changing_numbers_of_inner_steps_weigh_alike(runs, n, name):
    inner, every, options, dtype, scheduled = UNEQUAL[name]
    expected = statement(n, inner, every, options, dtype, scheduled)
    for rank, (path, *_) in enumerate(runs[n][f"unequal {name}"]):
        np.testing.assert_allclose(path.numpy(), expected[:, rank], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["MI", "local AdamW", "float32"])
def test_a_round_sends_one_message_and_its_other_steps_nothing(runs, name):
    _, every, *_ = CASES[name]
    for _, sent, sizes, _ in runs[4][name]:
        assert sent == ([0] * (every - 1) + [sum(sizes)]) * ROUNDS  # M / H bytes a step


def test_under_awc_every_step_sends_its_part(runs):
    """The first round's messages leave when it ends, for nothing came before. The next ones' leave while they last."""
    _, every, *_ = CASES["MI, awc"]
    for _, sent, sizes, _ in runs[4]["MI, awc"]:
        starts = np.cumsum([0, *sizes[:-1]])
        due = [int((starts < sum(sizes) * k / every).sum()) for k in range(every + 1)]
        parts = [sum(sizes[first:last]) for first, last in zip(due, due[1:], strict=False)]
        expected = [0] * (every - 1) + [sum(sizes) + parts[0]] + (parts[1:] + parts[:1]) * (ROUNDS - 1)
        assert sent == expected
        assert max(sent[every:]) <= sum(sizes) / every + max(sizes)  # the peak: M/H, and no more than a bucket beyond


def test_one_step_around_plain_sgd_is_the_method_itself(runs):
    """g = lr grad, so the outer rate 1 makes the method's own step, at a constant rate: 1e-13."""
    for method, _ in PLAIN:
        for own, around in runs[3]["plain", method]:
            assert torch.allclose(own, around, rtol=0, atol=1e-13)


@pytest.mark.parametrize("at", [3, 4, 6])
@pytest.mark.parametrize("schedule", ["auto", "awc"])
def test_a_checkpoint_within_a_round_goes_on_bit_for_bit(runs, schedule, at):
    assert all(runs[3]["goes on", schedule, at])


@pytest.mark.parametrize("schedule", ["auto", "awc"])
def test_looking_within_a_round(runs, schedule):
    for views in zip(*runs[3]["looks", schedule], strict=True):
        mean = sum(own for own, *_ in views) / 3
        distance = math.sqrt(sum(float(((own - mean) ** 2).sum()) for own, *_ in views) / 3)
        for _, averaged, within, outside in views:
            assert torch.allclose(averaged, mean, rtol=0, atol=1e-14)
            assert within == pytest.approx(0.0, abs=1e-12)
            assert outside == pytest.approx(distance, abs=1e-12)


@pytest.mark.parametrize("schedule", ["atc", "awc"])
def test_what_a_script_writes_between_rounds_is_no_way_that_was_gone(runs, schedule):
    for said, start in runs[3]["written", schedule]:
        assert start == [0.0] * len(start)
        assert ("synchronize()" in said) == (schedule == "awc")


@pytest.mark.parametrize("kind", ["ours", "torch's"])
def test_an_overflow_is_a_ranks_own_inner_step(runs, kind):
    ranks = runs[3]["scaled", kind]
    assert ranks[0][0] == [True, False, True, True, True, True]
    assert ranks[1][0] == ranks[2][0] == [True] * 6
    assert torch.isfinite(ranks[0][1]).all()


@pytest.mark.parametrize("k", range(len(MACHINES)))
def test_machines_average_gradients_in_every_inner_step(runs, k):
    expected = machine_statement(MACHINES[k])
    for rank, (path, *_) in enumerate(runs[4]["machines", k]):
        np.testing.assert_allclose(path.numpy(), expected[:, rank // 2], rtol=0, atol=1e-12)


def machine_statement(options):
    """Two workers, each of which steps by the mean gradient of its two ranks."""
    models = [workers.Tied(torch.float64) for _ in range(2)]
    optimizers = [outer.inner_of("momentum", model.parameters()) for model in models]

    def way(k, X):
        out = np.empty_like(X)
        for i in range(2):
            outer.put(models[i], torch.tensor(X[i]))
            for _ in range(2):
                optimizers[i].zero_grad()
                (sum(models[i].loss(workers.data(2 * i + j, torch.float64)) for j in range(2)) / 2).backward()
                optimizers[i].step()
            out[i] = X[i] - outer.vector(models[i]).numpy()
        return out

    method, graph = options.get("outer"), topology.get("one-peer-exponential", 2)
    momentum = 0.9 if method else 0.0
    hyper = {}
    if method:
        hyper = {name: rule_default(method, name, momentum, graph) for name in ("correction_rate", "correction_gain")}
    x0 = np.tile(outer.vector(models[0]).numpy(), (2, 1))
    schedule = options.get("schedule", "auto") if method else "atc"
    return oracle.run(
        method or "dsgd", graph.weights, way, x0, lambda k: 0.7 if method else 1.0, momentum, 0.0, steps=5,
        schedule=schedule, **hyper,
    )  # fmt: skip


@pytest.mark.parametrize("schedule", everyday(["auto", "awc"], ["awc"]))
def test_a_lost_peer_is_named(schedule):
    said = workers.run_together(3, {"broken": (outer.broken, schedule)})["broken"]
    assert said[1] == "left"
    for text in (said[0], said[2]):
        assert "step() that ends a round" in text and "at step" in text and "rank 1" in text, text


def test_one_worker_around_an_average_is_the_inner_optimizer():
    """Nobody to average with, and the way is x - (x - y): y within a rounding."""
    one, two = workers.Tied(torch.float64), workers.Tied(torch.float64)
    inner = outer.inner_of("adamw", one.parameters())
    gossip = Gossip(outer.inner_of("adamw", two.parameters()), every=3)
    for _ in range(9):
        for model, optimizer in ((one, inner), (two, gossip)):
            optimizer.zero_grad()
            model.loss(workers.data(0, torch.float64)).backward()
            optimizer.step()
    assert torch.allclose(outer.vector(one), outer.vector(two), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"every": 0}, ValueError, "every"),
        ({"every": 2.0}, ValueError, "every"),
        ({"every": True}, ValueError, "every"),
        ({"lr": 0.7}, TypeError, "outer="),
        ({"momentum": 0.9}, TypeError, "outer="),
        ({"outer": "dmsg"}, ValueError, "Did you mean 'dmsgd'"),
        ({"outer": "mi-dmsgd", "lr": -1.0}, ValueError, "outer learning rate"),
        ({"outer": "mi-dmsgd", "lr": "0.7"}, TypeError, "lr"),
        ({"outer": "mi-dmsgd", "momentum": 1.0}, ValueError, "outer momentum"),
        ({"outer": "mi-dmsgd", "correction_gian": 2.0}, TypeError, "Did you mean 'correction_gain'"),
        ({"outer": "mi-dmsgd", "correction_gain": 0.1}, ValueError, "correction_gain"),
        ({"outer": "nesterov-pmsgd", "schedule": "awc"}, ValueError, "nesterov-awc-dmsgd"),
        ({"outer": "mi-dmsgd", "local_steps": "yes"}, TypeError, "local_steps"),
        ({"outer": "mi-dmsgd", "overlap": True}, TypeError, "GossipSGD"),
        ({"max_grad_norm": 1.0}, TypeError, "GossipSGD"),
        ({"outer": "DiLoCo"}, ValueError, "nesterov-pmsgd"),
        ({"outer": "pmsgd", "comm_dtype": torch.bfloat16}, ValueError, "comm_dtype"),
        ({"momentun": 0.9}, TypeError, "momentun"),
    ],
)
def test_refusals(options, error, words):
    model = workers.Tied()
    with pytest.raises(error, match=words):
        Gossip(torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_rate_that_is_not_stable_for_every_inner_optimizer_is_told(caplog):
    """Where a round comes to rest the way is x - x*: curvature 1. The line names what is stable, which is so."""
    graph, rule = topology.one_peer_exponential(6), fused_dlam.rules.mi_dmsgd
    settings = {"momentum": 0.9, "correction_rate": "auto", "correction_gain": 300.0}
    advise(rule.under("awc"), graph, {"lr": 0.5, **settings})
    advise(rule, graph, {"lr": 0.7, **settings})
    assert caplog.text == ""
    advise(rule.under("awc"), graph, {"lr": 0.7, **settings})
    assert "0.54" in caplog.text and "correction_rate=0.05" in caplog.text
    assert fused_dlam.rate_limit("mi-dmsgd", graph, 0.9, schedule="awc") < 0.7
    assert fused_dlam.rate_limit("mi-dmsgd", graph, 0.9, schedule="awc", correction_rate=0.05) > 0.7


def test_an_unstable_outer_method_is_refused(runs):
    assert all("unstable" in text and "mi-dmsgd" in text for text in runs[4]["refused"])
