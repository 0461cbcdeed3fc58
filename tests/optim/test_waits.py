"""Promises about a slow worker, with real processes over gloo, of which one sleeps in every step:

- `step_times` finds it, on every graph and schedule, with the same numbers on all ranks;
- `waits` tells each rank for whom it has waited, in global ranks; the others have waited as long as it slept;
- what is no step (an evaluation, say) is in neither;
- a profiler's trace names the peer.

Durations are those of the sleep, which is sure, and orders of magnitude.
"""

import math

import pytest
import waits_workers
from waits_workers import CASES, SLEEP, SLEEPER, STEPS
from workers import run_together

from fused_dlam.comm.ledger import Ledger

N = 4


@pytest.fixture(scope="module")
def told():
    calls = {name: (getattr(waits_workers, name),) for name in ("sleeping", "evaluating", "traced")}
    return run_together(N, calls)


@pytest.mark.parametrize("case", CASES)
def test_the_slow_worker_is_found(told, case):
    ranks = [rank[case] for rank in told["sleeping"]]
    times = ranks[0][3]
    assert list(times) == list(range(N)) and all(rank[3] == times for rank in ranks)
    assert times[SLEEPER].computing >= SLEEP
    assert max(times, key=lambda rank: times[rank].computing) == SLEEPER
    assert min(times, key=lambda rank: times[rank].waiting) == SLEEPER
    for rank, time in times.items():
        if rank != SLEEPER:
            assert time.computing + time.waiting >= SLEEP / 2, "a rank is a few steps ahead at most"
            assert 0 < time.computing < SLEEP and time.waiting > SLEEP / 4


@pytest.mark.parametrize("case", CASES)
def test_a_rank_knows_whom_it_has_waited_for(told, case):
    for rank, (text, waits, (before, at_first), _, again) in enumerate(ranks[case] for ranks in told["sleeping"]):
        assert at_first == f"rank {rank} has waited for nobody"
        for unknown in (before, again):  # no step has ended
            assert list(unknown) == list(range(N)) and all(math.isnan(x) for t in unknown.values() for x in t)
        first = next(iter(waits))
        whom = "all ranks" if first is None else f"rank {first}"
        assert text.startswith(f"rank {rank} has waited {waits[first].total:.3g} s of "), text
        assert f" s for {whom} (at most {waits[first].longest:.3g} s, step {waits[first].longest_step})" in text
        assert rank not in waits and all(0 <= w.last <= w.longest <= w.total for w in waits.values())
        # awc has sent the message of the step that does not come; `averaged` waits until it has left.
        assert all(1 <= w.steps <= STEPS + 2 and 0 <= w.longest_step <= STEPS + 1 for w in waits.values())
        if rank != SLEEPER:
            assert sum(w.total for w in waits.values()) >= SLEEP * STEPS / 2


def test_peers_are_those_of_the_graph(told):
    seen = {case: [set(rank[case][1]) for rank in told["sleeping"]] for case in CASES}
    assert seen["ring"] == [{(r - 1) % N, (r + 1) % N} for r in range(N)]
    assert seen["all-reduce"] == [{None}] * N
    assert all(peer is None or peer % 2 == r % 2 for r in range(N) for peer in seen["machines"][r])
    waits = told["sleeping"][0]["ring"][1]
    assert waits[SLEEPER].total > SLEEP and waits[SLEEPER].steps == STEPS + 1


def test_what_is_no_step_is_not_waited_for_in_one(told):
    """The others wait for rank 1 three times 0.3 s, in `consensus_distance`: not in a step, and not computing."""
    times = told["evaluating"][0]
    assert times[SLEEPER].computing >= 3 * SLEEP
    assert all(t.computing < 2 * SLEEP and t.waiting < 2 * SLEEP for rank, t in times.items() if rank != SLEEPER)


def test_a_trace_names_the_peer(told):
    for names, peers in told["traced"]:
        for step, at in enumerate(peers):
            for j in at.sources:
                assert f"fused_dlam::waiting for a message from rank {j} step {step}" in names
            for j in at.destinations:
                assert f"fused_dlam::waiting to finish sending to rank {j} step {step}" in names


def test_one_worker_waits_for_nobody():
    assert waits_workers.alone(0) == ("rank 0 has waited for nobody", True)


def test_the_line_that_is_printed():
    ledger = Ledger()
    for peer, step, since, now in ((5, 16, 0.0, 0.5), (5, 17, 1.0, 2.0), (5, 17, 2.0, 2.2), (2, 18, 4.0, 4.1)):
        ledger.add(peer, step, since, now)
    ledger.add(7, None, 5.0, 9.0)
    waits = ledger.waits(3)
    assert str(waits) == (
        "rank 3 has waited 1.7 s of 4.1 s for rank 5 (at most 1.2 s, step 17), 0.1 s for rank 2 (at most 0.1 s, step"
        " 18)"
    )
    assert waits[5] == pytest.approx((1.2, 1.7, 2, 1.2, 17)) and list(waits) == [5, 2]
    for peer in (6, 8, 9):
        ledger.add(peer, 19, 0.0, 0.01)
    assert str(ledger.waits(3)).endswith(" and 2 others")


def test_over_nccl_nothing_is_told_for_a_measurement():
    ledger = Ledger(measured=False)
    ledger.add(1, 0, 0.0, 1e-5)
    ledger.end_step()
    ledger.end_step()
    assert all(math.isnan(x) for x in ledger.per_step())
    assert not ledger.waits(0) and "NCCL" in str(ledger.waits(0))
