"""When kernels are built, on a driver that launches nothing (stub_driver.py).

Promises, under the oldest supported Triton and the newest: another learning rate builds nothing, and after `warm`
nothing is built at all; no kernel has a parameter with a default, which the oldest Triton cannot build.

The functions called `stub_...` run in processes with the stub (stub_process.py).
"""

import pytest
import stub_process
import torch

from fused_dlam import rules

stub_process.skip_unless_possible()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from stub_passes import Passes, buffers  # noqa: E402

from fused_dlam.kernels import triton_kernels as kernels  # noqa: E402
from fused_dlam.kernels.triton_launch import Launcher  # noqa: E402

RATES = (0, 0.0, 1, 1.0, 0.1, 1e-30, float("inf"))


def stub_rates(stub, constant):
    """Builds over seven learning rates. constant: with a pass that takes them as a constant of the kernel."""
    p, before = Passes(stub, rules.pc_dmsgd, 4096), stub.kernels
    for lr in RATES:
        if constant:
            p.passes._combining = Launcher(_kernel_with_a_rate, {"LR": lr}, kernels.BLOCK, kernels.OPTIONS, bool)
        p.combine(1, lr=lr)
        p.pack()
    return stub.kernels - before


@triton.jit
def _kernel_with_a_rate(x_ptr, g_ptr, s_ptrs, r_ptrs, copy_ptrs, low_ptrs, scalars_ptr, n, BLOCK: tl.constexpr,
                        LR: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) - LR * tl.load(g_ptr + offsets))


def test_another_learning_rate_builds_nothing(found):
    assert found["rates"] == 2


def test_control_a_rate_as_a_constant_is_found(found):
    assert found["constant rates"] >= 1 + len(set(RATES))


def stub_warm(stub, skips, follows):
    """(launches while warming, builds after it for buffers and degrees that it was told of, and for others)."""
    p = Passes(stub, rules.da_dmsgd, 8192, torch.bfloat16, guard=True)
    copies, skip = buffers(p.n, 2, torch.bfloat16), {"skip": torch.tensor(0.0)} if skips else {}
    low, launched = copies[0] if follows else None, stub.launches
    p.passes.warm(p.x, p.g, p.state, p.rows[:2], (p.rows[:2],), (0, 1, 3), copies, low, skips)
    launched, before = stub.launches - launched, stub.builds
    for lo, hi in ((0, 8192), (0, 1024), (2048, 4096), (16, 32), (32, 1072), (4096, 4112)):
        q = Passes(stub, p.rule, hi - lo, torch.bfloat16, guard=True)
        q.x, q.g, q.state = p.x[lo:hi], p.g[lo:hi], tuple(t[lo:hi] for t in p.state)
        q.rows = tuple(row[lo:hi] for row in p.rows)
        part = None if low is None else low[lo:hi]
        q.pack(low=part)
        for d in (0, 1, 3):
            q.combine(d, copies=tuple(t[lo:hi] for t in copies), low=part, **skip)
    after = stub.builds
    p.combine(2, copies=copies, low=low, **skip)
    return launched, after - before, stub.builds - after


@pytest.mark.parametrize("what", ["warm", "warm, skips", "warm, low"])
def test_after_warm_nothing_is_built(found, what):
    launched, built, other = found[what]
    assert launched == 0 and built == 0
    assert other > 0, "d = 2 was not asked for: builds are seen"


@triton.jit
def _load_with_a_default(ptr, offsets, EVICT: tl.constexpr = ""):
    return tl.load(ptr + offsets, eviction_policy=EVICT)


@triton.jit
def _kernel_with_a_default(x_ptr, g_ptr, s_ptrs, y_ptrs, low_ptrs, scalars_ptr, n, SEND: tl.constexpr,
                           HALFWAY: tl.constexpr, S: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
                           VECTOR: tl.constexpr, EVEN: tl.constexpr, GUARD: tl.constexpr,
                           TRAVELED: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptrs[0] + offsets, _load_with_a_default(x_ptr, offsets))


def stub_default(stub):
    p = Passes(stub, rules.dsgd, 4096)
    p.passes._packing.kernel = _kernel_with_a_default
    p.pack()


@pytest.mark.skipif(triton.__version__ >= "3.7", reason="this version of Triton takes text as a default")
def test_control_text_as_a_default_is_found(found):
    assert "CompilationError" in found["default"]


def test_no_kernel_has_defaults():
    """What the control above shows only under the oldest version, seen under every one."""
    import gate_controls

    functions = [f for m in (kernels, gate_controls) for f in vars(m).values() if isinstance(f, triton.JITFunction)]
    assert len(functions) >= 6
    assert not [f.__name__ for f in functions if any(p.has_default for p in f.params)]
