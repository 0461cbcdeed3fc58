"""Promise: where a bucket's gradients are copied together, as on a GPU, no message leaves without what has arrived.

Two gloo workers, CPU tensors: training by habits that leave gradients waiting for others that never come is bit-equal
to training that sends in step(), for gossip and for averaged gradients.
"""

import late_workers
import pytest
import torch
from workers import run_together

METHODS = ("pc-dmsgd", "pmsgd")
CASES = [(h, g, o, m) for h in late_workers.HABITS for m in METHODS for g in (False, True) for o in (False, "auto")]


@pytest.fixture(scope="module")
def paths():
    ranks = run_together(2, {"train": (late_workers.train_each, CASES)})["train"]
    return [dict(zip(CASES, rank, strict=True)) for rank in ranks]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("habit", late_workers.HABITS)
def test_no_message_leaves_without_its_gradients(paths, habit, method):
    for rank in paths:
        expected, _ = rank[habit, False, False, method]
        for gathers in (False, True):
            for overlap in (False, "auto"):
                got, sending = rank[habit, gathers, overlap, method]
                assert torch.equal(got, expected), (gathers, overlap)
                assert sending == (overlap == "auto" and habit != "replaced"), "or nothing was tried"
