"""Elements that are not finite do not spread: the guard of the CPU passes, `TorchPasses` and `NumbaPasses`.

Promises, for every rule, with NaN, infinities and numbers whose differences overflow planted in every buffer:
- where all is finite, results are those of passes without a guard, bit for bit;
- a bad element of the gradient counts as 0, a bad one of a message as one of which the sender and I agree, and where my
  own message is bad, nobody pulls: as without a guard on such buffers, bit for bit;
- against float64, the rule's text with the guard beside it: within roundings, and finite where that is finite;
- the message that `combine` recomputes is still the one that `pack` wrote;
- one bad gradient leaves every worker finite, where without a guard it makes every worker NaN.
"""

import pytest
import torch
from cpu_problem import AWC, B, D, F, H, both, needs_numba, problem
from everyday import everyday
from guard_problem import but, check_planted, plant, same, step

from fused_dlam import rules
from fused_dlam.kernels.numba_passes import NumbaPasses
from fused_dlam.kernels.torch_passes import TorchPasses
from fused_dlam.rules.averaging import mix_ahead
from fused_dlam.rules.scalars import Scalars

TYPES = {"fff": (F, F, F), "fbb": (F, B, B), "fhh": (F, H, H), "ddd": (D, D, D), "dfb": (D, F, B)}
RULES = [*rules.ALL.values(), AWC, mix_ahead]


pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of roots


def names(rule):
    return f"{rule.name}-awc" if rule is AWC else rule.name


# Compiling takes seconds for each rule.
QUICK = (rules.psgd, rules.pc_dmsgd, rules.adamw)


@needs_numba
@pytest.mark.parametrize("rule", everyday(RULES, QUICK), ids=names)
def test_every_rule_compiled(rule):
    for d in (0, 1, 3):
        for n in (1003, 3):
            p = problem(rule, n, d, scale=0.75 if d == 3 else 1.0)
            same(step(NumbaPasses, p, guard=True), step(NumbaPasses, p))
            check_planted(NumbaPasses, p)


@both
@pytest.mark.parametrize("types", [t for t in TYPES if t != "fff"])
@pytest.mark.parametrize("rule", everyday([rules.pc_dmsgd, rules.da_dmsgd], [rules.pc_dmsgd]), ids=names)
def test_other_types(backend, rule, types):
    for n in (1, 1003):
        p = problem(rule, n, 2, TYPES[types])
        same(step(backend, p, guard=True), step(backend, p))
        check_planted(backend, p)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("rule", RULES, ids=names)
def test_every_rule_and_type_by_torch(rule, types):
    for d, n in ((0, 3), (0, 1003), (1, 1003), (3, 1003)):
        p = problem(rule, n, d, TYPES[types], scale=0.75 if d == 3 else 1.0)
        same(step(TorchPasses, p, guard=True), step(TorchPasses, p))
        check_planted(TorchPasses, p)


@both
@pytest.mark.parametrize("scale", [-1.0, 2.0**-10, -0.3, 2.0**10, 1e3])
def test_scaled_gradients(backend, scale):
    """With a scale above 1 a finite gradient may overflow: that is 0 too. Scales of loss scalers are powers of two."""
    for types in ("fff", "fbb"):
        p = problem(rules.decentlam, 1003, 2, TYPES[types], scale)
        check_planted(backend, p)
        if backend is not TorchPasses or scale != 1e3:  # there torch rounds the product once more
            same(step(backend, p, guard=True), step(backend, p))


@both
def test_numbers_worked_by_hand(backend):
    """lr = 0: x' = x + (r - x) / 2. Not one bad gradient counts."""
    x = torch.tensor([1.0, 1.0, 1.0, -3e38, 1.0, torch.nan])
    r = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 3.0, 1.0])
    g = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan, torch.nan])
    passes = backend(rules.dsgd, guard=True)
    passes.set(Scalars(rules.dsgd.scalars(0.0, 0.0, 0.0), (0.5,)))
    messages = torch.empty(1, len(x))
    passes.pack(x, g, (), messages)
    same((messages[0],), (x,))
    passes.combine(x, g, (), r[None, None])
    same((x,), (torch.tensor([1.0, 1.0, 1.0, -3e38, 2.0, torch.nan]),))


@both
@pytest.mark.parametrize("types", ["fff", "fbb", "fhh"])
@pytest.mark.parametrize("rule", [rules.decentlam, rules.pc_dmsgd, rules.da_dmsgd, AWC], ids=names)
def test_recomputed_message_is_the_sent_one(backend, rule, types):
    """Hearing my own message, I feel no pull, or the weight of 1e30 would show it."""
    p = plant(problem(rule, 10_003, 1, TYPES[types], scale=0.5))
    sent = step(backend, p, guard=True)[0]
    p = but(p, received=sent[None])
    heavy, light = (but(p, scalars=p.scalars._replace(weights=(w,))) for w in (1e30, 0.0))
    same(step(backend, heavy, guard=True), step(backend, light, guard=True))


@both
@pytest.mark.parametrize("rule", [rules.decentlam, rules.pc_dmsgd, rules.da_dmsgd], ids=names)
@pytest.mark.parametrize("where", ["gradient", "parameter"])
def test_one_bad_element_does_not_spread(backend, rule, where):
    """Four workers on a ring, weights 1/3, gradients x - b; in step 3 one element of worker 0's is NaN.

    A bad gradient leaves all finite, and a bad parameter, which is never repaired, all but itself.
    """

    def bad(guard):
        n, size = 4, 33
        random = torch.Generator().manual_seed(0)
        b, x = torch.randn(n, size, generator=random), torch.zeros(n, size)
        state, messages = torch.zeros(len(rule.state), n, size), torch.empty(n, rule.messages, size)
        passes, memory = backend(rule, guard=guard), {}
        for k in range(12):
            passes.set(Scalars(rule.scalars(0.05, 0.8, 0.0, 0.5, memory=memory), (1 / 3, 1 / 3)))
            if k == 3 and where == "parameter":
                x[0, 5] = torch.nan
            g = x - b
            if k == 3 and where == "gradient":
                g[0, 5] = torch.nan
            for i in range(n):
                passes.pack(x[i], g[i], tuple(state[:, i]), messages[i])
            for i in range(n):
                passes.combine(x[i], g[i], tuple(state[:, i]), (messages[i - 1], messages[(i + 1) % n]))
        return [tuple(place) for place in (~x.isfinite()).nonzero().tolist()]

    assert bad(guard=True) == ([] if where == "gradient" else [(0, 5)])
    assert bad(guard=False) == [(i, 5) for i in range(4)]
