"""Promises about a rank that dies while a long message from it, or to it, is on its way, with real processes over gloo:

- whoever waits for it learns that its connection closed, long before `timeout`, in a function of a user's own loop and
  in an optimizer's step, and where the wait is for sending as well as for receiving;
- with on_failure="continue" those that are left go on;
- Ctrl-C ends such a wait, and the process;
- whoever is through leaves, though its last message does not arrive.

gloo alone lets them wait for the whole timeout (comm/breaks.py). Mailboxes: test_mailbox_endings.py.
"""

import subprocess
import sys
from pathlib import Path

import breaks_workers
import piece_faults
import pytest


@pytest.mark.parametrize("name", ["exchange", "step"])
def test_a_rank_that_dies_on_the_way(name, tmp_path):
    """Rank 0 sends to the one that dies, rank 2 hears from it."""
    for rank, told in zip((0, 2), piece_faults.run(breaks_workers.dies_on_the_way, name, tmp_path), strict=True):
        assert isinstance(told, tuple), told
        words, peer, call = told
        assert words.startswith(f"rank {rank} in {breaks_workers.CALLS[name]}") and call == breaks_workers.CALLS[name]
        assert "timed out" not in words.lower() and ("closed its connection" in words or "gave up" in words), words
        assert peer != rank and "rank 1" in words, words


SCRIPT = Path(__file__).with_name("breaks_workers.py")


@pytest.mark.slow
def test_those_that_are_left_go_on(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "goes_on", str(tmp_path)], timeout=180, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 2, 3)] == ["(0, 2, 3)"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["interrupted", "leaves"])
def test_a_wait_that_ends(name):
    done = subprocess.run([sys.executable, str(SCRIPT), name], timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
