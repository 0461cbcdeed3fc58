"""Parameters of 16 bits that somebody wrote: `low`, by the CPU passes `TorchPasses` and `NumbaPasses`.

Promises, for every rule and both types of 16 bits:
- a low that is x rounded to nearest even changes no bit of any result;
- elsewhere pack and combine compute, bit for bit, what they would if x were low; pack writes neither;
- what is compared are values: both NaN are equal, and so are 0 and -0;
- low may be a copy of combine at the same time, and then holds the new x rounded;
- a skipped step changes nothing.
"""

import pytest
import torch
from cpu_problem import AWC, TYPES, B, F, H, both, problem
from everyday import everyday
from guard_problem import but, check_low, same, step

from fused_dlam import rules
from fused_dlam.kernels.torch_passes import BLOCK, TorchPasses
from fused_dlam.rules.averaging import mix_ahead


@pytest.mark.parametrize("dtype", [B, H])
@pytest.mark.parametrize("rule", [*rules.ALL.values(), AWC, mix_ahead], ids=lambda rule: rule.name)
def test_every_rule_by_torch(rule, dtype):
    for d in (0, 1, 3):
        for n in (1003, 0, 1):
            check_low(TorchPasses, problem(rule, n, d), dtype)


COMPILED = [rules.psgd, rules.decentlam, rules.da_dmsgd, rules.adamw, AWC]


@both
@pytest.mark.parametrize("dtype", [B, H])
@pytest.mark.parametrize("rule", everyday(COMPILED, [rules.da_dmsgd, AWC]), ids=lambda r: r.name)
def test_compiled_and_other_types(backend, rule, dtype):
    check_low(backend, problem(rule, 1003, 0, TYPES["fbb"]), dtype)
    check_low(backend, problem(rule, 1003, 2, TYPES["fbb"]), dtype)


@both
def test_long_buffers(backend):
    """Blocks that nobody wrote among those that somebody did, and the stores that pass the cache by."""
    p = problem(rules.pc_dmsgd, 2 * BLOCK + 7, 1)
    low = p.x.to(B)
    low[BLOCK + 1] = low[-1] = 7.0
    meant = p.x.clone()
    meant[BLOCK + 1] = meant[-1] = 7.0
    same(step(backend, p, low=low, copies=(low,)), want := step(backend, but(p, x=meant)))
    assert torch.equal(low, want[1].to(B))


@both
@pytest.mark.parametrize("dtype", [B, H])
def test_every_value_that_can_be_written(backend, dtype):
    """All patterns, over any x, and over an x that rounds to just this value or the next."""
    low = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    random = torch.Generator().manual_seed(0)
    bits = low.float().view(torch.int32)
    unit = 2**16 if dtype == B else 2**13
    near = bits + torch.randint(-unit, unit + 1, bits.shape, generator=random).to(torch.int32)
    ties = bits + unit // 2
    for x in (torch.randn(2**16, generator=random), near.view(F), ties.view(F), low.float()):
        p = but(problem(AWC, 2**16, 0), x=x, g=torch.zeros(2**16))
        meant = torch.where(low == x.to(dtype), x, low.float())
        same(step(backend, p, low=low), step(backend, but(p, x=meant)))
        sent = step(backend, p, low=low)[0][0]
        same((sent,), (meant,))


@both
def test_a_guard_beside_it(backend):
    """Infinity written into a parameter is this worker's own: the others' messages leave it, and the rest is finite."""
    p = problem(rules.dsgd, 1003, 1)
    p.g[::5] = torch.nan
    low = p.x.to(B)
    low[::3] = torch.inf
    messages, x = step(backend, p, guard=True, low=low)
    assert torch.equal(~messages[0].isfinite(), low.isinf()) and torch.equal(~x.isfinite(), low.isinf())


@both
def test_a_skipped_step_changes_nothing(backend):
    p = problem(rules.pc_dmsgd, 1003, 1)
    low = torch.zeros(1003, dtype=B)
    p.scalars = p.scalars._replace(skip=1.0)
    _, x, *state = step(backend, p, low=low, copies=(low,))
    assert torch.equal(x, p.x) and all(map(torch.equal, state, p.state)) and not low.any()


@both
def test_a_low_of_another_length_is_refused(backend):
    p = problem(rules.dsgd, 100, 1)
    with pytest.raises(ValueError, match="one length"):
        step(backend, p, low=torch.zeros(99, dtype=B))
