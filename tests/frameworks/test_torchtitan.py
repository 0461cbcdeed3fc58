"""Promise of fused_dlam/frameworks/torchtitan.md: with its lines torchtitan's containers of optimizers, schedulers and
checkpoints train two workers of two ranks, and a run that starts from a checkpoint goes on bit for bit.
"""

import fsdp2_workers
import pytest
import titan_workers
import torch

from fused_dlam.tools.launch import run_workers

pytest.importorskip("torchtitan.components.checkpointer")


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    ranks = run_workers(titan_workers.resumed, 4, str(tmp_path), deadline=120)
    for last, again, loaded, begins, steps in ranks:
        assert loaded and begins == fsdp2_workers.HALF and torch.equal(last, again)
        assert steps == [[fsdp2_workers.STEPS] * 2] * 2  # of both optimizers
    assert not torch.equal(ranks[0][0], ranks[2][0]), "workers differ"
