"""Promise about bench/asynchronous.py: it runs with small settings, and prints its table and its lines."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import asynchronous  # noqa: E402


@pytest.mark.slow
def test_it_prints_its_table(capsys):
    asynchronous.main(["--seeds", "1", "--seconds", "1"])
    text = capsys.readouterr().out
    assert "split by label, lr 0.05, 1 seed" in text
    assert all(case in text for case in asynchronous.CASES)


@pytest.mark.slow
def test_it_prints_what_the_transport_does(capfd):
    asynchronous.main(["--transport"])
    text = capfd.readouterr().out
    assert "consensus, one rank of 4 five times slower" in text and text.count("processor time of a message") == 2
    assert "death: noticed after" in text
