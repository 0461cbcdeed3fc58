"""The performance gate: it passes on what is here, refuses what it must, and gates what really runs.

Promises: every built-in rule is at its floor on sm_90 and every negative control is refused (the subset for each
commit); a rule of ten lines outside the package is gated with no other code; what the gate compiles is, instruction for
instruction, what the launcher compiles for padded buffers, and new scalars or other buffers compile nothing; x's copy
in another type costs its bytes and no more, rounded to nearest even, and the flag of skipped steps one scalar.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

import fused_dlam
from fused_dlam import rules  # noqa: E402
from fused_dlam.rules.scalars import Scalars

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the gate compiles what TRITON_INTERPRET=1 interprets", allow_module_level=True)

from fused_dlam.kernels import triton_passes  # noqa: E402
from fused_dlam.kernels.gate import build as gate_build  # noqa: E402
from fused_dlam.kernels.gate import command as gate  # noqa: E402
from fused_dlam.kernels.gate import controls as gate_controls  # noqa: E402
from fused_dlam.kernels.gate import table as gate_table  # noqa: E402
from fused_dlam.kernels.gate.table import HEADER, compare, show  # noqa: E402


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


# ----------------------------------------------------------------------------------------------------------------------


def run_gate(*args, **env):
    command = [sys.executable, "-m", "fused_dlam.kernels.gate", *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.slow
def test_the_subset_for_each_commit():
    result = run_gate("--quick")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    table, controls = result.stdout.split("negative controls")
    assert {line.split()[0] for line in table.splitlines()[2:-2]} == set(rules.ALL)
    assert controls.count(" refused ") == len(gate_controls.CONTROLS)


@pytest.mark.slow
def test_a_rule_outside_the_package(capsys):
    assert gate.main([f"{__file__}:nesterov", "--quick"]) == 0
    assert capsys.readouterr().out.count("\nnesterov ") == 12  # 2 types x (pack, 2 combine, 2 awc), 2 that emit
    assert gate.main([f"{__file__}:looping", "--quick"]) == 1
    assert "FAIL sm_90: loops: 1" in capsys.readouterr().out


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


@pytest.mark.parametrize("message", ["bf16", "fp16"])
def test_a_copy_costs_its_bytes_and_is_rounded_to_nearest_even(message):
    """For AWC it is the next message, and saves a pass that reads x and writes it; for others a 16-bit parameter."""
    for rule, d in ((rules.decentlam.adapt_while_communicating(), 2), (rules.adamw, 0), (rules.psgd, 0)):
        plain, case = (gate_build.Case(rule, "awc", p, message, "bf16", d) for p in ("combine", "emit"))
        built = gate_build.build(case, "sm_90")
        assert gate_build.judge(case, "sm_90", built).failures == []
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
        case = gate_build.Case(rule, "atc", "guarded", "fp32", gradient, 0)
        assert gate_build.judge(case, "sm_90", gate_build.build(case, "sm_90")).failures == []


def test_a_control_that_is_not_refused_fails_the_gate(monkeypatch, capsys):
    harmless = gate_controls.Control("nothing wrong", "spills", {})
    monkeypatch.setattr(gate_controls, "CONTROLS", [harmless])
    assert gate.main([f"{__file__}:nesterov", "--quick"]) == 1
    assert "NOT REFUSED" in capsys.readouterr().out


def test_a_change_shows_as_a_diff(monkeypatch, tmp_path):
    row = ["decentlam", "atc", "pack", "fp32", "fp32", "0", "12", "4x128", "2x128", "32"]
    kept = tmp_path / "gate.txt"
    monkeypatch.setattr(gate_table, "KEPT", kept)
    kept.write_text("\n".join(("triton 1.2.3", show((*HEADER, "sm_90")), show(row))) + "\n")

    assert compare([row], ("sm_90",), "1.2.3", complete=True) == ([], [])
    more_registers = [*row[:-1], "40"]
    diff = [f"- {show(row)}", f"+ {show(more_registers)}"]
    assert compare([more_registers], ("sm_90",), "1.2.3", complete=False) == (diff, [])
    assert compare([more_registers], ("sm_90",), "1.2.4", complete=False) == ([], diff)  # ptxas may differ
    more_bytes = [*row[:6], "16", *row[7:]]
    assert compare([more_bytes], ("sm_90",), "1.2.4", complete=False)[0]
    other = ["dsgd", *row[1:]]
    assert compare([other], ("sm_90",), "1.2.3", complete=True)[0] == [
        f"+ {show(other)}",
        diff[0],
    ]


def test_the_kept_table_is_complete():
    """A new built-in rule needs `fused-dlam gate its-name --update`."""
    version, header, *lines = gate_table.KEPT.read_text().splitlines()
    assert header == show((*HEADER, *gate.ARCHITECTURES))
    assert [tuple(line.split()[:6]) for line in lines] == [
        c.key for rule in rules.ALL.values() for c in gate.cases(rule)
    ]


def test_what_it_cannot_do_is_said(capsys):
    result = run_gate("--quick", TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET" in result.stderr
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


# -- What the launcher compiles ----------------------------------------------------------------------------------------


class StandInDriver:
    """A GPU that can be compiled for and not launched on."""

    def get_current_target(self):
        return gate_build.TARGETS["sm_90"]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Launches:
    """In the place of a kernel: compiles what a launch would compile, keeps it, and launches nothing."""

    def __init__(self, kernel):
        self.kernel, self.compiled, self.arg_names = kernel, [], kernel.arg_names

    def warmup(self, *args, grid, **options):
        self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))
        return {grid: lambda *args: None}


@pytest.fixture
def launches(monkeypatch, tmp_path):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        monkeypatch.setattr(triton.runtime.driver, "_active", StandInDriver())
        stand_ins = []
        for name in ("_pack_kernel", "_combine_kernel"):
            kernel = getattr(triton_passes, name)
            # A GPU's own kernels, if there is one, must not be replaced by those compiled here.
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
            stand_ins.append(Launches(kernel))
            monkeypatch.setattr(triton_passes, name, stand_ins[-1])
        yield stand_ins


def step(rule, n, d, message=torch.float32, lr=0.1, passes=None, copies=(), skip=0.0):
    passes = passes or triton_passes.Fused(rule, "cpu")
    passes.set(Scalars(rule.scalars(lr, 0.9, 0.0), (0.5 / (d + lr),) * d, skip=skip))
    x, g, *state = (aligned(n) for _ in range(2 + len(rule.state)))
    passes.pack(x, g, state, aligned(rule.messages * n, message).view(-1, n))
    passes.combine(x, g, state, aligned(d * rule.messages * n, message).view(d, rule.messages, n), copies)
    return passes


def aligned(n, dtype=torch.float32):
    """Zeros that start at a multiple of 64 bytes, as on a GPU: on a CPU not all tensors do."""
    t = torch.zeros(n + 32, dtype=dtype)
    start = -t.data_ptr() % 64 // t.element_size()
    return t[start : start + n]


def test_the_gate_compiles_what_runs(launches):
    for rule, d, message in ((rules.pc_dmsgd, 3, torch.bfloat16), (rules.da_dmsgd, 1, torch.float32)):
        step(rule, 4096, d, message)
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[message]
        for pass_, kernel in zip(("pack", "combine"), launches, strict=True):
            gated = gate_build.build(gate_build.Case(rule, "atc", pass_, name, "fp32", d), "sm_90")
            assert instructions(kernel.compiled[-1]) == instructions(gated)


def test_the_gate_compiles_what_runs_with_copies_and_a_flag(launches):
    rule = rules.decentlam.adapt_while_communicating()
    for d, pass_, copies, skip in (
        (2, "emit", (aligned(4096, torch.bfloat16),), 0.0),
        (0, "guarded", (), torch.tensor(0.0)),
    ):
        step(rule, 4096, d, torch.bfloat16, copies=copies, skip=skip)
        gated = gate_build.build(gate_build.Case(rule, "awc", pass_, "bf16", "fp32", d), "sm_90")
        assert instructions(launches[1].compiled[-1]) == instructions(gated)


def instructions(kernel):
    """PTX without the lines that name source files."""
    return [line for line in kernel.asm["ptx"].splitlines() if not line.lstrip().startswith((".loc", ".file", "//"))]


def test_new_scalars_and_buffers_compile_nothing(launches):
    passes = step(rules.decentlam, 4096, 2)
    for lr, n in ((0.05, 4096), (0.0, 4096), (1.0, 8192), (0.3, 1024)):
        step(rules.decentlam, n, 2, lr=lr, passes=passes)
    for kernel in launches:
        assert len({id(compiled) for compiled in kernel.compiled}) == 1


def test_rules_with_equal_equations_and_other_scalars_are_kept_apart(launches):
    """Triton keys its cache on the text of constants: the scalars' places must be in that text."""
    a = rules.decentlam
    b = fused_dlam.Rule("b", a.send, a.update, a.state, hyper={"first": 1.0}, derive=a.derive)
    assert b.H._fields.index("inverse_lr") != a.H._fields.index("inverse_lr")
    step(a, 1024, 1)
    step(b, 1024, 1)
    of_a, of_b = launches[1].compiled
    assert instructions(of_a) != instructions(of_b)
