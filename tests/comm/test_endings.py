"""Promises about the end of groups, with real processes over gloo:

- training ends with exit code 0 on every rank, whichever is late in the last steps, for 2 to 5 workers, atc and awc,
  with process groups destroyed or not; a message that was sent arrives, though its sender has let everything go;
- optimizers in a row take no more threads and files than the first few, deleted or closed;
- what is copied need not be contiguous; an all-reduce that ends right after a slice of its wait is no loss;
- a closed group says so; after an exchange that failed the same ranks build anew in the same processes.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ending_workers
import pytest
import torch
from workers import run_together

import fused_dlam
from fused_dlam.comm.transfer import Mean

ROOT = Path(fused_dlam.__file__).parents[1]


@pytest.fixture(scope="module")
def pairs():
    calls = {f"row {closes}": (ending_workers.in_a_row, closes) for closes in (False, True)}
    names = ("closed", "left_behind", "place_lost", "copied")
    calls |= {name: (getattr(ending_workers, name),) for name in names}
    return run_together(2, calls)


@pytest.mark.parametrize("sizes", ["2", pytest.param("3 4 5", marks=pytest.mark.slow)])
def test_training_ends_well_whoever_is_late(sizes, tmp_path):
    script = [sys.executable, str(Path(__file__).with_name("exit_race.py")), str(tmp_path), "0.3", *sizes.split()]
    run = subprocess.run(script, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)})
    cases = run.stdout.splitlines()
    assert len(cases) == sum(2 * int(n) for n in sizes.split()), run.stderr
    codes = [code for case in cases for code in case.split("[")[1].strip("]").split(", ")]
    assert set(codes) == {"0"}, run.stdout + run.stderr


@pytest.mark.parametrize("closes", [False, True])
def test_nothing_piles_up(closes, pairs):
    for early, late in pairs[f"row {closes}"]:
        assert all(b <= a for a, b in zip(early, late, strict=True)), (early, late)


def test_a_closed_group_says_so(pairs):
    for told, threads in pairs["closed"]:
        assert [kind for kind, _ in told] == ["ClosedError"] * 3 and all("was closed" in text for _, text in told)
        assert threads == []


def test_what_was_sent_arrives_though_the_sender_has_gone(pairs):
    assert pairs["left_behind"] == [None, True]


def test_what_is_not_contiguous_is_copied(pairs):
    for x, laid_out in pairs["copied"]:
        assert torch.equal(x, torch.arange(120.0).view(2, 3, 4, 5)) and laid_out


class Late:
    """A work that ends right after a slice of its wait has run out, well or not."""

    def __init__(self, error=None):
        self.waits, self.error = 0, error

    def wait(self, *seconds):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise self.error

    def is_completed(self):
        return True


def test_what_ends_after_its_slice_is_no_loss():
    """With on_failure="continue" all-reduces are waited for in slices of 0.2 s."""
    mean = Mean.__new__(Mean)
    mean.group = SimpleNamespace(timeout=30.0)
    mean._wait_in_slices(Late(), lambda: "")
    with pytest.raises(RuntimeError, match="Connection closed"):
        mean._wait_in_slices(Late(RuntimeError("Connection closed by peer")), lambda: "")


def test_a_receive_that_nobody_waits_for_holds_up_no_message(pairs):
    assert pairs["place_lost"] == [True, True]


@pytest.fixture(scope="module")
def threes():
    names = ("collected_at_the_end", "anew")
    return run_together(3, {name: (getattr(ending_workers, name),) for name in names})


def test_what_is_collected_while_a_process_ends_is_waited_for(threes):
    assert threes["collected_at_the_end"] == [[], True, True]


def test_the_same_ranks_build_anew_after_an_error(threes):
    for rank, (*errors, last) in enumerate(threes["anew"]):
        texts = [e for e in errors if isinstance(e, str)]
        assert [e for e in errors if not isinstance(e, str)] == [1.0, 1.0] and last == 1.0
        assert len(texts) == (1 if rank == 2 else 2), errors
        assert "neighbor_allreduce()" in texts[-1]
