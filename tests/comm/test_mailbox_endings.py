"""Promises of `Mailbox` about ends, processes that are forks of a script and leave through the end of the interpreter:

- without close(), after an exception, with process groups destroyed before: every process ends, with its own exit code;
- one that leaves by os._exit or is killed, with forked data loaders or while a long message is on its way, is lost
  for the others, which notice it (within 10 s here; 0.01 to 0.4 s were measured, 0.7 s in mid-message), go on, and
  close;
- one that is stopped is lost once it was silent for the timeout; when it goes on it finds itself alone, and ends.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fused_dlam

ROOT = Path(fused_dlam.__file__).parents[1]
VICTIM = 1
CODES = {"raises": 1, "leaves": 3, "killed": -9, "killed_with_loaders": -9, "killed_on_the_way": -9}  # of the victim


def ends(folder, *names):
    script = [sys.executable, str(Path(__file__).with_name("mailbox_script.py")), str(folder), *names]
    run = subprocess.run(script, capture_output=True, text=True, timeout=280, env={"PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["name"] for line in lines] == list(names), run.stderr[-5000:]
    for line in lines:
        name, codes, told = line["name"], line["codes"], line["told"]
        assert codes == [CODES.get(name, 0) if rank == VICTIM else 0 for rank in range(4)], (line, run.stderr[-5000:])
        for rank in (0, 2, 3):
            if "noticed" in (told[str(rank)] or {}):
                print(f"{name}: rank {rank} noticed it after {told[str(rank)]['noticed']:.3f} s")
                assert told[str(rank)]["noticed"] < 10.0
    return {line["name"]: line["told"] for line in lines}


def test_ends_without_close_and_a_death(tmp_path):
    assert "noticed" in ends(tmp_path, "exits", "killed")["killed"]["0"]


@pytest.mark.slow
def test_every_end(tmp_path):
    names = "raises", "destroys", "leaves", "killed_with_loaders", "killed_on_the_way", "stopped", "stopped_at_the_end"
    assert ends(tmp_path, *names)["stopped"]["1"] == {"lost": [0, 2, 3]}


@pytest.mark.slow
def test_no_end_in_twenty_aborts(tmp_path):
    ends(tmp_path, *["exits", "destroys"] * 10)
