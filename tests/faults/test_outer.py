"""Promise: where a worker is killed within a round of inner steps, the others end their rounds, a newcomer begins where
the others are in theirs, and all exchange in the same batches.

From then on the mean of the anchors stays within a round, and moves by the mean of the outer momenta at its end, in
float64 to 1e-12; and there everybody's parameters are its anchor.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["auto", "awc"])
def test_a_newcomer_takes_part_in_rounds(tmp_path, schedule):
    script = Path(__file__).with_name("outer_newcomer.py")
    command = [sys.executable, "-m", "fused_dlam", "run", "-n", "4", "--restart", "1", str(script), str(tmp_path)]
    done = subprocess.run([*command, schedule], timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [torch.load(tmp_path / f"{i}.pt") for i in (1, 2, 3, 4)]
    assert {end["members"] for end in ends} == {(1, 2, 3, 4)}
    since = max(end["since"] for end in ends)
    steps = range(since + 1, 1 + min(max(end["path"]) for end in ends))  # they learn of it within a round
    assert len(steps) > 20
    exchanges = 0
    for step in steps:
        before, after, m, y = (torch.stack(values) for values in zip(*(end["path"][step] for end in ends), strict=True))
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert len(set(moved)) == 1, (step, moved)
        exchanges += moved[0]
        if moved[0]:
            assert torch.equal(after, y)
            assert (after - before + 0.7 * m).mean(0).abs().max() < 1e-12, step
    assert exchanges >= len(steps) // 3


@pytest.mark.slow
def test_a_newcomers_way_counts_by_its_own_steps(tmp_path):
    """With local_steps=True and steady gradients every worker goes as far as the mean number of steps, in the round too
    in which one has come, mostly in the midst of it."""
    script = Path(__file__).with_name("unequal_newcomer.py")
    command = [sys.executable, "-m", "fused_dlam", "run", "-n", "3", "--restart", "1", str(script), str(tmp_path)]
    done = subprocess.run(command, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = [torch.load(tmp_path / f"{i}.pt") for i in (1, 2, 3)]
    shared = [k for k in paths[2] if all(path.get(k, ((),))[0] == (1, 2, 3) for path in paths)]
    assert len(shared) >= 3
    for exchange in shared:
        _, went, ways = zip(*(path[exchange] for path in paths), strict=True)
        assert ways == pytest.approx([0.1 * sum(went) / 3] * 3, abs=1e-12), exchange
