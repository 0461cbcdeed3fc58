"""Promises about the scalars that the host computes for a step:

- `scalars_at(count)` of adam and adamw is what `scalars` returns after so many steps, in the numbers of torch's Adam,
  and changes no memory; rules that count no steps have none;
- a rule that says it counts, counts;
- a learning rate below float32's normal range counts as 0 where an equation divides by it, on the host and on a device;
- what is a number, and what is none.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fused_dlam import GossipSGD, Rule, rules
from fused_dlam.rules.scalars import SMALLEST, number, ratio


@pytest.mark.parametrize("rule", [rules.adam, rules.adamw, rules.adamw.under("awc")])
def test_scalars_of_a_parameter_that_came_later(rule):
    memory, common = {}, (0.01, 0.9, 0.1, 0.0, {"beta2": 0.99})
    in_turn = [rule.scalars(*common, memory) for _ in range(7)]
    assert memory == {rule.counts: 7}
    for taken, h in enumerate(in_turn):
        assert rule.scalars_at(taken, *common, memory) == h
        assert rule.scalars_at(taken, *common) == h
    assert memory == {rule.counts: 7}


def test_they_are_torchs():
    """A parameter whose first gradient comes in step 21 takes a first step: lr, whatever the gradient."""
    h = rules.adam.scalars_at(0, 0.01, 0.9, 0.0, memory={"adam_steps": 20})
    for g in (1e-3, 2.0):
        _, (m, v) = rules.adam.update.fn(
            torch.ones(1, dtype=torch.float64), torch.tensor([g], dtype=torch.float64),
            rules.adam.State(torch.zeros(1), torch.zeros(1)), (0.0,), h,
        )  # fmt: skip
        assert float(h.step_size * m / (v.sqrt() + h.scaled_eps)) == pytest.approx(0.01, rel=1e-4)
    late, p = torch.nn.Parameter(torch.ones(1)), rules.adam.scalars_at(4, 0.01, 0.9, 0.0)
    optimizer = torch.optim.Adam([late], lr=0.01)
    late.grad = torch.ones(1)
    for _ in range(4):
        optimizer.step()
    before, state = late.detach().clone(), optimizer.state[late]
    x, _ = rules.adam.update.fn(before, late.grad, rules.adam.State(state["exp_avg"], state["exp_avg_sq"]), (0.0,), p)
    optimizer.step()
    torch.testing.assert_close(x, late.detach(), rtol=1e-6, atol=0)


def test_a_count_on_a_device_stays_there():
    """As after a step that the device alone knows to be skipped or not."""
    h = rules.adam.scalars_at(torch.tensor(2.0, dtype=torch.float64), 0.01, 0.9, 0.0)
    assert isinstance(h.step_size, torch.Tensor) and float(h.step_size) == pytest.approx(
        rules.adam.scalars_at(2, 0.01, 0.9, 0.0).step_size, rel=1e-12
    )


def test_rules_that_count_no_steps():
    counting = {name for name, rule in rules.ALL.items() if rule.counts is not None}
    assert counting == {"adam", "adamw", "mi-adamw"}
    with pytest.raises(ValueError, match="rule 'dmsgd' counts no steps"):
        rules.dmsgd.scalars_at(3, 0.1, 0.9, 0.0)


def test_a_rule_that_says_it_counts_and_does_not():
    for derive in (None, lambda h, memory: {}, lambda h, memory: memory.update(steps=2) or {}):
        with pytest.raises(ValueError, match=r"counts='steps', but derive leaves memory = .* after one step"):
            Rule("mine", rules.dsgd.send, rules.dsgd.update, derive=derive, counts="steps")


DIVIDING = ("decentlam", "qg-dmsgd", "nesterov-qg-dmsgd", "pc-dmsgd", "d2-dmsgd", "exact-diffusion")


@pytest.mark.parametrize("method", DIVIDING)
@pytest.mark.parametrize("lr", [0.0, 5e-324, 1e-45, 1e-40, SMALLEST / 2, SMALLEST, 1e-37])
def test_denormal_rates(method, lr):
    """Every scalar fits into float32, on the host and on a device alike, also after a larger rate."""
    rule = rules.get(method)
    for rates in ([lr, lr], [1e-38, lr], [0.1, lr]):
        host, device = {}, {}
        for rate in rates:
            h = rule.scalars(rate, 0.9, 0.0, 0.5, memory=host)
            d = rule.scalars(torch.tensor(rate, dtype=torch.float64), 0.9, 0.0, 0.5, memory=device)
        assert all(abs(float(v)) < torch.finfo(torch.float32).max for v in h)
        assert [float(v) for v in d] == pytest.approx(list(h), rel=1e-12)


@pytest.mark.parametrize("method", DIVIDING)
def test_a_step_at_a_denormal_rate(method):
    """It raises nothing, and moves x by no more than the rate says."""
    x = torch.nn.Parameter(torch.zeros(3))
    optimizer = GossipSGD([x], lr=1e-40, method=method)
    for _ in range(2):
        optimizer.zero_grad()
        x.sum().backward()
        optimizer.step()
    assert x.isfinite().all() and abs(x).max() < 5e-40


def test_ratio():
    assert ratio(1.0, 0.5, where=0.5) == 2.0 and ratio(1.0, 1e-40, where=1e-40) == 0.0 == ratio(1.0, 0.0, where=0.0)


def test_numbers():
    for value in (1, 0.5, np.float32(0.5), np.int64(3), Fraction(1, 2), torch.tensor(0.5), math.inf):
        assert number("lr", value) == float(value)
    assert number("lr", 10**400) == math.inf
    for value in (True, np.True_, "0.1", b"1", None, 1j, [0.1], {}):
        with pytest.raises(TypeError, match="^lr must be a number, not "):
            number("lr", value)
