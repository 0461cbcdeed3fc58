"""Promises of bench/bias_exponents.py: exponents are the theorems', within 0.1 in lr and 0.15 in 1 - beta and 1 - rho;
the program prints and draws them, and tells what is wrong with a wrong call in one line."""

import sys
from pathlib import Path

import pytest
from test_cli import assert_png, cells

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import bias_exponents  # noqa: E402

from fused_dlam import topology  # noqa: E402
from fused_dlam.theory.regression import Regression  # noqa: E402


def test_the_exponents_are_the_theorems():
    """And DmSGD's bias over DecentLaM's is near 1/(1 - beta)^2."""
    problem, graph = Regression(8), topology.symmetric_exponential(8)
    sweeps = [s for method in bias_exponents.THEOREMS for s in bias_exponents.sweep(method, graph, problem, 0.9)]
    assert len(sweeps) == 9
    for s in sweeps:
        assert s.exponent == pytest.approx(s.theorem, abs=0.1 if s.quantity == "lr" else 0.15), s
    dmsgd, decentlam = (s for s in sweeps if s.quantity == "1 - beta" and s.method != "dsgd")
    assert dmsgd.values == pytest.approx([0.5, 0.2, 0.1, 0.05])
    for v, above, below in zip(dmsgd.values, dmsgd.bias, decentlam.bias, strict=True):
        assert above / below == pytest.approx(v**-2, rel=0.05)


@pytest.mark.slow
def test_the_program(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    given = ["dmsgd", "decentlam", "--out", str(tmp_path / "out.png"), "--topology", "ring", "-n", "5"]
    assert bias_exponents.main(given) == 0
    text = capsys.readouterr().out
    assert "(-2)" in cells(text, "dmsgd")[1] and "(+0)" in cells(text, "decentlam")[1]
    assert_png(tmp_path / "out.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["da-dmsgd"], "theorems for dsgd, dmsgd, decentlam, not for da-dmsgd"),
        (["--momentum", "1"], "--momentum must be from 0 to below 1"),
        (["--topology", "exponential"], "a static, symmetric graph"),
        (["--topology", "circle"], "unknown topology 'circle'"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        bias_exponents.main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count("\n") == 1
