"""Promise: a newcomer whose neighbor is lost before it has a state asks anew, and never goes on with its own: where
others are left it takes the state of one of them, else the run ends in words."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("arriving_script.py")


def run(n, victim):
    command = [sys.executable, "-m", "fused_dlam", "run", "-n", n, "--restart", 1, SCRIPT, victim]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.slow
def test_another_is_left():
    """Worker 2, to whose right the newcomer comes, dies; worker 1 is left."""
    done = run(3, 2)
    begun = [line for line in done.stdout.splitlines() if "newcomer begins" in line]
    assert done.returncode == 0 and begun and all(line.endswith("with [1.0]") for line in begun)


@pytest.mark.slow
def test_nobody_is_left():
    done = run(2, 1)
    assert done.returncode == 128 + 9 and "newcomer begins" not in done.stdout
    assert "the run is over: all workers were lost" in done.stderr  # said by the launcher, or by both
