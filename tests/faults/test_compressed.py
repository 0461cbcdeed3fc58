"""Promise: where messages are compressed and a worker is killed, those that are left keep their mean, also with a
newcomer that takes its place.

From the step from which they go on together the mean of their parameters moves by the mean of their momenta, float64,
to 1e-12: what was remembered of messages to others counts no more, and all remember alike. A graph of another number of
workers has other references, and the optimizer's state shows those.
"""

import subprocess
import sys
from pathlib import Path

import mean_run
import pytest
import torch

N, VICTIM, DIES_AT, STEPS = 5, 1, 9, 24


@pytest.mark.slow
@pytest.mark.parametrize("compress", mean_run.CODECS)
def test_survivors_keep_their_mean(tmp_path, compress):
    ends, resumes = mean_run.survivors(tmp_path, compress, N, VICTIM, DIES_AT, STEPS)
    x = torch.stack([end["path"] for end in ends.values()]).mean(0)
    m = torch.stack([end["m"] for end in ends.values()]).mean(0)
    moved = x[1:] - x[:-1]
    assert (moved + mean_run.LR * m)[resumes:].abs().max() < 1e-12
    for end in ends.values():
        # Four workers have two matrices, five had three; own and heard each.
        assert len(end["names"]) == (1 if compress == "int8" else 4)
        assert all(torch.equal(a, b) for a, b in zip(end["shown"], end["kept"], strict=True))
        assert end["path"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("compress", ["topk"])
def test_a_newcomer_keeps_the_mean(tmp_path, compress):
    script = Path(__file__).with_name("compressed_newcomer.py")
    command = [sys.executable, "-m", "fused_dlam", "run", "-n", "4", "--restart", "1", str(script), str(tmp_path)]
    done = subprocess.run([*command, compress], timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [torch.load(tmp_path / f"{i}.pt") for i in (1, 2, 3, 4)]
    assert {end["members"] for end in ends} == {(1, 2, 3, 4)}
    (since,) = {end["since"] for end in ends}
    steps = range(since + 1, 1 + max(ends[-1]["path"]))
    assert len(steps) > 10
    for step in steps:
        before, after, m = (
            torch.stack(values).mean(0) for values in zip(*(end["path"][step] for end in ends), strict=True)
        )
        assert (after - before + 0.05 * m).abs().max() < 1e-12, step
    assert len({len(end["kept"]) for end in ends}) == 1
