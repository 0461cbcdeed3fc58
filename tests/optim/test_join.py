"""Promises of `optimizer.join()`, for 3 and 4 gloo workers with unlike data and unlike numbers of batches.

- All ranks end after as many steps as the longest one has batches, none of them hangs, and a second epoch works.
- Every rank follows, at each of its own steps and at the end of every epoch, the dense float64 statement of its method
  in which a worker has no gradient after its last batch (oracle.py): within 1e-10, and 1e-5 in float32 with a loss
  scaler. So in both schedules, for all kinds of methods, for `Gossip`, for machines, and for graphs that change or
  rest in some steps.
- Where gradients are averaged the mean is over the ranks that still have data, and replicas stay bit-equal.
- With doubly stochastic weights the workers' mean moves by the local steps of those that have data, to 1e-12.
- A loss scaler of torch's or ours works on; an overflow on one rank skips the step on all, those without data included.
- An error in the body is raised at once; every other rank gets an ExchangeError within the timeout.
- One worker: nothing happens.
"""

import functools

import join_workers as workers
import numpy as np
import pytest
import torch
from everyday import everyday
from join_workers import Case
from workers import run_together

import fused_dlam
from fused_dlam import topology

EPOCHS = {3: ((3, 5, 8), (4, 0, 2)), 4: ((5, 0, 8, 3), (2, 6, 4, 4)), 5: ((5, 0, 8, 3, 1), (2, 6, 4, 4, 0))}
NUMBERS = everyday(EPOCHS, (3, 4))
PC = {"method": "pc-dmsgd", "correction_rate": 0.04}


def cases(n):
    def case(kind, scaler="", **options):
        extra = {k: options.pop(k) for k in ("apart", "overflow", "unscale", "between") if k in options}
        if kind in ("pc-dmsgd", "mi-dmsgd"):
            options["correction_rate"] = 0.04
        return Case(kind, options, EPOCHS[n], scaler, **extra)

    one_peer, rests = {"topology": "one-peer-exponential"}, {"topology": workers.ring_every_other_step}
    flat = [
        case("pc-dmsgd", **one_peer),
        case("pc-dmsgd", **one_peer, schedule="awc"),
        case("pc-dmsgd", **rests),
        case("pc-dmsgd", **rests, schedule="awc"),
        case("pc-dmsgd", **one_peer, overlap=True, between=2),
        case("mi-dmsgd", **one_peer),
        case("mi-dmsgd", **rests),
        case("pc-dmsgd", **one_peer, schedule="awc", between=2),
        case("decentlam", topology="symmetric-exponential"),
        case("decentlam", topology="symmetric-exponential", schedule="awc"),
        case("d2-dmsgd", topology="ring", allow_unstable=True),
        case("exact-diffusion", topology="ring", schedule="awc", allow_unstable=True),
        case("gradient-tracking", topology="ring"),
        case("gradient-tracking", **one_peer),
        case("pmsgd"),
        case("pmsgd", between=2),
        case("adamw", **one_peer),
        case("adamw", **rests, schedule="awc"),
        case("sgd", **one_peer),
        case("sgd", **one_peer, schedule="midpoint"),
        case("sgd", **one_peer, schedule="awc"),
        case("sgd", **rests, between=2),
        case("AdamW", topology="ring"),
    ]
    scaled = [
        case("pc-dmsgd", "ours", **one_peer),
        case("pc-dmsgd", "torch", **one_peer, schedule="awc", unscale=True),
        case("d2-dmsgd", "ours", topology="ring", allow_unstable=True, unscale=True, between=2),
        case("pmsgd", "ours", between=2),
        case("pmsgd", "torch", apart=1),
        case("sgd", "ours", **one_peer, between=2),
        case("sgd", "torch", **one_peer, schedule="awc"),
        *(
            case(kind, scaler, **options, overflow=(2, 7 if n == 3 else 6))
            for kind in ("pc-dmsgd", "sgd")
            for scaler in ("ours", "torch")
            for options in ({"topology": "ring"}, {"topology": "ring", "schedule": "awc"})
        ),
        case("pmsgd", "ours", overflow=(2, 6)),
    ]
    if n != 4:
        return flat + scaled
    machines = {"hierarchical": True}
    return [
        case("pc-dmsgd", **machines),
        case("pc-dmsgd", **machines, schedule="awc", between=2),
        case("sgd", **machines),
        case("sgd", **machines, schedule="awc", between=2),
        case("pc-dmsgd", "ours", **machines, apart=1, between=2),
        case("pc-dmsgd", "torch", **machines, schedule="awc"),
        case("sgd", "ours", **machines, between=2),
        case("sgd", "torch", **machines, schedule="awc", apart=1),
        case("sgd", "ours", **machines, overflow=(2, 6)),
    ]  # fmt: skip


def name(case):
    settings = filter(None, (case.kind, case.scaler, *case.options.values(), *case[4:]))
    return "-".join(getattr(setting, "__name__", str(setting)) for setting in settings)


@functools.cache
def results(n):
    laws = [({"topology": t}, EPOCHS[n][0]) for t in ("ring", "one-peer-exponential")]
    calls = {"epochs": (workers.epochs_each, cases(n)), "nested": (workers.nested,)}
    calls |= {f"law {i}": (workers.mean_law, *law) for i, law in enumerate(laws)}
    if n == 3:
        calls |= {f"thawed {kind}": (workers.thawed, kind) for kind in ("dmsgd", "sgd")}
    return run_together(n, calls, deadline=150)


def lacking(case):
    """For every step the ranks that have no data, and the first step after each epoch."""
    steps, ends = [], []
    for counts in case.counts:
        steps += [[r for r, count in enumerate(counts) if k >= count] for k in range(max(counts))]
        ends.append(len(steps))
        steps += [[] for _ in range(case.between)]
    return steps, ends


def expected(n, case):
    """Every rank's parameters by the dense statement, [steps + 1, n, d]."""
    each, without = workers.problem(n), lacking(case)[0]
    size = 2 if case.options.get("hierarchical") else 1  # ranks of a worker
    chosen = case.options.get("topology", "one-peer-exponential")
    top = topology.get(chosen, n // size)

    def gradient(k, x):
        g, here = each(k, np.repeat(x, size, axis=0)), np.ones((n, 1))
        here[without[k]] = 0
        total = (g * here).reshape(n // size, size, -1).sum(1)
        return total / np.maximum(here.reshape(n // size, size, 1).sum(1), 1)

    def nobody(k):
        return [w for w in range(n // size) if all(w * size + i in without[k] for i in range(size))]

    method = {"sgd": "dmsgd", "AdamW": "adamw"}.get(case.kind, case.kind)
    hyper = {"correction_rate": case.options["correction_rate"]} if method in ("pc-dmsgd", "mi-dmsgd") else {}
    path = workers.oracle.run(
        method, top.weights, gradient, np.ones((n // size, workers.DIMENSION)), lambda k: workers.LR,
        workers.MOMENTUM, workers.DECAY, steps=len(without), schedule=case.options.get("schedule", "auto"),
        skips=() if case.overflow is None else (case.overflow[1],), without=nobody, joined=True, **hyper,
    )  # fmt: skip
    return np.repeat(path, size, axis=1)


ALL = [
    pytest.param(n, i, id=f"{n}-{name(case)}", marks=[pytest.mark.slow] * (n == 5))
    for n in EPOCHS
    for i, case in enumerate(cases(n))
]


@pytest.mark.parametrize("n, i", ALL)
def test_ranks_without_data_are_workers_without_a_gradient(n, i):
    case, path = cases(n)[i], expected(n, cases(n)[i])
    tolerance = 1e-5 if case.scaler else 1e-10
    for rank, got in enumerate(r[i] for r in results(n)["epochs"]):
        assert [steps for steps, _, _ in got["after"]] == lacking(case)[1]
        for steps, x in (*got["own"], *((steps, x) for steps, x, _ in got["after"])):
            error = np.abs(x.numpy() - path[steps, rank]).max()
            assert error <= tolerance * np.abs(path).max(), (rank, steps)


@pytest.mark.parametrize("n", NUMBERS)
def test_no_gradient_is_left_behind(n):
    for r in results(n)["epochs"]:
        assert all(left == 0 for one in r for _, _, left in one["after"])


@pytest.mark.parametrize("n", NUMBERS)
def test_replicas_stay_bit_equal(n):
    for i, case in enumerate(cases(n)):
        equal = [range(n)] if case.kind == "pmsgd" else [(0, 1), (2, 3)] if "hierarchical" in case.options else []
        for ranks in equal:
            first, *others = ([x for _, x, _ in results(n)["epochs"][r][i]["after"]] for r in ranks)
            assert all(all(map(torch.equal, first, other)) for other in others), case


@pytest.mark.parametrize("n", NUMBERS)
@pytest.mark.parametrize("law", [0, 1])
def test_the_mean_moves_by_the_steps_of_those_that_have_data(n, law):
    start, end, total = (torch.stack(t).mean(0) for t in zip(*results(n)[f"law {law}"], strict=True))
    torch.testing.assert_close(end, start - workers.LR * total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", NUMBERS)
def test_join_within_join(n):
    for told, steps in results(n)["nested"]:
        assert told == "join() was entered within join()" and steps == 1


@pytest.mark.parametrize("kind", ["dmsgd", "sgd"])
def test_a_layer_that_is_trainable_from_an_epoch_on(kind):
    ranks = results(3)[f"thawed {kind}"]
    assert [(steps, moved) for steps, moved, _ in ranks] == [(7, True)] * 3
    assert all(torch.equal(mean, ranks[0][2]) for _, _, mean in ranks)


@pytest.mark.parametrize("options", [{}, {"schedule": "awc"}, {"method": "pmsgd"}], ids=str)
def test_an_error_in_the_body(options):
    for rank, (kind, text, seconds) in enumerate(
        run_together(3, {"fails": (workers.fails_inside, options, 2)}, deadline=60)["fails"]
    ):
        assert kind == ("OSError" if rank == 2 else "ExchangeError"), text
        assert seconds < 2.5 + 3.0


@pytest.mark.parametrize("kind", ["dmsgd", "sgd"])
def test_one_worker(kind):
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = workers.build(kind, [ours], {})
    reference = torch.optim.SGD([theirs], lr=workers.LR, momentum=workers.MOMENTUM, weight_decay=workers.DECAY)
    for _ in range(2):
        with optimizer.join():
            for _ in range(3):
                for p, o in ((ours, optimizer), (theirs, reference)):
                    o.zero_grad()
                    (p * p).sum().backward()
                    o.step()
        assert optimizer._step in (3, 6) and ours.grad is not None
    torch.testing.assert_close(ours, theirs)
    with optimizer.join(), optimizer.join():  # no context at all
        pass
    assert fused_dlam.GossipSGD.join is fused_dlam.Gossip.join
