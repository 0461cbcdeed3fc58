"""The CPU passes, `Blocked` (torch) and `Compiled` (numba), over flat buffers.

Promises, for every rule, degree, type and size:
- against the rule's text in float64: within 16 roundings of the largest value involved (messages: and one rounding to
  their type);
- the message that `combine` recomputes is the one that `pack` wrote, bit for bit;
- `Compiled` equals the text on torch tensors, one operation after the other, bit for bit; `Blocked` contracts
  a + s * b where the processor can and is held to the first promise only;
- with symmetric weights the workers' mean does not drift, though messages are bfloat16;
- the results do not depend on the number of threads, on how buffers are cut, or on who else is computing;
- copies of the new x hold what `copy_` would write, and a skipped step writes nothing, whatever is in the gradient;
- no pass allocates anything of the size of a buffer; on other devices than CPUs a pass is a few operations, however
  long the buffers, and streams share no scratch memory.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dlam import Rule, jit, rules
from fused_dlam.kernels import numba_passes as compiled
from fused_dlam.kernels import torch_passes as blocked
from fused_dlam.kernels.numba_passes import Compiled
from fused_dlam.kernels.torch_passes import BLOCK, Blocked
from fused_dlam.rules.averaging import mix, mix_ahead
from fused_dlam.rules.scalars import Scalars

needs_numba = pytest.mark.skipif(not compiled.available(), reason="needs numba")
both = pytest.mark.parametrize("backend", [Blocked, pytest.param(Compiled, marks=needs_numba)])
F, D, B, H = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (parameters and state, gradient, messages)
TYPES = {"fff": (F, F, F), "fbb": (F, B, B), "ffb": (F, F, B), "fhf": (F, H, F), "ddd": (D, D, D), "dfb": (D, F, B)}
AWC = rules.decentlam.adapt_while_communicating()


# -- Rules of a user's own: the forms that the built-in ones do not have ---------------------------------------------


@jit
def send_quotient(x, g, s, h):
    return x - h.lr / (h.momentum + h.lr) * g / h.scale, -g / h.lr + s.a


@jit
def update_quotient(x, g, s, pull, h):
    a = h.lr * h.momentum * s.a - g * pull[1] / (h.scale + s.b * s.b)
    return h.momentum - a + pull[0], (a, h.lr / (h.scale + a * a))


@jit
def send_state(x, g, s, h):
    return s.a, s.a


@jit
def update_hand_on(x, g, s, pull, h):
    return s.b, (s.b, s.a + pull[0], s.c, x)


quotient = Rule("quotient", send_quotient, update_quotient, ("a", "b"), hyper={"scale": 2.0})
hand_on = Rule("hand-on", send_state, update_hand_on, ("a", "b", "c", "e"))


@pytest.fixture(autouse=True)
def sqrt_rounded_once(monkeypatch):
    """torch's own is MKL's on CPUs, off by a rounding for every fifth value of float32."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda v: torch.from_numpy(np.sqrt(v.numpy())))


# -- The oracle ------------------------------------------------------------------------------------------------------


def problem(rule, n, d, types=TYPES["fff"], scale=1.0, seed=0):
    """Random buffers of a worker with d neighbors. The weights do not sum to one: nothing may rely on it."""
    master, gradient, wire = types
    random = torch.Generator().manual_seed(seed)

    def values(*shape, dtype=master):
        return torch.randn(*shape, generator=random, dtype=D).to(dtype)

    return SimpleNamespace(
        rule=rule,
        x=values(n),
        g=values(n, dtype=gradient),
        state=tuple(values(n).square() if name.endswith("sq") else values(n) for name in rule.state),
        messages=torch.full((rule.messages, n), torch.nan, dtype=wire),
        received=values(d, rule.messages, n, dtype=wire),
        scalars=Scalars(
            rule.scalars(lr=0.1, momentum=0.9, weight_decay=0.01, rho=0.5),
            tuple(0.3 / (k + 1) for k in range(d)),
            scale,
        ),
    )


def run(backend, p):
    """(messages, x', state'): what the passes make of copies of the buffers of p."""
    passes = backend(p.rule)
    passes.set(p.scalars)
    x, state, messages = p.x.clone(), tuple(t.clone() for t in p.state), p.messages.clone()
    passes.pack(x, p.g, state, messages)
    assert torch.equal(x, p.x), "pack must not touch the parameters"
    passes.combine(x, p.g, state, p.received)
    return messages, x, state


def text(p, dtype, messages=None):
    """The same by the rule's text, operation by operation, in the given type; `messages`: take these as sent."""
    h, weights, scale, _ = p.scalars
    x, state = p.x.to(dtype), p.rule.State(*(t.to(dtype) for t in p.state))
    g = p.g.to(dtype) if scale == 1.0 else p.g.to(dtype) * scale
    own = p.rule.send.fn(x, g, state, h)
    sent = torch.stack(own).to(p.messages.dtype) if messages is None else messages
    pull = [0.0] * p.rule.messages
    for k in range(p.rule.messages if weights else 0):
        parts = [(r[k].to(dtype) - sent[k].to(dtype)) * w for r, w in zip(p.received, weights, strict=True)]
        pull[k] = sum(parts[1:], parts[0])
    new_x, new_state = p.rule.update.fn(x, g, state, tuple(pull), h)
    return own, new_x, new_state


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip((a[0], a[1], *a[2]), (b[0], b[1], *b[2]), strict=True))


def check_against_float64(backend, p):
    messages, x, state = run(backend, p)
    own, exact_x, exact_state = text(p, D, messages)
    values = torch.cat([t.flatten().to(D) for t in (p.x, *own, exact_x, *exact_state, p.received, torch.ones(1))])
    roundings = 16 * torch.finfo(p.x.dtype).eps * float(values.abs().max())
    for got, exact in zip((x, *state), (exact_x, *exact_state), strict=True):
        torch.testing.assert_close(got.to(D), exact, rtol=0, atol=roundings)
    for got, exact in zip(messages, own, strict=True):
        torch.testing.assert_close(got.to(D), exact, rtol=torch.finfo(got.dtype).eps, atol=roundings)


# -- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", [*rules.ALL.values(), AWC, mix, mix_ahead, quotient, hand_on], ids=lambda r: r.name)
def test_blocked_against_float64(rule, types, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 512)
    for d in (0, 1, 2, 3, 6):
        for n in (0, 1, 3, 1000, 1024, 512 + 7):
            check_against_float64(Blocked, problem(rule, n, d, TYPES[types], scale=1.0 if n % 2 else -0.5))


# Compiling takes 0.2 to 0.5 s each time: every rule and degree in float32, other types where they differ.
@needs_numba
@pytest.mark.parametrize("rule", [*rules.ALL.values(), mix_ahead], ids=lambda r: r.name)
def test_compiled_in_float32(rule):
    for d in (0, 1, 2, 3, 6):
        for n in (0, 1, 3, 1000, *([BLOCK + 7] if d == 3 else [])):
            p = problem(rule, n, d, scale=1.0 if n % 2 else -0.5)
            check_against_float64(Compiled, p)
            own, x, state = text(p, F)
            assert same(run(Compiled, p), (torch.stack(own), x, state)), f"d = {d}, n = {n}"


@needs_numba
@pytest.mark.parametrize("types", [t for t in TYPES if t != "fff"])
@pytest.mark.parametrize("rule", [rules.pc_dmsgd, rules.da_dmsgd], ids=lambda r: r.name)
def test_compiled_in_other_types(rule, types):
    for n in (1, 3, 1000, BLOCK + 7):  # the last one: non-temporal stores
        p = problem(rule, n, 2, TYPES[types])
        check_against_float64(Compiled, p)
        own, x, state = text(p, p.x.dtype)
        assert same(run(Compiled, p), (torch.stack(own).to(TYPES[types][2]), x, state)), f"n = {n}"


@both
def test_blocks_of_the_real_size(backend):
    check_against_float64(backend, problem(rules.decentlam, 2 * BLOCK + 7, 1))


@needs_numba
@pytest.mark.parametrize("rule", [AWC, quotient, hand_on], ids=lambda r: r.name)
def test_a_rule_of_ones_own_is_compiled(rule):
    for n in (1, 1003):
        check_against_float64(Compiled, problem(rule, n, 2))


@both
@pytest.mark.parametrize("types", ["fff", "fbb"])
@pytest.mark.parametrize("rule", [rules.decentlam, rules.pc_dmsgd, rules.da_dmsgd, AWC], ids=lambda r: r.name)
def test_recomputed_message_is_the_sent_one(backend, rule, types):
    """Hearing my own message, I feel no pull: not a bit of it, or the weight of 1e30 would show it."""
    p = problem(rule, 100_003, 1, TYPES[types])
    passes = backend(rule)
    results = []
    for weight in (1e30, 0.0):
        passes.set(p.scalars._replace(weights=(weight,)))
        x, state = p.x.clone(), tuple(t.clone() for t in p.state)
        passes.pack(x, p.g, state, p.messages)
        passes.combine(x, p.g, state, p.messages[None])
        results.append((p.messages.clone(), x, state))
    assert same(*results)


@both
def test_the_mean_does_not_drift(backend):
    """DecentLaM on a ring of 4, weights 1/3, bfloat16 messages, gradients x - b: the workers' mean is momentum SGD."""
    n, size, lr, momentum, rule = 4, 100, 0.05, 0.9, rules.decentlam
    random = torch.Generator().manual_seed(0)
    b, x = torch.randn(n, size, generator=random), torch.randn(1, size, generator=random).repeat(n, 1)
    m, messages, memory = torch.zeros(n, size), torch.empty(n, 1, size, dtype=B), {}
    mean, velocity, worst = x[0].to(D), torch.zeros(size, dtype=D), 0.0
    passes = backend(rule)
    for _ in range(2000):
        passes.set(Scalars(rule.scalars(lr, momentum, 0.0, memory=memory), (1 / 3, 1 / 3)))
        g = x - b
        for i in range(n):
            passes.pack(x[i], g[i], (m[i],), messages[i])
        for i in range(n):
            passes.combine(x[i], g[i], (m[i],), (messages[i - 1], messages[(i + 1) % n]))
        velocity = momentum * velocity + mean - b.to(D).mean(0)
        mean = mean - lr * velocity
        worst = max(worst, float((x.to(D).mean(0) - mean).abs().max()))
    assert worst < 2e-6, "a bfloat16 message is rounded by up to 4e-3"
    assert float((x - x.mean(0)).abs().max()) > 0.05, "the workers must differ, or nothing is rounded away"


@both
def test_grad_scale(backend):
    p = problem(rules.pc_dmsgd, 1003, 1, scale=-1.0)
    flipped = problem(rules.pc_dmsgd, 1003, 1)
    flipped.g.neg_()
    assert same(run(backend, p), run(backend, flipped))


@both
def test_conversions_of_every_16_bit_pattern(backend):
    """float16 and bfloat16 gradients arrive exactly, infinities, NaN and subnormal numbers included."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (B, H):
        g, messages = patterns.view(dtype), torch.empty(1, 2**16)
        passes = backend(rules.psgd)
        passes.set(Scalars(rules.psgd.scalars(0.1, 0.0, 0.0), ()))
        passes.pack(torch.zeros(2**16), g, (), messages)
        torch.testing.assert_close(messages[0], g.float(), rtol=0, atol=0, equal_nan=True)


@both
def test_messages_round_to_nearest_even(backend):
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[: 2**16] = bits[: 2**16] & -(2**16) | 2**15  # ties
    x, messages = bits.view(F), torch.empty(1, len(bits), dtype=B)
    passes = backend(AWC)
    passes.set(Scalars(AWC.scalars(0.1, 0.0, 0.0), ()))
    passes.pack(x, torch.zeros_like(x), (torch.zeros_like(x),), messages)
    torch.testing.assert_close(messages[0], x.to(B), rtol=0, atol=0, equal_nan=True)


@both
@pytest.mark.parametrize("types", ["fff", "fbb", "ddd"])
@pytest.mark.parametrize("rule", [rules.psgd, rules.pc_dmsgd, rules.da_dmsgd, AWC], ids=lambda r: r.name)
def test_copies_are_written_in_the_same_pass(backend, rule, types):
    for n, d in ((1003, 2), (1003, 0), (1, 1), (0, 1)):
        p = problem(rule, n, d, TYPES[types])
        expected = run(backend, p)
        passes = backend(rule)
        passes.set(p.scalars)
        x, state, copies = p.x.clone(), tuple(t.clone() for t in p.state), [torch.empty(n, dtype=t) for t in (F, B, H)]
        passes.combine(x, p.g, state, p.received, copies=copies)
        assert same((expected[0], x, state), expected)
        assert all(torch.equal(c, x.to(c.dtype)) for c in copies)
    with pytest.raises(ValueError, match="one length"):
        passes.combine(x, p.g, state, p.received, copies=(torch.empty(n + 1),))


@both
@pytest.mark.parametrize("rule", [rules.psgd, rules.pc_dmsgd, rules.da_dmsgd, AWC], ids=lambda r: r.name)
def test_a_skipped_step_changes_nothing(backend, rule):
    p = problem(rule, 1003, 1)
    expected = run(backend, p)
    p.g[::3], p.g[1::3] = torch.nan, torch.inf
    passes = backend(rule)
    for flag in (1.0, True, torch.tensor(1.0), torch.tensor(True)):
        passes.set(p.scalars._replace(skip=flag))
        x, state, copy = p.x.clone(), tuple(t.clone() for t in p.state), torch.zeros(1003)
        passes.combine(x, p.g, state, p.received, copies=(copy,))
        assert torch.equal(x, p.x) and all(map(torch.equal, state, p.state)) and not copy.any()
    p = problem(rule, 1003, 1)
    for flag in (0.0, False, torch.tensor(0.0)):
        p.scalars = p.scalars._replace(skip=flag)
        assert same(run(backend, p), expected)


# -- Independence ----------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@both
@pytest.mark.parametrize("types", ["fff", "fbb"])
def test_threads_do_not_show(backend, types, threads, monkeypatch):
    monkeypatch.setattr(compiled, "GRAIN", 1 << 16)
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
    monkeypatch.setattr(compiled, "GRAIN", 1 << 16)
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
    monkeypatch.setattr(compiled, "GRAIN", 1 << 16)
    p = problem(rules.decentlam, 2**17, 1)
    expected = run(Compiled, p)[1].numpy().tobytes()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # the parent's threads would be waited for without end
        passes = Compiled(p.rule)
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
        assert same(run(Compiled, p), run(Blocked, p))


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


# -- Cost ------------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import torch
from fused_dlam.kernels import blocked, compiled, rules

n = 1 << 24
torch.set_num_threads(2)
passes = getattr(getattr(sys.modules["fused_dlam.kernels." + sys.argv[1]], sys.argv[2]), "__call__")(rules.pc_dmsgd)
passes.set(blocked.Scalars(rules.pc_dmsgd.scalars(0.1, 0.9, 0.01), (0.5,)))

def step(n, hold=[]):
    hold += [torch.ones(n) for _ in range(6)]
    x, g, m, p, y, r = hold[-6:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    passes.pack(x, g, (m, p), y[None])
    passes.combine(x, g, (m, p), r[None, None])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

step(1 << 18)  # compiles
print(step(n) * 1024 / (4 * n))
"""


@both
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB")
def test_nothing_of_the_size_of_a_buffer_is_allocated(backend):
    """Peak memory of a process of its own, which sees every allocator: torch's, numba's and malloc."""
    command = [sys.executable, "-c", MEMORY, backend.__module__.split(".")[-1], backend.__name__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.125, "share of one buffer of 64 MiB"


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
    passes = Blocked(p.rule)
    passes.set(p.scalars)
    x, g, m, y, r = torch.empty(5, 25_500_000, device="meta")
    with Operations() as count:
        passes.pack(x, g, (m,), y[None])
        passes.combine(x, g, (m,), r[None, None])
    assert 0 < count.others <= 24  # two blocks of 7 + 3 operations, and scratch memory


def test_streams_share_no_scratch_memory(monkeypatch):
    """A row given back when it grows goes to the stream it was made on, while another may still compute in it."""
    made = []
    monkeypatch.setattr(blocked, "_scratch", threading.local())
    for stream in (1, 2, 1, 2):
        monkeypatch.setattr(blocked, "_stream", lambda device, stream=stream: stream)
        run(Blocked, problem(quotient, 1000, 1))
        made.append({key: t.data_ptr() for key, t in vars(blocked._scratch).items()})
    assert len(made[0]) == 1 and len(made[1]) == 2 and made[1] == made[2] == made[3]
    assert len(set(made[3].values())) == 2


FMA = re.compile(r"\bv?fn?m(add|sub)|\bfml[as]\b")


@needs_numba
def test_compiled_loops_are_vectorized_and_not_contracted():
    import numba

    for wire in (F, B):
        for d in (None, 3):
            key = (rules.pc_dmsgd.send.fn, rules.pc_dmsgd.update.fn, rules.pc_dmsgd.state, rules.pc_dmsgd.H._fields)
            function = compiled._compile(*key, 1, d, (F, F, wire))
            run(Compiled, problem(rules.pc_dmsgd, 10, d or 3, (F, F, wire)))
            (assembly,) = function.inspect_asm().values()
            assert not FMA.search(assembly)
            if re.search(r"\bv?mulss\b", assembly):  # x86: beside the scalar loop for the rest there is a packed one
                assert re.search(r"\bv?mulps\b", assembly)
    # The search finds what it is for: the same loop with leave to contract.
    loose = numba.njit(function.py_func, fastmath={"contract"})
    buffers = [np.ones(100, np.float32) for _ in range(7)]
    rounded = [b.astype(np.uint16) if k > 3 else b for k, b in enumerate(buffers)]
    loose(np.ones(12, np.float32), *rounded)
    if any(line.startswith("flags") and " fma " in line for line in open("/proc/cpuinfo")):
        assert FMA.search(next(iter(loose.inspect_asm().values())))
