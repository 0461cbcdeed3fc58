"""Promises of fused_dlam/examples/README.md: what it tells scripts to do works, on three workers with unlike data.

- ranks with unlike numbers of batches, a batch that is left out, and a loss that is not finite stop nobody;
- the mean of the workers' EMAs is the EMA of their mean, to 1e-6;
- what is saved within `averaged` is what was evaluated there, bit for bit;
- plateau schedulers that get one number keep one learning rate; a cloned state_dict makes small files.
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
    assert [r["not_finite"] for r in ranks] == [{True: True, False: False}] * N


def test_ema(ranks):
    assert not torch.equal(ranks[0]["ema"][0], ranks[1]["ema"][0])
    for _, mean, reference in (r["ema"] for r in ranks):
        torch.testing.assert_close(mean, reference, rtol=1e-6, atol=1e-6)


def test_best_checkpoint(ranks):
    for evaluated, saved, own in (r["best"] for r in ranks):
        assert saved == evaluated != own


def test_plateau_schedulers(ranks):
    assert len({r["plateau"] for r in ranks}) == 1 and ranks[0]["plateau"] < 0.05


def test_clones_are_small(ranks):
    for whole, cloned in (r["clones"] for r in ranks):
        assert cloned < 8_000 < 160_000 < whole


def test_clipping(ranks):
    for ours, torchs in (r["clipped"] for r in ranks):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path):
    """As it is, Trainer wraps the model or moves its parameters, and the optimizer refuses; the recipe trains."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    for steps, before, after, distance, error in run_workers(workers.trainer, N, str(tmp_path), deadline=120):
        assert steps == 6 and not torch.equal(before, after) and 0 < distance < 1
        assert error is not None and ("DistributedDataParallel" in error or "was moved" in error)
