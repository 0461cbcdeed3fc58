"""On what the results of the CPU passes do not depend, and which buffers they take.

Promises: the number of threads, how buffers are cut, and who else is computing do not show in a result; what numba
cannot compile runs as torch operations; buffers that do not fit are refused.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from cpu_problem import TYPES, B, F, H, both, needs_numba, problem, run, same

from fused_dlam import rules
from fused_dlam.kernels import numba_passes
from fused_dlam.kernels.numba_passes import NumbaPasses
from fused_dlam.kernels.torch_passes import BLOCK, TorchPasses


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@both
@pytest.mark.parametrize("types", ["fff", "fbb"])
def test_threads_do_not_show(backend, types, threads, monkeypatch):
    monkeypatch.setattr(numba_passes, "GRAIN", 1 << 16)
    p = problem(rules.pc_dmsgd, 3 * BLOCK + 7, 2, TYPES[types])
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(backend, p))
    assert same(results[0], results[1]) and same(results[0], results[2])


@both
def test_cuts_do_not_show(backend):
    """Rows at any address, alone or stacked: the non-temporal stores of `pack` need aligned ones."""
    n = 2**17
    whole = problem(rules.da_dmsgd, n + 64, 1)
    expected = run(backend, whole)
    for lo in (0, 1, 16, 37):
        cut = slice(lo, lo + n)
        p = SimpleNamespace(**vars(whole))
        p.x, p.g, p.state = whole.x[cut], whole.g[cut], tuple(t[cut] for t in whole.state)
        p.messages, p.received = whole.messages[:, cut], whole.received[:, :, cut]
        passes = backend(p.rule)
        passes.set(p.scalars)
        for rows in (
            [torch.empty(n + 64)[cut] for _ in range(2)],
            [torch.empty(n + 64)[cut], torch.empty(n + 3)[3:]],
            torch.empty(2, n + lo)[:, lo:],
        ):
            passes.pack(p.x, p.g, p.state, rows)
            for k in range(2):
                assert torch.equal(rows[k], expected[0][k][cut])
        x, state = p.x.clone(), tuple(t.clone() for t in p.state)
        passes.combine(x, p.g, state, tuple(tuple(r) for r in p.received))
        assert torch.equal(x, expected[1][cut]) and torch.equal(state[0], expected[2][0][cut])


@both
def test_passes_at_once(backend, threads, monkeypatch):
    """As the hooks of several backward passes call them."""
    threads(2)
    monkeypatch.setattr(numba_passes, "GRAIN", 1 << 16)
    problems = [problem(rules.pc_dmsgd, 2**17 + k, 1, seed=k) for k in range(8)]
    expected = [run(backend, p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(map(same, pool.map(lambda p: run(backend, p), problems), expected))


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_threads_after_a_fork(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(numba_passes, "GRAIN", 1 << 16)
    p = problem(rules.decentlam, 2**17, 1)
    expected = run(NumbaPasses, p)[1].numpy().tobytes()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # the parent's threads would be waited for without end
        passes = NumbaPasses(p.rule)
        passes.set(p.scalars)
        passes.combine(p.x, p.g, p.state, p.received)
        os._exit(0 if p.x.numpy().tobytes() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_numba
def test_what_cannot_be_compiled_runs_as_blocked():
    strided = problem(rules.decentlam, 1003, 1)
    strided.g = torch.randn(2006)[::2]
    half = problem(rules.decentlam, 1003, 1, (B, B, B))
    for p in (strided, half, problem(rules.decentlam, 1003, 1, (F, F, H))):
        assert same(run(NumbaPasses, p), run(TorchPasses, p))


@both
def test_wrong_buffers_are_refused(backend):
    p = problem(rules.da_dmsgd, 100, 2)
    passes = backend(p.rule)
    passes.set(p.scalars)
    with pytest.raises(ValueError, match=r"\(1, 4\) buffers of state and rows of messages here, not \(1, 2\)"):
        passes.combine(p.x, p.g, p.state, p.received[:1])
    with pytest.raises(ValueError, match=r"not \(0, 2\)"):
        passes.pack(p.x, p.g, (), p.messages)
    with pytest.raises(ValueError, match="one length"):
        passes.pack(p.x, p.g[1:], p.state, p.messages)
