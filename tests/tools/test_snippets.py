"""Promises of fused_dlam/examples/README.md: what it tells scripts to do works, on three workers with unlike data.

- ranks with unlike numbers of batches, a batch that is left out, and a loss that is not finite stop nobody;
- the mean of the workers' EMAs is the EMA of their mean, to 1e-6, buffers included, and each has its own back;
- what is saved within `averaged` is what was evaluated there, bit for bit;
- plateau schedulers that get one number keep one learning rate, and all ranks stop early after one and the same epoch;
- a file of one layer's state_dict is small, cloned or not.
"""

import pytest
import snippet_workers as workers
import torch

from fused_dlam.tools.launch import run_workers

N = 3


@pytest.fixture(scope="module")
def ranks():
    return run_workers(workers.all_of_them, N, deadline=120)


def test_ranks_with_unlike_numbers_of_batches(ranks):
    assert [r["uneven"] for r in ranks] == [5] * N


def test_a_batch_that_is_left_out(ranks):
    assert all(0 < r["bad_batch"] < 10 for r in ranks)


def test_a_loss_that_is_not_finite(ranks):
    assert [r["not_finite"] for r in ranks] == [{True: True, False: True}] * N


def test_ema(ranks):
    assert not all(map(torch.equal, ranks[0]["ema"][0], ranks[1]["ema"][0]))
    for own, mean, reference, again in (r["ema"] for r in ranks):
        assert len(mean) == 6 and all(map(torch.equal, own, again))
        for value, expected in zip(mean, reference, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


def test_best_checkpoint(ranks):
    for evaluated, saved, own in (r["best"] for r in ranks):
        assert saved == evaluated != own


def test_plateau_schedulers(ranks):
    assert len({r["plateau"] for r in ranks}) == 1
    lr, stopped = ranks[0]["plateau"]
    assert lr < 0.05 and 0 < stopped < 11


def test_files_of_one_layer_are_small(ranks):
    for whole, cloned in (r["clones"] for r in ranks):
        assert cloned < 8_000 and whole < 8_000


def test_clipping(ranks):
    for ours, torchs in (r["clipped"] for r in ranks):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_step_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for what, line, files in run_workers(workers.timeline, 2, str(tmp_path), deadline=60):
        assert what.count("exchange") == what.count("combine") == what.count("backward") == 1 and files == 2
        assert line.startswith("my step: forward") and "1 exchanges" in line
