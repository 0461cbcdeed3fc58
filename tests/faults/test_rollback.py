"""Promise: a loss in the confirmation of load_checkpoint, which went back in steps, is survived: who came through it
and who did not go on from the checkpoint's step, and take equally many steps: 30 before it, 35 after."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("rollback_script.py")


@pytest.mark.slow
def test_a_loss_while_a_checkpoint_is_loaded(tmp_path):
    root = str(SCRIPT.parents[1])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": f"{SCRIPT.parents[2]}:{root}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    print(done.stderr, *(path.read_text() for path in tmp_path.glob("*.log")))
    assert done.stdout.split("\n")[0] == "[0, 0, -9]"
    assert {(tmp_path / str(rank)).read_text() for rank in (0, 1)} == {"(35, [65], (0, 1), 0.5)"}
