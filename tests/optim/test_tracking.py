"""Promises of `optimizer.track`, with three real processes over gloo, GossipSGD and Gossip(AdamW):

- a dictionary of plain, finite Python numbers after each step, or each `every`-th: they are what the optimizer's own
  methods say, the rate is that of the step, waits add up to `optimizer.waits`, and seconds to what has passed;
- the distance comes where it is due, is the same on all ranks, and needs no callback; ranks may have unlike `every`;
- an exception of the callback's comes out of that rank's step(), which is complete: the run is the same, bit for bit;
- within join() nothing is measured, in rounds of unlike numbers of steps it goes by exchanges; after a load steps go
  on from the checkpoint's;
- bad arguments, ranks that disagree, and one that measures alone end in errors that say what to do;
- on a GPU no rate is read.
"""

import math

import pytest
import torch
import tracking_workers
from tracking_workers import STEPS
from workers import run_together

import fused_dlam
from fused_dlam.optim.tracking import rates

N = 3
ALWAYS = ["step", "exchanges", "lr", "seconds", "waiting", "bytes_sent", "messages_sent", "workers"]


@pytest.fixture(scope="module")
def ranks():
    names = ("told", "totals", "unlike", "failing", "joining", "resumed", "rounds", "disagreeing", "one_alone")
    return run_together(N, {name: (getattr(tracking_workers, name),) for name in names}, deadline=120)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_is_told(ranks, kind):
    for got, own, lasted, waited in (r[kind] for r in ranks["told"]):
        assert len(got) == STEPS, "and none after remove()"
        for k, (numbers, (rate, step, distance, sent)) in enumerate(zip(got, own, strict=True)):
            assert list(numbers) == ALWAYS + ["consensus_distance"] * (k % 3 == 2)
            assert all(type(v) in (int, float) and math.isfinite(v) for v in numbers.values())
            assert (
                numbers["step"] == numbers["exchanges"] == step == k + 1
                and numbers["lr"] == rate
                and numbers["workers"] == N
            )
            assert numbers.get("consensus_distance", distance) == distance
            assert 0 < numbers["bytes_sent"] <= sent and 0 <= numbers["waiting"] <= numbers["seconds"]
        assert sum(numbers["seconds"] for numbers in got) <= lasted
        assert sum(numbers["waiting"] for numbers in got) == pytest.approx(waited, rel=1e-9) and waited > 0
    distances = [[n.get("consensus_distance") for n in r[kind][0]] for r in ranks["told"]]
    assert distances[0] == distances[1] == distances[2] and distances[0][2] > 1e-3


def test_sums_are_the_optimizers(ranks):
    for got, sent, messages in ranks["totals"]:
        assert [numbers["step"] for numbers in got] == [3, 6]
        assert (got[-1]["bytes_sent"], got[-1]["messages_sent"]) == (sent, messages) and messages > 0


def test_ranks_may_be_told_in_unlike_steps(ranks):
    (all_steps, none), (fourth, _), (silent, other) = ranks["unlike"]
    assert all_steps == [(k, k % 3 == 0) for k in range(1, STEPS + 1)] and none == []
    assert fourth == [(3, True), (4, False), (6, True)] and silent == [] and other == [5]


def test_an_exception_of_the_callback(ranks):
    for rank, ((seen, errors, x), (_, none, same)) in enumerate(ranks["failing"]):
        assert seen == list(range(1, STEPS + 1)) and none == []
        assert errors == ([(2, 2), (3, 3)] if rank == 1 else [])
        assert torch.equal(x, same)


def test_within_join_nothing_is_measured(ranks):
    for rank, got in enumerate(ranks["joining"]):
        own = [(k, False) for k in range(1, 3 + 2 * rank)]
        assert got == [*own, (7, False), (8, True)]


def test_after_a_load_steps_go_on(ranks):
    expected = [*range(1, STEPS + 1), 4, 5, 6, 7]
    for got in ranks["resumed"]:
        assert got == [(k, k % 3 == 0) for k in expected]


def test_in_rounds_of_unlike_numbers_of_steps(ranks):
    distances = []
    for rank, got in enumerate(ranks["rounds"]):
        ends = [1 + rank, 3 + 2 * rank, 5 + 3 * rank, 7 + 4 * rank]  # the steps with an exchange
        assert [n[0] for n in got] == list(range(1, ends[-1] + 1))
        assert [n[1] for n in got] == [sum(end <= step for end in ends) for step in range(1, ends[-1] + 1)]
        assert [n[0] for n in got if n[2] is not None] == [ends[1], ends[3]]
        assert {n[3:] for n in got} == {(0.05, 0.5)}
        distances.append([n[2] for n in got if n[2] is not None])
    assert distances[0] == distances[1] == distances[2] and min(distances[0]) > 1e-4


def test_ranks_that_disagree(ranks):
    for error in ranks["disagreeing"]:
        assert "consensus_every of track()" in error and "10" in error and "11" in error


def test_one_rank_alone(ranks):
    assert "optimizer.track()" in ranks["one_alone"][0]
    assert "no error" not in ranks["one_alone"]


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("loss",), TypeError, "a str cannot be called"),
        ((print, 0), ValueError, "every must be at least 1, not 0"),
        ((print, 2.0), TypeError, "every must be a whole number of steps, not 2.0"),
        ((print, True), TypeError, "every"),
        ((print, 1, -1), ValueError, "consensus_every must be at least 0, not -1"),
    ],
)
def test_bad_arguments(arguments, kind, text):
    optimizer = fused_dlam.GossipSGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(kind, match=text):
        optimizer.track(*arguments)


def test_one_worker_closed_and_groups():
    model, got = torch.nn.Linear(2, 2), []
    optimizer = fused_dlam.GossipSGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}], lr=0.1)
    optimizer.track(got.append, consensus_every=1)
    model(torch.ones(2)).sum().backward()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert (got[0]["lr"], got[0]["lr_1"], got[0]["workers"], got[0]["consensus_distance"]) == (0.1, 0.5, 1, 0.0)
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.track(print)


def test_the_rate_of_a_device_is_not_read():
    groups = [{"lr": torch.tensor(0.25)}, {"lr": torch.empty((), device="meta")}, {"lr": 0.5}, {}]
    assert rates(groups) == {"lr": 0.25, "lr_2": 0.5}
