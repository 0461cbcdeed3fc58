"""The Triton kernels on the CPU: under TRITON_INTERPRET=1, and therefore in a process of their own.

Promises, for every rule under both schedules, all types, d = 0 to 6, lengths that fill their blocks and lengths that
do not:

- `pack` is within 2 float32 roundings of float64, 6 where it divides; with bfloat16 messages within one bfloat16 step
  (the interpreter truncates where a GPU rounds to nearest);
- `combine` is within 6 float32 roundings of float64 whatever the messages' type, where float64 takes for the own
  message what `pack` wrote: had `combine` recomputed another, it would be off by a bfloat16 step, 100 times
  as much and more;
- nothing outside the buffers is written, and a stacked receive buffer, rows anywhere in memory and slices of buffers
  give the same bits;
- copies of the new x hold what `copy_` would write (bfloat16 ones what `pack` would), and change nothing else;
- a step whose `skip` is not 0 writes nothing, whatever is in the gradient, and the flag is not read by the host.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_problem import GUARD, IDS, INTERPRETED, RULES, TYPES, WEIGHTS, Problem, interpreted

from fused_dlam import rules
from fused_dlam.kernels.gate.floor import pack_floor
from fused_dlam.rules.rule import send_parameter
from fused_dlam.rules.scalars import Scalars

ROUNDING = 2.0**-24  # of float32, relative


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_of_its_own():
    """All that is marked `interpreted`, here and in the files beside this one."""
    pytest.importorskip("triton")
    others = "test_mean.py", "test_triton_guard.py", "test_triton_compression.py"
    files = [Path(__file__).with_name(name) for name in (Path(__file__).name, *others)]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" in result.stdout


FULL = [(m, g, d) for m in TYPES for g in TYPES for d in (0, 1, 2, 3, 6)]
SIZES = lambda value: str(value) if isinstance(value, int) else ""  # noqa: E731
SAME = [(m, m, d) for m in TYPES for d in (0, 1, 2, 3, 6)]


@interpreted
@pytest.mark.parametrize("n, cases", [(4096, FULL), (4109, SAME), (3, SAME[::3]), (1, SAME[1::3])], ids=SIZES)
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_every_rule_against_float64(rule, n, cases):
    roundings = 2 + 4 * pack_floor(rule, "fp32", "fp32").divisions
    for message, gradient, d in cases:
        if rule.traveled and gradient != torch.float32:
            continue  # rounds x to it, which the interpreter does towards zero; test_gate.py reads the machine code
        p = Problem(rule, n, d, message, gradient, seed=d)
        passes = p.passes()
        own = p.pack(passes)
        sent, new, size = p.exact(own)
        for got, want in zip(own, sent, strict=True):
            # A step of bfloat16 is 2^-7 of the power of two below a number, so at most 2^-7 of the number.
            step = want.abs() * 2**-7 if message == torch.bfloat16 else 0.0
            assert ((got.double() - want).abs() <= step + roundings * ROUNDING * size).all(), (message, gradient, d)
        for got, want in zip(p.combine(passes), new, strict=True):
            assert (got.double() - want).abs().max() <= 6 * ROUNDING * size, (message, gradient, d)


@interpreted
@pytest.mark.parametrize("message", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_hearing_my_own_message_pulls_nothing(rule, message):
    """q is what was sent, bit for bit: neighbors that send the same make the same step as no neighbors."""
    p = Problem(rule, 1033, 3, message)
    passes = p.passes()
    alike = p.combine(passes, p.pack(passes).expand(3, -1, -1))
    passes.set(p.scalars._replace(weights=()))
    alone = p.combine(passes)
    assert all(map(torch.equal, alike, alone))


@interpreted
@pytest.mark.parametrize("rule", [rules.pc_dmsgd, rules.da_dmsgd], ids=lambda rule: rule.name)
def test_rows_anywhere_and_slices_give_the_same_bits(rule):
    p = Problem(rule, 2048, 3, torch.bfloat16)
    passes = p.passes()
    stacked = p.combine(passes)
    apart = tuple(tuple(row.clone() for row in r) for r in p.received)
    assert all(map(torch.equal, p.combine(passes, apart), stacked))
    assert all(map(torch.equal, p.combine(passes, tuple(p.received)), stacked))
    # More rows than weights: the first ones count.
    assert all(map(torch.equal, p.combine(passes, torch.cat((p.received, p.received))), stacked))

    messages = p.pack(passes)
    x, state, sliced = p.x.clone(), tuple(t.clone() for t in p.state), torch.zeros_like(messages)
    for span in (slice(0, 4), slice(4, 1500), slice(1500, 1504), slice(1504, 2048)):
        parts = x[span], p.g[span], tuple(t[span] for t in state)
        passes.pack(*parts, sliced[:, span])
        passes.combine(*parts, p.received[:, :, span])
    assert torch.equal(sliced, messages)
    assert all(map(torch.equal, (x, *state), stacked))


@interpreted
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_copies_are_written_in_the_same_pass(rule):
    for n, d in ((1033, 2), (2048, 0), (1, 1)):
        p = Problem(rule, n, d, torch.bfloat16)
        passes = p.passes()
        whole = [torch.full((n + 8,), GUARD, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16)]
        copies = [t[:n] for t in whole]
        x, *state = p.combine(passes, copies=copies)
        assert all(map(torch.equal, (x, *state), p.combine(passes)))
        assert torch.equal(copies[0], x.half()) and torch.equal(copies[1], x)
        assert torch.equal(copies[2].float(), (x.view(torch.int32) & -(2**16)).view(torch.float32))
        assert all((t[n:] == GUARD).all() for t in whole)
        if rule.send is send_parameter:  # the next message
            packed = torch.zeros(1, n, dtype=torch.bfloat16)
            passes.pack(x, p.g, state, packed)
            assert torch.equal(copies[2], packed[0])


@interpreted
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_skipped_step_changes_nothing(rule):
    """Neither x, nor the state, nor copies, though the gradient overflowed."""
    p = Problem(rule, 1033, 1)
    passes = p.passes()
    plain = p.combine(passes)
    finite, nothing = p.g, [p.x, *p.state]
    overflow = p.g.clone()
    overflow[::3], overflow[1::3] = torch.nan, torch.inf
    for flag in (1.0, torch.tensor(1.0), torch.tensor(True), torch.tensor(torch.nan, dtype=torch.float64)):
        passes.set(p.scalars._replace(skip=flag))
        p.g = overflow
        copy = torch.full((p.n,), GUARD)
        assert all(map(torch.equal, p.combine(passes, copies=(copy,)), nothing)), flag
        assert (copy == GUARD).all()
    for flag in (torch.tensor(0.0), 0.0, False):
        passes.set(p.scalars._replace(skip=flag))
        p.g = finite
        assert all(map(torch.equal, p.combine(passes), plain)), flag


@interpreted
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_scalars_that_are_tensors_are_not_read_by_the_host(rule, monkeypatch):
    """The kernels' values bit-equal to those of numbers, step after step, and not one read: all stays on the device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fused_dlam.kernels.triton_passes import TritonPasses
    from fused_dlam.rules import scalars

    class HostReads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(scalars, "on_host", lambda value: False)
    numbers, tensors = TritonPasses(rule, "cpu"), TritonPasses(rule, "cpu")
    memories = {}, {}
    for lr, scale in ((0.1, 1.0), (0.1, 0.5), (0.0, 0.5), (0.025, 1.0)):
        numbers.set(Scalars(rule.scalars(lr, 0.9, 0.01, 0.5, {}, memories[0]), WEIGHTS[:2], scale))
        lr, scale = torch.tensor(lr, dtype=torch.float64), torch.tensor(scale)
        with HostReads():
            h = rule.scalars(scalars.scalar(lr), 0.9, 0.01, 0.5, {}, memories[1])
            tensors.set(Scalars(h, WEIGHTS[:2], scalars.scalar(scale), torch.tensor(0.0)))
        assert torch.equal(numbers._values, tensors._values)


@interpreted
def test_new_scalars_stay_at_one_address():
    p = Problem(rules.pc_dmsgd, 64, 2)
    passes = p.passes()
    address = passes._values.data_ptr()
    for lr, weights in ((0.0, (0.5, 0.25)), (1e-3, (0.25, 0.5)), (0.5, ())):
        p.scalars = Scalars(p.rule.scalars(lr, 0.9, 0.0, rho=0.5), weights)
        passes.set(p.scalars)
        fresh = p.passes()
        assert all(map(torch.equal, p.combine(passes), p.combine(fresh)))
    assert passes._values.data_ptr() == address


@interpreted
def test_what_the_kernels_do_not_take_is_refused():
    p = Problem(rules.dmsgd, 64, 2)
    passes = p.passes()
    with pytest.raises(TypeError, match=r"float64.*fused=False"):
        passes.combine(p.x.double(), p.g, p.state, p.received)
    with pytest.raises(TypeError, match=r"float64.*fused=False"):
        passes.combine(p.x, p.g.double(), p.state, p.received)
    with pytest.raises(ValueError, match="3 state buffers|1 state buffers"):
        passes.combine(p.x, p.g, (), p.received)
    with pytest.raises(ValueError, match="here 2 messages, got 1 and 1"):
        passes.combine(p.x, p.g, p.state, p.received[:1])
    with pytest.raises(ValueError, match="flat, contiguous"):
        passes.combine(p.x[::2], p.g[::2], tuple(t[::2] for t in p.state), p.received[:, :, ::2])
    with pytest.raises(ValueError, match="flat, contiguous"):
        passes.pack(p.x, p.g[:32], p.state, p.received[0])
    with pytest.raises(ValueError, match="flat, contiguous"):
        passes.combine(p.x, p.g, p.state, p.received, copies=(p.x[:32].clone(),))
    with pytest.raises(TypeError, match=r"float64.*fused=False"):
        passes.combine(p.x, p.g, p.state, p.received, copies=(p.x.double(),))
    with pytest.raises(ValueError, match="on meta"):
        passes.combine(p.x, p.g.to("meta"), p.state, p.received)
    fits = 255 - 1 - len(p.scalars.h)  # one place is the flag's, one the gradient's scale
    passes.set(p.scalars._replace(weights=(0.001,) * fits))
    with pytest.raises(ValueError, match="too many"):
        passes.set(p.scalars._replace(weights=(0.001,) * (fits + 1)))
    with pytest.raises(RuntimeError, match="call set"):
        type(passes)(p.rule, "cpu").pack(p.x, p.g, p.state, p.received[0])
