"""Promises of `optimizer.close()` with on_failure="continue".

All may close theirs and build another, however long that takes, also after a loss, and a loss after that is survived;
a worker that closes alone is gone for the others at once, though it lives. Each call of finish() waits for all who
live, and not for ever for one that is stopped.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fused_dlam

ROOT = Path(fused_dlam.__file__).parents[1]


@pytest.mark.slow
def test_together_and_alone(tmp_path):
    script = [sys.executable, Path(__file__).with_name("closing_script.py"), tmp_path]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.Popen(script, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.wait(240) == 0, run.stderr.read()
    finally:
        logs = {file.stem: file.read_text()[-2000:] for file in tmp_path.glob("*.log")}
        print("\n".join(f"-- {me} --\n{log}" for me, log in sorted(logs.items())))
        try:
            os.killpg(run.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    told = [json.loads((tmp_path / f"{me}.json").read_text()) for me in (0, 2)]
    assert told == [[[0, 1, 2, 3], [0, 1, 2], last] for last in ([0, 1], None)]
