"""Promises about communication that hides, with real worker processes over gloo:

- whenever messages leave, parameters are bit-equal, also under random delays on random ranks;
- messages do leave in the backward pass (counted, not timed), once the first step has shown that they may; the last
  bucket's never does;
- what turns out wrong after its message has left is sent again: the result is bit-equal to overlap=False, and each rank
  that had to says so once. (NCCL cannot recall: test_streams.py);
- with schedule="awc" a parameter that changes while it is sent is an error that names it; nothing hangs.
"""

import functools

import overlap_workers as workers
import pytest
import torch
from layers_of_users import spaced
from workers import run_together

CASES = [
    {},
    {"method": "decentlam", "topology": "ring"},
    {"method": "da-dmsgd", "topology": "exponential"},
    {"method": "pmsgd"},
    {"topology": "full"},
    {"topology": functools.partial(spaced, every=3)},
    {"topology": functools.partial(spaced, exact=4), "comm_dtype": torch.bfloat16},
]
OVERLAPS = [{**case, "overlap": mode} for case in CASES for mode in (False, "auto", True)]
WIRES = ({}, {"comm_dtype": torch.bfloat16})
AWC = [{"schedule": "awc", "overlap": overlap, **wire} for wire in WIRES for overlap in (False, "auto")]
DELAYS = (0.0, 0.01)

# What a training script does between backward and step: where its gradients are not final, where they are, ...
NOT_FINAL = ("clip", "clip on rank 1", "accumulate", "lr in between", "lr later", "clip, all-reduce")
FINAL = ("no_sync", "retain_graph", "plain")
OTHERS = ("max_grad_norm", "max_grad_norm, all-reduce", "all-reduce")


@pytest.fixture(scope="module")
def fours():
    cases = [*OVERLAPS, *AWC]
    results = run_together(4, {delays: (workers.paths, cases, delays) for delays in DELAYS})
    k = len(OVERLAPS)
    return {d: ([rank[:k] for rank in ranks], [rank[k:] for rank in ranks]) for d, ranks in results.items()}


@pytest.fixture(scope="module")
def scripts():
    """By (script, overlap), what three ranks returned."""
    cases = [(what, overlap) for what in NOT_FINAL + FINAL for overlap in (False, "auto", True)]
    cases += [(what, "auto") for what in OTHERS]
    return run_together(3, {case: (workers.script, *case) for case in cases})


def test_overlap_changes_when_not_what(fours):
    """overlap="auto" and True against False: bit-equal, without and with random delays; messages left early."""
    for delays in DELAYS:
        for rank, results in enumerate(fours[delays][0]):
            for case, (path, early, buckets) in zip(OVERLAPS, results, strict=True):
                expected = results[OVERLAPS.index({**case, "overlap": False})][0]
                assert torch.equal(path, expected), (case, rank, delays)
                neighbors = 2 if case.get("topology") in ("ring", "exponential") else 1
                assert buckets >= 2 and (callable(case.get("topology")) or max(early) <= neighbors * (buckets - 1))
                if case["overlap"] is False or case.get("method") == "pmsgd" or case.get("topology") == "full":
                    assert not any(early)  # all-reduces are not messages
                elif not callable(case.get("topology")):
                    # From the second step on: an unused parameter holds back its own bucket alone.
                    assert all(n > 0 for n in early[1:]) and early[0] == 0, (case, early)


def test_awc_is_the_same_whether_x_leaves_early_or_in_step(fours):
    """Bit-equal, also with bfloat16 messages and delays; every step's messages are counted when the last one ended."""
    for delays in DELAYS:
        for results in fours[delays][1]:
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[2][0], results[3][0])


@pytest.mark.parametrize("mode", ["auto", True])
@pytest.mark.parametrize("what", NOT_FINAL)
def test_what_was_not_final_is_sent_again(what, mode, scripts):
    """One warning says why and what to do; "auto" sends in step() from then on, True goes on guessing."""
    for rank, (got, wanted) in enumerate(zip(scripts[what, mode], scripts[what, False], strict=True)):
        assert not got[2] and torch.equal(got[0], wanted[0])
        had_to = what != "clip on rank 1" or rank == 1
        told = ["max_grad_norm" in line and "messages are sent in step()" in line for line in got[1]]
        assert told == [True] * had_to, got[1]
        if "all-reduce" not in what:  # an all-reduce is no message
            late_first = what != "lr later"  # so that "auto" has never sent early
            assert (got[3] == 0) == (mode == "auto" and had_to and late_first)


@pytest.mark.parametrize("mode", ["auto", True])
@pytest.mark.parametrize("what", FINAL)
def test_messages_leave_early_where_gradients_are_final(what, mode, scripts):
    for got, wanted in zip(scripts[what, mode], scripts[what, False], strict=True):
        assert torch.equal(got[0], wanted[0]) and got[3] > 0 and not got[1]


def test_max_grad_norm_is_clip_grad_norm(scripts):
    """1e-6: the optimizer's own clipping against torch's in the training script."""
    for got, wanted in zip(scripts["max_grad_norm", "auto"], scripts["clip", False], strict=True):
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)


def test_max_grad_norm_clips_the_averaged_gradient_where_it_is_averaged(scripts):
    """All-reduce momentum SGD: all ranks bit-equal, and clipped (otherwise than without)."""
    clipped = [got[0] for got in scripts["max_grad_norm, all-reduce", "auto"]]
    free = [got[0] for got in scripts["all-reduce", "auto"]]
    for paths in (clipped, free):
        assert all(torch.equal(p, paths[0]) for p in paths)
    assert not torch.equal(clipped[0], free[0])


def test_parameters_changed_in_flight():
    """A load without synchronize() is refused and names the remedy; with it, and under averaged(), all is well."""
    hows = ("synchronize", "evaluate", "nothing", "load")  # the error comes last
    results = run_together(3, {how: (workers.awc_interference, how) for how in hows})
    assert all("synchronize()" in text for text in results["load"])
    for how in ("synchronize", "evaluate"):
        assert all(isinstance(x, torch.Tensor) for x in results[how])
    assert all(torch.equal(a, b) for a, b in zip(results["nothing"], results["evaluate"], strict=True))


def test_staging_through_host_memory_changes_nothing():
    """What CUDA tensors over gloo go through, run on host tensors: bit-equal to sending directly."""
    options = ({}, {"schedule": "awc"}, {"method": "da-dmsgd", "topology": "exponential", "overlap": True})
    calls = {(fn.__name__, k): (fn, o) for k, o in enumerate(options) for fn in (workers.path, workers.staged)}
    results = run_together(3, calls)
    for k in range(len(options)):
        pairs = zip(results["path", k], results["staged", k], strict=True)
        assert all(torch.equal(a[0], b[0]) for a, b in pairs)
