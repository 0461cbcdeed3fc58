"""Promise: where masses differ and a worker is killed, those that are left keep what push-sum keeps.

From the step from which they go on together, on the graph of their number, the mean of their parameters weighted by
their masses moves by the mean of their momenta, in float64 to 1e-12.
"""

import mean_run
import pytest
import torch

N, VICTIM, DIES_AT, STEPS = 5, 0, 9, 40


@pytest.mark.slow
@pytest.mark.parametrize("graph", mean_run.GRAPHS)
def test_survivors_keep_the_weighted_mean(tmp_path, graph):
    """Worker 0 dies, which all others send to."""
    ends, resumes = mean_run.survivors(tmp_path, graph, N, VICTIM, DIES_AT, STEPS)
    x = torch.stack([end["path"] for end in ends.values()])  # [workers, steps, dimension]
    m = torch.stack([end["m"] for end in ends.values()]).mean(0)
    left = mean_run.GRAPHS[graph](N - 1)
    assert not left.is_doubly_stochastic
    mass = torch.stack([torch.from_numpy(left.mass(k)) for k in range(STEPS + 1)], 1)[:, :, None]
    moved = (mass * x).mean(0).diff(dim=0) + mean_run.LR * m
    assert moved[resumes:].abs().max() < 1e-12
