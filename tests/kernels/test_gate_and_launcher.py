"""The gate compiles what runs: on a GPU that can be compiled for and not launched on.

Promises: what the gate compiles is, instruction for instruction, what the launcher compiles for padded buffers; new
scalars or other buffers compile nothing; rules whose scalars have other places get kernels of their own.
"""

import os
from collections import defaultdict

import pytest
import torch

import fused_dlam
from fused_dlam import rules
from fused_dlam.rules.scalars import Scalars

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the gate compiles what TRITON_INTERPRET=1 interprets", allow_module_level=True)

from fused_dlam.kernels import triton_passes  # noqa: E402
from fused_dlam.kernels.gate.build import TARGETS, build  # noqa: E402
from fused_dlam.kernels.gate.cases import Case  # noqa: E402


class StandInDriver:
    """A GPU that can be compiled for and not launched on."""

    def get_current_target(self):
        return TARGETS["sm_90"]

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


def step(rule, n, d, message=torch.float32, lr=0.1, passes=None, copies=(), skip=0.0, low=None):
    passes = passes or triton_passes.TritonPasses(rule, "cpu", guard=True)
    passes.set(Scalars(rule.scalars(lr, 0.9, 0.0), (0.5 / (d + lr),) * d, skip=skip))
    x, g, *state = (aligned(n) for _ in range(2 + len(rule.state)))
    passes.pack(x, g, state, aligned(rule.messages * n, message).view(-1, n), low)
    passes.combine(x, g, state, aligned(d * rule.messages * n, message).view(d, rule.messages, n), copies, low)
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
            gated = build(Case(rule, "atc", pass_, name, "fp32", d), "sm_90")
            assert instructions(kernel.compiled[-1]) == instructions(gated)


def test_the_gate_compiles_what_runs_with_copies_a_flag_and_low_parameters(launches):
    rule = rules.decentlam.under("awc")
    half = aligned(4096, torch.bfloat16)
    for d, passes, more in (
        (2, ("pack", "emit"), {"copies": (half,)}),
        (0, ("pack", "skips"), {"skip": torch.tensor(0.0)}),
        (1, ("packlow", "follow"), {"copies": (half,), "low": half}),
    ):
        step(rule, 4096, d, torch.bfloat16, **more)
        for pass_, kernel in zip(passes, launches, strict=True):
            gated = build(Case(rule, "awc", pass_, "bf16", "fp32", d), "sm_90")
            assert instructions(kernel.compiled[-1]) == instructions(gated)


def test_a_guard_is_a_kernel_of_its_own(launches):
    for guard in (False, True):
        step(rules.dsgd, 1024, 1, passes=triton_passes.TritonPasses(rules.dsgd, "cpu", guard=guard))
    for kernel in launches:
        without, guarded = kernel.compiled
        assert instructions(without) != instructions(guarded)


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
