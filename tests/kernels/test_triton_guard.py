"""The guard, and parameters that somebody wrote, in the Triton kernels on the CPU: under TRITON_INTERPRET=1.

Promises, for every rule under both schedules: those of test_guard.py and test_low.py. (The interpreter truncates to
bfloat16 where a GPU rounds to nearest.)
"""

import pytest
import torch
from cpu_problem import problem
from guard_problem import but, check_low, check_planted, plant, same, step
from triton_problem import IDS, RULES, interpreted

from fused_dlam import rules

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which interprets
F, B, H = torch.float32, torch.bfloat16, torch.float16


def make(rule, guard):
    from fused_dlam.kernels.triton_passes import TritonPasses

    return TritonPasses(rule, "cpu", block=2048, guard=guard)


@interpreted
@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.traveled], ids=IDS[:-2])  # those: test_traveled.py
def test_every_rule_guarded(rule):
    for d, n, types in ((0, 1033, "fff"), (1, 2048, "fbb"), (3, 1033, "fff"), (3, 1033, "fhh"), (1, 1, "fff")):
        p = problem(rule, n, d, [{"f": F, "b": B, "h": H}[t] for t in types], scale=0.75 if d == 3 else 1.0)
        same(step(make, p, guard=True), step(make, p))
        check_planted(make, p)


@interpreted
@pytest.mark.parametrize("message", [F, B, H])
@pytest.mark.parametrize("rule", [rules.pc_dmsgd, rules.da_dmsgd], ids=lambda rule: rule.name)
def test_recomputed_message_is_the_sent_one(rule, message):
    p = plant(problem(rule, 4099, 1, (F, F, message), scale=0.5))
    p = but(p, received=step(make, p, guard=True)[0][None])
    heavy, light = (but(p, scalars=p.scalars._replace(weights=(w,))) for w in (1e30, 0.0))
    same(step(make, heavy, guard=True), step(make, light, guard=True))


def truncated(x, dtype):
    return (x.view(torch.int32) & -(2**16)).view(F).to(B) if dtype == B else x.to(dtype)


@interpreted
@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_every_rule_follows_what_was_written(rule):
    for d, n, dtype in ((0, 1033, B), (1, 2048, H), (3, 1033, B), (1, 1, H)):
        check_low(make, problem(rule, n, d), dtype, truncated)


@interpreted
def test_a_skipped_step_changes_nothing():
    p = problem(rules.pc_dmsgd, 1033, 1)
    p.scalars = p.scalars._replace(skip=torch.tensor(1.0))
    low = torch.zeros(1033, dtype=B)
    _, x, *state = step(make, p, guard=True, low=low, copies=(low,))
    assert torch.equal(x, p.x) and all(map(torch.equal, state, p.state)) and not low.any()


@interpreted
def test_a_low_that_does_not_fit_is_refused():
    p = problem(rules.dsgd, 64, 1)
    with pytest.raises(ValueError, match="flat, contiguous"):
        step(make, p, low=torch.zeros(63, dtype=B))
    with pytest.raises(TypeError, match="float64"):
        step(make, p, low=torch.zeros(64, dtype=torch.float64))
