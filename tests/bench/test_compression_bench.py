"""Promise about bench/compression.py: it runs with small settings, and prints a table for each problem."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import compression as bench  # noqa: E402


def test_bytes_are_those_of_the_codecs():
    assert [bench.sent(m, 1024) for m in bench.MESSAGES] == [4096, 2048, 1040, 528, 512]


@pytest.mark.slow
def test_it_prints_its_tables(capsys):
    bench.main(["digits", "--seeds", "1", "--steps", "3", "--messages", "bfloat16", "int4"])
    text = capsys.readouterr().out
    assert "digits, 8 workers, 1 seeds" in text and "1/7.72" in text and "1/2.00" in text
