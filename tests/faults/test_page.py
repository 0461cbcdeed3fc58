"""Promise: the script of comm/README.md does what the page says, word for word, when a worker is killed in a step and
when a newcomer is let in: all end well, at one step, over one model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_dlam

PAGE = Path(fused_dlam.__file__).parent / "comm" / "README.md"
BEFORE = """
import os, signal, sys, time
import torch, torch.distributed as dist
from torch.nn.functional import mse_loss as loss
from fused_dlam import GossipSGD, save_checkpoint
torch.manual_seed(0)
model = torch.nn.Linear(6, 1)
NEWCOMER = "FUSED_DLAM_NEWCOMER" in os.environ
def batch(step, rank, size):
    if step == 30 and rank == 1 and size == 3 and not NEWCOMER:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(97 * step + rank))
    return x, x.sum(1, keepdim=True)
"""
AFTER = """
print("END", optimizer.steps_done, optimizer.members, scheduler.last_epoch, flush=True)
"""


@pytest.mark.slow
def test_the_script_of_the_page(tmp_path):
    text = next(code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "steps_done" in code)
    for old, new in (("10_000", "600"), ("% 1000", "% 100"), ("timeout=60", "timeout=60, admit_every=10")):
        assert old in text
        text = text.replace(old, new)
    script = tmp_path / "train.py"
    script.write_text(BEFORE + text + AFTER)
    command = [sys.executable, "-m", "fused_dlam", "run", "-n", "3", "--restart", "1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    print(done.stdout[-3000:], done.stderr[-6000:])
    assert done.returncode == 0
    ends = [line.partition("END ")[2] for line in done.stdout.splitlines() if "END" in line]
    assert ends == ["600 (0, 2, 3) 599"] * 3
    assert (tmp_path / "run" / "last").exists()
    assert torch.allclose(torch.load(tmp_path / "model.pt")["weight"], torch.ones(1, 6), atol=0.05)
