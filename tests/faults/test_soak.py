"""Random schedules of kills, stops, cuts, delays and joins, at any moment, recoveries included.

Promise: nobody hangs, no survivor fails, all agree on who is left, each takes one local step in every step(), they are
together, centered buffers have mean zero. See bench/soak.py; 200 schedules by its command.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import needs_namespaces

SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


def soak(tmp_path, *options):
    command = [sys.executable, str(SOAK), "--folder", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "hierarchical"])
def test_kills_and_a_newcomer(tmp_path, kind):
    soak(tmp_path, "--seeds", "60:61", "-n", "4", "--steps", "40", "--modes", "kill,join", "--optimizers", kind)


@pytest.mark.slow
@needs_namespaces
def test_cut_links(tmp_path):
    soak(tmp_path, "--lab", "--modes", "cut,kill,join", "--seeds", "400:403", "-n", "4", "--steps", "40")


@pytest.mark.slow
def test_many_schedules(tmp_path, capsys):
    with capsys.disabled():
        soak(tmp_path, "--seeds", f"0:{os.environ.get('SOAK_SEEDS', '20')}", "-n", "4", "--steps", "40")
