"""Promise about bench/local_steps.py: it runs with small settings, and prints a table for each split."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import local_steps  # noqa: E402


@pytest.mark.slow
def test_it_prints_its_tables(capsys):
    local_steps.main(["--seeds", "1", "--lr", "0.05", "--seconds", "1"])
    text = capsys.readouterr().out
    assert text.count("loss at 1 s") == 2
    assert text.count("5, 5, 5, 1 local steps") == 2 * 3
