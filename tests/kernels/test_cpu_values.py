"""What the CPU passes compute, `TorchPasses` and `NumbaPasses`, over flat buffers.

Promises, for every rule, degree, type and size:
- against the rule's text in float64: within 16 roundings of the largest value involved (messages: and one rounding to
  their type);
- the message that `combine` recomputes is the one that `pack` wrote, bit for bit;
- `NumbaPasses` equals the text on torch tensors, one operation after the other, bit for bit; `TorchPasses` contracts
  a + s * b where the processor can and is held to the first promise only;
- with symmetric weights the workers' mean does not drift, though messages are bfloat16;
- copies of the new x hold what `copy_` would write, and a skipped step writes nothing, whatever is in the gradient.
"""

import gc

import pytest
import torch
from cpu_problem import (
    AWC,
    TYPES,
    B,
    D,
    F,
    H,
    both,
    check_against_float64,
    hand_on,
    needs_numba,
    problem,
    quotient,
    run,
    same,
    text,
)
from everyday import everyday

from fused_dlam import rules
from fused_dlam.kernels import torch_passes
from fused_dlam.kernels.numba_passes import NumbaPasses
from fused_dlam.kernels.torch_passes import BLOCK, TorchPasses
from fused_dlam.rules.averaging import mix, mix_ahead
from fused_dlam.rules.scalars import Scalars


@pytest.fixture(autouse=True, scope="module")
def no_garbage_collection():
    """numba's compiler makes millions of objects: looking for garbage among them takes a sixth of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", [*rules.ALL.values(), AWC, mix, mix_ahead, quotient, hand_on], ids=lambda r: r.name)
def test_torch_against_float64(rule, types, monkeypatch):
    monkeypatch.setattr(torch_passes, "BLOCK", 512)
    for d in (0, 1, 2, 3, 6):
        for n in (0, 1, 3, 1000, 1024, 512 + 7):
            check_against_float64(TorchPasses, problem(rule, n, d, TYPES[types], scale=1.0 if n % 2 else -0.5))


def test_torch_with_masters_in_bfloat16():
    """A square root too, which numpy does not have in this type."""
    for rule in (rules.decentlam, rules.adamw):
        check_against_float64(TorchPasses, problem(rule, 1003, 2, (B, B, B)))


# Compiling takes 0.2 to 0.5 s each time: every rule and degree in float32, other types where they differ.
COMPILED = (rules.psgd, rules.decentlam, rules.pc_dmsgd, rules.da_dmsgd, rules.adamw, mix_ahead)


@needs_numba
@pytest.mark.parametrize("rule", everyday([*rules.ALL.values(), mix_ahead], COMPILED), ids=lambda r: r.name)
def test_compiled_in_float32(rule):
    for d in (0, 1, 2, 3, 6):
        for n in (0, 1, 3, 1000, *([BLOCK + 7] if d == 3 else [])):
            p = problem(rule, n, d, scale=1.0 if n % 2 else -0.5)
            check_against_float64(NumbaPasses, p)
            own, x, state = text(p, F)
            assert same(run(NumbaPasses, p), (torch.stack(own), x, state)), f"d = {d}, n = {n}"


@needs_numba
@pytest.mark.parametrize("types", [t for t in TYPES if t != "fff"])
@pytest.mark.parametrize("rule", everyday([rules.pc_dmsgd, rules.da_dmsgd], [rules.da_dmsgd]), ids=lambda r: r.name)
def test_compiled_in_other_types(rule, types):
    for n in (1, 3, 1000, BLOCK + 7):  # the last one: non-temporal stores
        p = problem(rule, n, 2, TYPES[types])
        check_against_float64(NumbaPasses, p)
        own, x, state = text(p, p.x.dtype)
        assert same(run(NumbaPasses, p), (torch.stack(own).to(TYPES[types][2]), x, state)), f"n = {n}"


@both
def test_blocks_of_the_real_size(backend):
    check_against_float64(backend, problem(rules.decentlam, 2 * BLOCK + 7, 1))


@needs_numba
@pytest.mark.parametrize("rule", [AWC, quotient, hand_on], ids=lambda r: r.name)
def test_a_rule_of_ones_own_is_compiled(rule):
    for n in (1, 1003):
        check_against_float64(NumbaPasses, problem(rule, n, 2))


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
