"""Promises about real worker processes over gloo, float32:

- every method, on directed one-peer and static graphs, n = 1 to 5: within 1e-5 of the dense float64 oracle after 50
  steps of a network with a tied weight, a frozen and an unused parameter;
- a second run is bit-equal, also when random ranks are delayed at random;
- bytes and messages equal the topology's formula;
- disagreeing settings, dead and late peers end in an error that names them.
"""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
import workers
from everyday import everyday
from layers_of_users import spaced

from fused_dlam import consensus_growth, rules, topology
from fused_dlam.layers import Lars, SlowMo
from fused_dlam.tools.launch import run_workers

STEPS = 50
GOSSIP = [name for name, rule in rules.ALL.items() if rule.average == "neighbors"]
AWC = [name for name in GOSSIP if name not in oracle.ONLY_ATC and "awc" not in name]


ONE_PEER = "one-peer-exponential"
AGAIN = [
    ("pc-dmsgd", ONE_PEER, {}),
    ("da-dmsgd", "exponential", {"bucket_mb": 1e-4}),
    ("pmsgd", "ring", {}),
    ("decentlam", "full", {}),
    ("pc-dmsgd", ONE_PEER, {"schedule": "awc", "bucket_mb": 1e-4}),
]
HALF = [("pc-dmsgd", ONE_PEER, {"weight_decay": 1e-2, **wire}) for wire in ({}, {"comm_dtype": torch.bfloat16})]
SPACED = ("pc-dmsgd", partial(spaced, every=3, exact=8), {"weight_decay": 1e-2})
BACK = ({}, {"schedule": "awc"}, {"method": "da-dmsgd", "overlap": False})
DIFFER = ("shape", "method", "momentum", "topology", "weights", "overlap", "max_grad_norm", "comm_dtype", "bucket_mb")


def cases_of(n):
    """Every method, where it is stable; three workers run all every day, of others each takes the graphs in turn."""
    # Three on an exponential graph average exactly.
    graphs = {1: ["ring"], 3: [ONE_PEER], 5: [ONE_PEER, "exponential", "star"]}.get(n, [ONE_PEER, "exponential"])
    # Where a method is unstable rounding grows like everything else: a momentum is taken at which it is stable.
    cases = []
    for method, name, extra in [
        *((m, graphs[(k + n) % len(graphs)], {}) for k, m in enumerate(rules.ALL)),
        *(
            (m, graphs[0], {"schedule": s, "bucket_mb": 1e-4})
            for m in AWC
            for s in ("midpoint", "awc")
            if s == "awc" or m in ("dmsgd", "exact-diffusion", "adamw")
        ),
    ]:
        graph, schedule = topology.FAMILY[name](n), extra.get("schedule", "auto")
        momentum = 0.9 if consensus_growth(method, graph, 0.9, schedule=schedule) < 1 else 0.4
        if consensus_growth(method, graph, momentum, schedule=schedule) >= 1 - 1e-9:
            continue  # D2 and exact diffusion, on directed graphs and where less is sent: refused
        cases.append((method, name, {"weight_decay": 1e-2, "momentum": momentum, **extra}))
    return cases


def layer_cases():
    """What is run, and the layers as the oracle takes them."""
    embed = workers.Tied().embed.numel()
    columns = [slice(0, embed), slice(embed, embed + workers.Tied().hidden.numel())]
    cases, layers, graph = [], [], topology.one_peer_exponential(3)
    for method, schedule in (("pmsgd", "atc"), ("dmsgd", "atc"), ("pc-dmsgd", "awc"), ("gradient-tracking", "atc")):
        for lars, slowmo in ((0.05, None), (None, (7, 0.5, 0.8)), (0.05, (7, 0.5, 0.8))):
            around = ([Lars(lars)] if lars else []) + ([SlowMo(*slowmo)] if slowmo else [])
            options = {"weight_decay": 1e-2, "schedule": schedule, "layers": around, "bucket_mb": 1e-4}
            cases.append((method, graph, options))
            layers.append({"lars": lars and (lars, columns), "slowmo": slowmo})
    return cases, layers


@pytest.fixture(scope="module")
def threes():
    calls = {
        "methods": (workers.train_each, cases_of(3), STEPS),
        "layers": (workers.train_each, layer_cases()[0], STEPS),
        "averaged": (workers.average_and_restore,),
        "differ": (workers.disagree_each, DIFFER),  # last, for it ends in errors
    }
    return workers.run_together(3, calls)


@pytest.fixture(scope="module")
def fours():
    formula = [("dmsgd", name, {"bucket_mb": 1e-4}) for name in topology.FAMILY]
    calls = {
        "first": (workers.train_each, AGAIN, 15),
        "second": (workers.train_each, AGAIN, 15, 0.01),
        "formula": (workers.train_each, formula, 6),
        "half": (workers.train_each, HALF, STEPS),
        "spaced": (workers.train, *SPACED, STEPS),
        **{f"back {options}": (workers.roll_back, options) for options in BACK},
    }
    return workers.run_together(4, calls)


def network_gradient(n):
    """Gradients of the float64 network at every worker's own parameters, without weight decay."""
    models, inputs = [workers.Tied(torch.float64) for _ in range(n)], [workers.data(i, torch.float64) for i in range(n)]

    def grad(step, X):
        out = np.empty_like(X)
        for i, model in enumerate(models):
            named = [getattr(model, name) for name in workers.TRAINED]
            with torch.no_grad():
                at = 0
                for p in named:
                    p.copy_(torch.from_numpy(X[i, at : at + p.numel()]).reshape(p.shape))
                    at += p.numel()
            grads = torch.autograd.grad(model.loss(inputs[i]), named)
            out[i] = torch.cat([g.reshape(-1) for g in grads]).numpy()
        return out

    return grad


def reference(method, graph, weight_decay, schedule="auto", momentum=0.9, **layers):
    model = workers.Tied(torch.float64)
    corrected = "correction_rate" in rules.ALL[method].hyper
    hyper = {"correction_rate": oracle.auto_rate(method, graph, momentum)} if corrected else {}
    return oracle.run(
        method, graph.weights, network_gradient(graph.n), np.tile(workers.trained(model).numpy(), (graph.n, 1)),
        workers.lr_at, momentum, weight_decay, steps=STEPS, schedule=schedule, **layers, **hyper,
    )  # fmt: skip


@pytest.mark.parametrize("n", everyday((1, 2, 3, 4, 5), (1, 3)))
def test_every_method_follows_the_oracle(n, request):
    """1e-5 after 50 steps, relative to the parameters' size; frozen and unused parameters are untouched bit for bit."""
    cases = cases_of(n)
    if n == 3:
        results = request.getfixturevalue("threes")["methods"]
    else:
        results = workers.run_together(n, {"methods": (workers.train_each, cases, STEPS)})["methods"]
    start = workers.Tied()
    for c, (method, name, options) in enumerate(cases):
        graph = topology.FAMILY[name](n)
        expected = reference(method, graph, 1e-2, options.get("schedule", "auto"), options["momentum"])
        for rank in range(n):
            got = results[rank][c]
            error = abs(got["path"][-1].double().numpy() - expected[-1, rank]).max() / abs(expected[-1]).max()
            assert error < 1e-5, (method, name, options, rank, error)
            assert torch.equal(got["frozen"], start.frozen) and torch.equal(got["unused"], start.unused)
        disagreement = np.sqrt(((expected[-1] - expected[-1].mean(0)) ** 2).sum(-1).mean())
        assert results[0][c]["distance"] == pytest.approx(disagreement, rel=1e-3, abs=1e-6), (method, name)


def test_a_second_run_is_bit_equal_whatever_the_timing(fours):
    """All ranks, all steps; the second run delays every rank at random before every step."""
    for a, b in zip(fours["first"], fours["second"], strict=True):
        for case, x, y in zip(AGAIN, a, b, strict=True):
            assert torch.equal(x["path"], y["path"]), case


def test_bytes_and_messages_equal_the_formula(fours):
    """One message per neighbor and bucket, and not a byte more than the flat buffers, on every topology.

    Where W = J that is an all-reduce, counted as a ring.
    """
    n, steps, names = 4, 6, list(topology.FAMILY)
    for rank in range(n):
        for name, got in zip(names, fours["formula"][rank], strict=True):
            graph = topology.FAMILY[name](n)
            if graph.averages_exactly():
                assert (got["bytes"], got["messages"]) == (2 * (n - 1) / n * steps * got["moved"], 0)
                continue
            sent = sum(len(graph.peers(rank, t).destinations) for t in range(steps))
            assert got["bytes"] == sent * got["moved"], (name, rank)
            assert got["messages"] % sent == 0 and got["messages"] // sent > 1, (name, rank)  # several buckets


def test_layers_around_rules(threes):
    """LARS and SlowMo, alone and together, on methods with and without all-reduce and under both schedules: 1e-5 after
    50 steps. The network's one-dimensional and frozen parameters are left alone by LARS."""
    cases, layers = layer_cases()
    expected = [
        reference(method, graph, 1e-2, options["schedule"], **layer)[-1]
        for (method, graph, options), layer in zip(cases, layers, strict=True)
    ]
    for rank, results in enumerate(threes["layers"]):
        for case, got, want in zip(cases, results, expected, strict=True):
            assert abs(got["path"][-1].double().numpy() - want[rank]).max() < 1e-5, case


def test_local_steps_and_global_averages(fours):
    """They are the topology's own transformations, in the oracle too."""
    expected = reference("pc-dmsgd", topology.one_peer_exponential(4).every(3).with_global_average(8), 1e-2)
    for rank, got in enumerate(fours["spaced"]):
        assert abs(got["path"][-1].double().numpy() - expected[-1, rank]).max() < 1e-5


@pytest.mark.parametrize("options", BACK)
def test_going_back_to_a_checkpoint_repeats_the_run(options, fours):
    """Bit-equal, in the middle of the graph's period, although the next exchange had already begun."""
    for first, second in fours[f"back {options}"]:
        assert torch.equal(first, second)


def test_bfloat16_messages_take_half_the_bytes(fours):
    """Exactly half; after 50 steps the workers are within 1e-2 of the float64 oracle, their mean within 1e-3."""
    results = fours["half"]
    expected = reference("pc-dmsgd", topology.one_peer_exponential(4), 1e-2)[-1]
    got = np.stack([half["path"][-1].double().numpy() for _, half in results])
    assert all(full["bytes"] == 2 * half["bytes"] for full, half in results)
    assert abs(got - expected).max() < 1e-2
    assert abs(got.mean(0) - expected.mean(0)).max() < 1e-3


def test_neighbor_allreduce_is_the_row_of_w():
    """Float32: within 1e-6 of W @ X for directed, symmetric, time-varying and not doubly stochastic matrices."""
    n, steps = 5, 3
    skewed = np.full((n, n), 0.1) + np.diag([0.5] * n)
    skewed[0] = [0.2, 0.8, 0, 0, 0]
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        graphs = ["one-peer-exponential", "exponential", "ring", "full", topology.Topology(skewed)]
    results = run_workers(workers.neighbor_averages, n, graphs, steps)
    X = torch.stack([x for x, _ in results]).double()
    for i, (_, out) in enumerate(results):
        for k, got in enumerate(out):
            W = torch.from_numpy(topology.get(graphs[k // steps], n).weights(k % steps))
            torch.testing.assert_close(got.double(), torch.einsum("j,jab->ab", W[i], X), rtol=1e-6, atol=1e-6)


def test_workers_that_disagree_are_told_so(threes):
    """The same error on every rank, naming what differs."""
    for how, *errors in zip(DIFFER, *threes["differ"], strict=True):
        assert len(set(errors)) == 1 and "do not agree" in errors[0], (how, errors)
        assert how in errors[0] and "rank 1" in errors[0]


@pytest.mark.parametrize("how", ["gone", pytest.param("late", marks=pytest.mark.slow)])
def test_a_lost_peer_is_named_in_time(how):
    """Every rank that depends on it gets an ExchangeError with rank, peer and step; parameters stay finite."""
    results = run_workers(workers.lose_a_peer, 4, how, 5.0)
    texts = [text for rank, (text, _, _) in enumerate(results) if rank != 2]
    assert all("at step" in text and text.startswith(f"rank {r}") for r, text in zip((0, 1, 3), texts, strict=True)), (
        texts
    )
    assert any("rank 2 failed" in text for text in texts), texts
    assert all(seconds < 60 and finite for _, seconds, finite in results)


def test_averaged_evaluates_the_mean_and_puts_everything_back(threes):
    """Inside: all ranks bit-equal, the mean to 1e-6, buffers included. Afterwards: bit-equal to before."""
    results = threes["averaged"]
    for before, inside, after, distance, distance_after in results:
        assert distance == 0 and distance_after > 0
        assert all(torch.equal(before[k], after[k]) for k in before)
        for key, value in inside.items():
            assert torch.equal(value, results[0][1][key])
            if value.is_floating_point():
                mean = torch.stack([r[0][key] for r in results]).mean(0)
                torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-6)
