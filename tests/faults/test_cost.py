"""Promise: while nothing fails on_failure="continue" sends not one message or byte more, and parameters are bit-equal.

It asks the store nothing; but on one worker, every `admit_every` steps, whether somebody wants in: two questions.
"""

import pytest
import torch
import torch.distributed as dist
from cost_workers import KINDS, costs

from fused_dlam.tools.launch import run_workers

STEPS = 20


@pytest.fixture(scope="module")
def ranks():
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    return run_workers(costs, 3, store.port, STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_per_step(ranks, kind):
    for rank, found in enumerate(ranks):
        plain, surviving, looking, threads = found[kind]
        assert torch.equal(plain[0], surviving[0]) and torch.equal(plain[0], looking[0])
        assert plain[1] == surviving[1] == looking[1]
        assert (surviving[2], looking[2]) == (0, 2 * STEPS // 5 if rank == 0 else 0)
        assert threads <= 1  # the beacon's, of the first
