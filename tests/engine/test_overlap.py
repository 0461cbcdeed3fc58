"""Promises about communication that hides, with real worker processes over gloo:

- whenever messages leave, parameters are bit-equal, also under random delays on random ranks;
- messages do leave in the backward pass (counted, not timed), once the first step has shown that they may;
- a gradient or parameter that changes after its message has left is an error that names it; nothing hangs.
"""

import overlap_workers as workers
import pytest
import torch

from fused_dlam.tools.launch import run_workers

CASES = [
    {},
    {"method": "decentlam", "topology": "ring"},
    {"method": "da-dmsgd", "topology": "exponential"},
    {"method": "pmsgd"},
    {"topology": "full"},
    {"communicate_every": 3},
    {"global_average_every": 4, "comm_dtype": torch.bfloat16},
]


def test_overlap_changes_when_not_what():
    """overlap="auto" and True against False: bit-equal, without and with random delays; messages left early."""
    modes = ["auto", True]
    cases = [{**case, "overlap": mode} for case in CASES for mode in (False, *modes)]
    for delays in (0.0, 0.01):
        for rank, results in enumerate(run_workers(workers.paths, 4, cases, delays)):
            for case, (path, early, buckets) in zip(cases, results, strict=True):
                expected = results[cases.index({**case, "overlap": False})][0]
                assert torch.equal(path, expected), (case, rank, delays)
                assert buckets >= 2
                if case["overlap"] is False or case.get("method") == "pmsgd" or case.get("topology") == "full":
                    assert not any(early)  # all-reduces are not messages
                elif "communicate_every" not in case and "global_average_every" not in case:
                    # From the second step on: an unused parameter holds back its own bucket alone.
                    assert all(n > 0 for n in early[1:]) and early[0] == 0, (case, early)


def test_awc_is_the_same_whether_x_leaves_early_or_in_step():
    """Bit-equal, also with bfloat16 messages and delays; every step's messages are counted when the last one ended."""
    wires = ({}, {"comm_dtype": torch.bfloat16})
    cases = [{"schedule": "awc", "overlap": overlap, **wire} for wire in wires for overlap in (False, "auto")]
    for delays in (0.0, 0.01):
        for results in run_workers(workers.paths, 4, cases, delays):
            assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[2][0], results[3][0])


@pytest.mark.parametrize("what", ["clip", "clip on rank 1", "accumulate", "lr in between"])
def test_auto_stays_in_step_where_gradients_are_not_final(what):
    """All ranks hold back, one warning says why and what to do; the result is that of overlap=False, bit for bit."""
    expected = run_workers(workers.script, 3, what, False)
    results = run_workers(workers.script, 3, what, "auto")
    for rank, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(got[0], wanted[0]) and got[3] == 0
        told = what != "clip on rank 1" or rank == 1
        assert [("max_grad_norm" in line and "in step()" in line) for line in got[1]] == [True] * told, got[1]


@pytest.mark.parametrize("what", ["no_sync", "retain_graph", "plain"])
def test_auto_overlaps_where_they_are(what):
    expected = run_workers(workers.script, 3, what, False)
    for got, wanted in zip(run_workers(workers.script, 3, what, "auto"), expected, strict=True):
        assert torch.equal(got[0], wanted[0]) and got[3] > 0 and not got[1]


@pytest.mark.parametrize("what", ["clip", "accumulate"])
def test_a_gradient_that_changes_after_its_message_left_is_an_error(what):
    for _, _, error, _ in run_workers(workers.script, 3, what, True):
        assert "gradient of parameter" in error and "leaves" in error and "no_sync()" in error, error


def test_a_learning_rate_set_after_the_messages_left_counts_for_the_next_step():
    """On all ranks alike, with one warning per step: pack and combine of one step never see two learning rates."""
    for got, lines, error, _ in run_workers(workers.script, 3, "lr later", "auto"):
        assert got is not None and not error and any("takes effect in the next step" in line for line in lines)


def test_max_grad_norm_is_clip_grad_norm():
    """1e-6: the optimizer's own clipping against torch's in the training script."""
    expected = run_workers(workers.script, 3, "clip", False)
    for got, wanted in zip(run_workers(workers.script, 3, "max_grad_norm", "auto"), expected, strict=True):
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)


def test_max_grad_norm_clips_the_averaged_gradient_where_it_is_averaged():
    """All-reduce momentum SGD: all ranks bit-equal, and clipped (otherwise than without)."""
    clipped = [got[0] for got in run_workers(workers.script, 3, "max_grad_norm, all-reduce", "auto")]
    free = [got[0] for got in run_workers(workers.script, 3, "all-reduce", "auto")]
    for paths in (clipped, free):
        assert all(torch.equal(p, paths[0]) for p in paths)
    assert not torch.equal(clipped[0], free[0])


def test_parameters_changed_in_flight():
    """A load without synchronize() is refused and names the remedy; with it, and under averaged(), all is well."""
    assert all("synchronize()" in text for text in run_workers(workers.awc_interference, 3, "load"))
    for how in ("synchronize", "evaluate"):
        assert all(isinstance(x, torch.Tensor) for x in run_workers(workers.awc_interference, 3, how))
    plain, evaluated = (run_workers(workers.awc_interference, 3, how) for how in ("nothing", "evaluate"))
    assert all(torch.equal(a, b) for a, b in zip(plain, evaluated, strict=True))


def test_staging_through_host_memory_changes_nothing():
    """What CUDA tensors over gloo go through, run on host tensors: bit-equal to sending directly."""
    for options in ({}, {"schedule": "awc"}, {"method": "da-dmsgd", "topology": "exponential", "overlap": True}):
        direct, through = run_workers(workers.path, 3, options), run_workers(workers.staged, 3, options)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(direct, through, strict=True))
