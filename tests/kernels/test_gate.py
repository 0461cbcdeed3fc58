"""The performance gate: it passes on what is here, and refuses what it must.

Promises: every built-in rule is at its floor on sm_90, and its rows are those of the kept table (the subset for each
commit); a rule of ten lines outside the package is gated with no other code, and one that misses its floor fails; every
negative control is refused; x's copy in another type costs its bytes and no more, rounded to nearest even, as do low
parameters that are read, and the flag of skipped steps one scalar; the guard against what is not finite costs no memory
traffic and no barrier.
"""

import os
import re

import pytest
from everyday import everyday

import fused_dlam
from fused_dlam import rules

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the gate compiles what TRITON_INTERPRET=1 interprets", allow_module_level=True)

import gate_controls  # noqa: E402

from fused_dlam.kernels import triton_kernels  # noqa: E402
from fused_dlam.kernels.gate import command as gate  # noqa: E402
from fused_dlam.kernels.gate import table  # noqa: E402
from fused_dlam.kernels.gate.build import build, judge  # noqa: E402
from fused_dlam.kernels.gate.cases import ARCHITECTURES, Case, cases  # noqa: E402
from fused_dlam.kernels.gate.table import HEADER, show  # noqa: E402


# -- A rule of ten lines outside the package, and rules that may not be -----------------------------------------------
@fused_dlam.jit
def send_nesterov(x, g, s, h):
    return (x - h.lr * (g + h.momentum * s.momentum_buffer),)


@fused_dlam.jit
def update_nesterov(x, g, s, pull, h):
    m = h.momentum * s.momentum_buffer + g
    return x - h.lr * (g + h.momentum * m) + pull[0], (m,)


nesterov = fused_dlam.Rule("nesterov", send_nesterov, update_nesterov, ("momentum_buffer",))


@fused_dlam.jit
def update_looping(x, g, s, pull, h):
    for _ in range(1000):
        x = x - h.lr * g
    return x + pull[0], ()


looping = fused_dlam.Rule("looping", rules.dsgd.send, update_looping)


@fused_dlam.jit
def send_square(x, g, s, h):
    return (x**2,)


# -- The command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_subset_for_each_commit(capsys):
    """At their floors and as in the kept table; registers, which ptxas chooses, under the version that kept them."""
    assert gate.main(["--quick"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[2:-3]]
    assert {row[0] for row in printed} == set(rules.ALL)
    version, header, *lines = table.kept()
    kept = {tuple(row[:6]): row for row in map(str.split, lines)}
    fixed, registers = len(HEADER), header.split().index("sm_90")
    for row in printed:
        old = kept[tuple(row[:6])]
        assert row[:fixed] == old[:fixed]
        assert version != f"triton {triton.__version__}" or row[fixed] == old[registers], row


@pytest.mark.slow
def test_a_rule_outside_the_package(capsys):
    assert gate.main([f"{__file__}:nesterov", "--quick"]) == 0
    assert capsys.readouterr().out.count("\nnesterov ") == 12  # 2 types x (pack, 2 combine, 2 awc), 2 that emit


def test_a_rule_that_misses_its_floor_fails(monkeypatch, capsys):
    monkeypatch.setattr(gate, "cases", lambda rule, *_: [Case(rule, "atc", "combine", "fp32", "fp32", 1)])
    assert gate.main([f"{__file__}:looping", "--quick"]) == 1
    assert "FAIL sm_90: loops: 1" in capsys.readouterr().out


def test_the_kept_table_is_complete():
    """A new built-in rule needs `fused-dlam gate its-name --update`."""
    version, header, *lines = table.kept()
    assert version.startswith("triton ") and header == show((*HEADER, *ARCHITECTURES))
    assert [tuple(line.split()[:6]) for line in lines] == [c.key for rule in rules.ALL.values() for c in cases(rule)]


def test_an_update_replaces_the_rows_of_its_rules(monkeypatch, tmp_path):
    dsgd, psgd, new = ([name, *"abcdefgh", registers] for name, registers in (("dsgd", 1), ("psgd", 2), ("dsgd", 3)))
    gone = ["no-such-rule", *dsgd[1:]]
    monkeypatch.setattr(table, "KEPT", tmp_path / "gate.txt")
    table.KEPT.write_text("\n".join(("triton 1.2.3", show((*HEADER, "sm_90")), *map(show, (psgd, gone, dsgd)))) + "\n")
    table.keep("1.2.3", ("sm_90",), [new, new])
    assert table.kept()[2:] == [show(psgd), show(new), show(new)]


def test_what_it_cannot_do_is_said(monkeypatch, capsys, tmp_path):
    for args in (
        ["--archs", "sm_91"],
        ["--quick", "--update"],
        ["no-such-rule"],
        [f"{__file__}:nobody"],
        ["x:y", "--update"],
    ):
        with pytest.raises(SystemExit) as error:
            gate.main(args)
        assert error.value.code == 2
    assert "known: sm_80, sm_90, sm_100, gfx942" in capsys.readouterr().err
    monkeypatch.setattr(table, "KEPT", tmp_path / "gate.txt")
    for text, complaint in (("triton 1.2.3\n", "from triton 1.2.3"), (None, "source checkout")):
        table.KEPT.write_text(text) if text else table.KEPT.unlink()
        with pytest.raises(SystemExit):
            gate.main(["dsgd", "--update"])
        assert complaint in capsys.readouterr().err
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    assert gate.main(["--quick"]) == 2 and "TRITON_INTERPRET" in capsys.readouterr().err


# -- The floor, and negative controls ----------------------------------------------------------------------------------


def test_the_floor_is_traced_from_the_equations():
    from fused_dlam.kernels.gate.floor import combine_floor, pack_floor

    def words(rule, d):
        return pack_floor(rule, "fp32", "fp32").bytes / 4, combine_floor(rule, "fp32", "fp32", d).bytes / 4

    for d in (1, 3):
        assert words(rules.decentlam, d) == (3, 5 + d)
        assert words(rules.pc_dmsgd, d) == (4, 7 + d)
        assert words(rules.awc_dmsgd, d) == (2, 5 + d)  # packs x alone
        assert words(rules.da_dmsgd, d) == (5, 5 + 2 * d)  # two messages
        assert words(rules.dsgd, d) == (3, 3 + d)
    assert words(rules.decentlam, 0) == (3, 5)  # as torch's fused SGD
    assert combine_floor(rules.decentlam, "bf16", "bf16", 2, emit=True).bytes == 4 + 2 + 4 + 2 * 2 + 8 + 2
    with pytest.raises(TypeError, match=r"'squares' may use \+ - \* / and .sqrt\(\) and nothing else"):
        pack_floor(fused_dlam.Rule("squares", send_square, rules.dsgd.update), "fp32", "fp32")


@pytest.mark.parametrize(
    "architecture", [a if a == "sm_90" else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
@pytest.mark.parametrize("control", gate_controls.CONTROLS, ids=lambda control: control.what)
def test_negative_controls_are_refused(control, architecture):
    if control.nvidia_only and not architecture.startswith("sm_"):
        pytest.skip("nothing to refuse there")
    failures = gate_controls.run(control, architecture).failures
    assert any(failure.startswith(control.reason) for failure in failures), failures


def test_what_the_controls_change_is_what_is_refused():
    """Unchanged, the same pass is at its floor."""
    for types in (("fp32", "fp32"), ("bf16", "fp32")):
        assert gate_controls.run(gate_controls.Control("nothing wrong", "", {}, types=types), "sm_90").failures == []


@pytest.mark.parametrize("message", ["bf16", "fp16"])
def test_a_copy_costs_its_bytes_and_is_rounded_to_nearest_even(message):
    """For AWC it is the next message, and saves a pass that reads x and writes it; for others a 16-bit parameter."""
    for rule, d in ((rules.decentlam.under("awc"), 2), (rules.adamw, 0), (rules.psgd, 0)):
        plain, case = (Case(rule, "awc", p, message, "bf16", d) for p in ("combine", "emit"))
        built = build(case, "sm_90")
        assert judge(case, "sm_90", built).failures == []
        assert case.floor.bytes == plain.floor.bytes + 2
        if d:
            assert case.floor.bytes == plain.floor.bytes + case._replace(pass_="pack").floor.bytes - 4
        # Every conversion of what is stored and sent; `.rn` is IEEE's rounding to nearest, ties to even.
        kind = message.replace("fp", "f")
        narrowing = [line for line in built.asm["ptx"].splitlines() if re.search(rf"\bcvt\S*\.{kind}\S*\.f32\b", line)]
        assert narrowing and all(re.search(r"\bcvt\.rn\.", line) for line in narrowing)


@pytest.mark.parametrize("rule", [rules.dsgd, rules.pc_dmsgd, rules.adamw], ids=lambda rule: rule.name)
def test_the_flag_of_skipped_steps_costs_one_scalar(rule):
    for gradient in ("fp32", "bf16"):
        case = Case(rule, "atc", "skips", "fp32", gradient, 0)
        assert judge(case, "sm_90", build(case, "sm_90")).failures == []


@pytest.mark.parametrize("types", [("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp16")])
@pytest.mark.parametrize(
    "rule", everyday([rules.pc_dmsgd, rules.da_dmsgd], [rules.pc_dmsgd]), ids=lambda rule: rule.name
)
def test_the_guard_costs_no_traffic(rule, types):
    for pass_, d in (("pack", 0), ("combine", 1), ("combine", 3)):
        case = Case(rule, "atc", pass_, *types, d)
        without, guarded = (judge(case, "sm_90", build(case, "sm_90", guard=guard)) for guard in (False, True))
        assert without.failures == guarded.failures == []
        assert (without.code.loads, without.code.stores) == (guarded.code.loads, guarded.code.stores)


@pytest.mark.parametrize("low", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", [rules.mi_dmsgd, rules.mi_dmsgd.under("awc")], ids=lambda rule: rule.schedule)
def test_an_outer_step_is_one_pass_over_anchor_and_parameters(rule, low):
    """It takes y for the gradient, and writes the new x to y too: no buffer for the way that was gone."""
    inner, outer = (Case(r, rule.schedule, "emit", low, low, 1) for r in (rule, rule.outer()))
    built = build(outer, "sm_90")
    assert judge(outer, "sm_90", built).failures == []
    narrowing = [line for line in built.asm["ptx"].splitlines() if re.search(r"\bcvt\S*\.bf16\S*\.f32\b", line)]
    assert bool(narrowing) == (low == "bf16") and all(re.search(r"\bcvt\.rn\.", line) for line in narrowing)
    assert outer.floor.bytes == inner.floor.bytes


LOW = [rules.pc_dmsgd, rules.da_dmsgd, rules.dsgd]


@pytest.mark.parametrize("low", ["bf16", "fp16"])
@pytest.mark.parametrize("rule", everyday(LOW, [rules.pc_dmsgd]), ids=lambda rule: rule.name)
def test_low_parameters_cost_their_bytes(rule, low):
    for pass_, plain, d in (
        ("packlow", "pack", 0),
        ("follow", "emit", 0),
        ("follow", "emit", 1),
        ("follow", "emit", 3),
    ):
        case = Case(rule, "atc", pass_, low, "fp32", d)
        assert judge(case, "sm_90", build(case, "sm_90")).failures == []
        assert case.floor.bytes == case._replace(pass_=plain).floor.bytes + 2
