"""Promises of comm/beacon.py, whose processes are killed and stopped:

- it refuses as soon as its process is dead, though a forked child lives on, and after close();
- it answers while the process waits or computes, and after children have ended; a stopped one does neither;
- 1,000 connections that send nothing, or garbage, do not keep it from answering, and it reads nothing.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fused_dlam

ROOT = Path(fused_dlam.__file__).parents[1]


@pytest.fixture(scope="module")
def seen():
    script = [sys.executable, Path(__file__).with_name("beacon_script.py")]
    run = subprocess.run(
        script, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("does", ["waits", "computes", "has_a_child", "had_a_child"])
def test_answers_as_long_as_its_process_lives(does, seen):
    answers, refuses, refuses_when_dead = seen[does]
    assert answers and not refuses and refuses_when_dead


def test_refuses_after_a_kill(seen):
    before, seconds, after = seen["killed"]
    print(f"{seconds:.4f} s after SIGKILL")
    assert before and seconds is not None and not after


def test_a_stopped_one_neither_refuses_nor_answers(seen):
    assert seen["stopped"] == [False, False, True]


def test_refuses_once_it_is_closed(seen):
    assert seen["closed"] == [True, True]


@pytest.mark.parametrize("sends", ["nothing", "garbage"])
def test_besieged(sends, seen):
    assert seen[sends] == [True, True, False]
