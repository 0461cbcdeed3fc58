"""What the CPU passes cost.

Promises: no pass allocates anything of the size of a buffer; on other devices than CPUs a pass is a few operations,
however long the buffers, and streams share no scratch memory; numba's loops are vectorized and have no FMA.
"""

import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from cpu_problem import B, F, H, both, needs_numba, problem, quotient, run
from guard_problem import step
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dlam import rules
from fused_dlam.kernels import numba_passes, torch_passes
from fused_dlam.kernels.numba_passes import NumbaPasses
from fused_dlam.kernels.numba_source import Types
from fused_dlam.kernels.torch_passes import TorchPasses
from fused_dlam.kernels.trace import Equations

MEMORY = """
import resource, sys
import torch
from fused_dlam import rules
from fused_dlam.kernels.numba_passes import NumbaPasses, available
from fused_dlam.kernels.torch_passes import TorchPasses
from fused_dlam.rules.scalars import Scalars

n, hold = 1 << 24, []
torch.set_num_threads(2)

def step(passes, n):
    hold.extend(torch.ones(n) for _ in range(6))
    x, g, m, p, y, r = hold[-6:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passes.pack(x, g, (m, p), y[None])
    passes.combine(x, g, (m, p), r[None, None])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

for kind in (TorchPasses, NumbaPasses)[: 1 + available()]:
    passes = kind(rules.pc_dmsgd)
    passes.set(Scalars(rules.pc_dmsgd.scalars(0.1, 0.9, 0.01, rho=0.5), (0.5,)))
    step(passes, 1 << 18)  # compiles
    print(kind.__name__, step(passes, n) * 1024 / (4 * n))
"""


@pytest.fixture(scope="module")
def allocated():
    """Passes -> the growth of a process's peak memory, which sees every allocator: torch's, numba's and malloc."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@both
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB")
def test_nothing_of_the_size_of_a_buffer_is_allocated(backend, allocated):
    assert float(allocated[backend.__name__]) < 0.125, "share of one buffer of 64 MiB"


class Operations(TorchDispatchMode):
    """Counts torch's operations: on a GPU, each that is no view is a kernel."""

    def __init__(self):
        super().__init__()
        self.views, self.others = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = func.is_view or "split" in str(func) or "unbind" in str(func)
        self.views, self.others = self.views + view, self.others + (not view)
        return func(*args, **(kwargs or {}))


def test_few_kernels_on_other_devices():
    """At 25.5M parameters; with blocks for a CPU's cache they are 1070 and more."""
    p = problem(rules.decentlam, 1, 1)
    passes = TorchPasses(p.rule)
    passes.set(p.scalars)
    x, g, m, y, r = torch.empty(5, 25_500_000, device="meta")
    with Operations() as count:
        passes.pack(x, g, (m,), y[None])
        passes.combine(x, g, (m,), r[None, None])
    assert 0 < count.others <= 24  # two blocks of 7 + 3 operations, and scratch memory


def test_streams_share_no_scratch_memory(monkeypatch):
    """A row given back when it grows goes to the stream it was made on, while another may still compute in it."""
    made = []
    monkeypatch.setattr(torch_passes, "_scratch", threading.local())
    for stream in (1, 2, 1, 2):
        monkeypatch.setattr(torch_passes, "_stream", lambda device, stream=stream: stream)
        run(TorchPasses, problem(quotient, 1000, 1))
        made.append({key: t.data_ptr() for key, t in vars(torch_passes._scratch).items()})
    assert len(made[0]) == 1 and len(made[1]) == 2 and made[1] == made[2] == made[3]
    assert len(set(made[3].values())) == 2


FMA = re.compile(r"\bv?fn?m(add|sub)|\bfml[as]\b")


@needs_numba
def test_compiled_loops_are_vectorized_and_not_contracted():
    import numba

    for wire, guard, low in ((F, False, None), (B, False, None), (F, True, None), (B, True, B), (B, True, H)):
        for d in (None, 3):
            function = numba_passes._compile(Equations.of(rules.pc_dmsgd), d, Types(F, F, wire, low), guard)
            p = problem(rules.pc_dmsgd, 10, d or 3, (F, F, wire))
            step(NumbaPasses, p, guard, None if low is None else p.x.to(low))
            (assembly,) = function.inspect_asm().values()
            assert not FMA.search(assembly)
            if re.search(r"\bv?mulss\b", assembly):  # x86: beside the scalar loop for the rest there is a packed one
                assert re.search(r"\bv?mulps\b", assembly)
    # The search finds what it is for: the same loop with leave to contract.
    loose = numba.njit(function.py_func, fastmath={"contract"})
    buffers = [np.ones(100, np.float32) for _ in range(7)]
    rounded = [b.astype(np.uint16) if k > 3 else b for k, b in enumerate(buffers)]
    loose(np.ones(12, np.float32), *rounded, rounded[-1])
    if any(line.startswith("flags") and " fma " in line for line in open("/proc/cpuinfo")):
        assert FMA.search(next(iter(loose.inspect_asm().values())))
