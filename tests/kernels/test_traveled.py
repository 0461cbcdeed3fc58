"""Passes of a rule around an inner optimizer (`Rule.outer`): given parameters y, they take x - y for the gradient.

Promises, for every rule, by torch and by numba, y in the type of x or in 16 bits:
- pack and combine are, bit for bit, those of the rule itself with the gradient x - y; for 16-bit y, x rounded to their
  type less y, so that x not being a number of that type is no way that was gone;
- y may be a copy of combine at the same time, and then holds the new x rounded;
- with a guard, a y that is not finite counts as x.
"""

import pytest
import torch
from cpu_problem import TYPES, B, F, H, both, problem
from everyday import everyday
from guard_problem import but, same, step

from fused_dlam import rules
from fused_dlam.kernels.torch_passes import TorchPasses

NEIGHBORS = [rule for rule in rules.ALL.values() if rule.average == "neighbors"]
COMPILED = [rules.mi_dmsgd, rules.mi_dmsgd.under("awc"), rules.dsgd, rules.da_dmsgd, rules.ALL["gasloc"]]


def outside(make):
    """Passes of the rule around an inner optimizer."""
    return lambda rule, guard: make(rule.outer(), guard=guard)


def check(make, rule, dtype, n, d):
    p = problem(rule, n, d, TYPES["fff"])
    y = (p.x + 0.25 * p.g).to(dtype)
    inside = step(make, but(p, g=p.x.to(dtype).float() - y.float()))
    around, copy = step(outside(make), but(p, g=y)), y.clone()
    same(around, inside)
    same(step(outside(make), but(p, g=copy), copies=(copy,)), inside)
    assert torch.equal(copy, inside[1].to(dtype))
    lost = y.clone()
    lost[::3] = torch.nan
    stayed = torch.where(lost.isnan(), 0, p.x.to(dtype).float() - y.float())
    same(step(outside(make), but(p, g=lost), guard=True), step(make, but(p, g=stayed), guard=True))


@pytest.mark.parametrize("dtype", [F, B, H])
@pytest.mark.parametrize("rule", NEIGHBORS, ids=lambda rule: rule.name)
def test_every_rule_by_torch(rule, dtype):
    for d in (0, 2):
        for n in (1003, 1):
            check(TorchPasses, rule, dtype, n, d)


@both
@pytest.mark.parametrize("dtype", [F, B])
@pytest.mark.parametrize("rule", everyday(COMPILED, COMPILED[:2]), ids=lambda rule: f"{rule.name}-{rule.schedule}")
def test_compiled(backend, rule, dtype):
    check(backend, rule, dtype, 1003, 2)


def test_doubles():
    p = problem(rules.mi_dmsgd, 501, 1, TYPES["ddd"])
    y = p.x - p.g
    same(step(outside(TorchPasses), but(p, g=y)), step(TorchPasses, but(p, g=p.x - y)))


def test_the_rule_itself_stays_as_it_is():
    outer = rules.mi_dmsgd.under("awc").outer()
    assert outer.traveled and not rules.mi_dmsgd.traveled and not rules.mi_dmsgd.under("awc").traveled
    assert outer.schedule == "awc"
