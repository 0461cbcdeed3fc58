"""Promises about hyper-parameters. Their bounds are those of the rule that has them:

- a value out of bounds is refused by a sentence with the name, the value and the bounds; so are NaN, bool, text and
  tensors;
- "auto" and None stand for a default that is a function, None for any default;
- a rule from outside has the bounds that it states and no others, whatever its hyper-parameters are called;
- the schedule changes nothing of all that.
"""

import math

import numpy as np
import pytest
import torch

from fused_dlam import Rule, consensus_growth, rules, simulate, topology
from fused_dlam.rules import Hyper
from fused_dlam.rules import rule as rule_module

CORRECTED = ("pc-dmsgd", "nesterov-pc-dmsgd", "mi-dmsgd", "nesterov-mi-dmsgd", "mi-adamw")
ADAM = ("adam", "adamw", "mi-adamw")
BOUNDS = {  # hyper-parameter: methods, inside, outside, how its bounds are told
    "mu": (("qg-dmsgd", "nesterov-qg-dmsgd"), (0, 0.5, 0.999), (-0.1, 1, 1.5), r"'auto' or in \[0, 1\)"),
    "correction_rate": (CORRECTED, (0.0, 1, 0.3), (-1e-9, 2.0), r"'auto' or in \[0, 1\]"),
    "correction_gain": (CORRECTED, (1, 10.0, math.inf), (0.5, -1), r">= 1 \(math.inf is allowed\)"),
    "probability": (("proxskip",), (1, 0.1, 1e-9), (0.0, 1.01), r"in \(0, 1\]"),
    "beta2": (ADAM, (0, 0.999), (1.0, -0.1), r"in \[0, 1\)"),
    "gossip_rate": (("gasloc", "noloco"), (1, 0.7, 1e-9, 1.5), (0.0, -0.5, math.inf), "above 0 and finite"),
    "eps": (ADAM, (1e-30, 1, np.float32(0.5)), (0.0, -1.0, math.inf), "above 0 and finite"),
}  # fmt: skip


def mine(**hyper):
    """DmSGD with hyper-parameters that do nothing."""
    return Rule("mine", rules.dmsgd.send, rules.dmsgd.update, ("momentum_buffer",), hyper=hyper)


def test_every_hyper_parameter_is_in_the_table_above():
    found = {(rule.name, name) for rule in rules.ALL.values() for name in rule.hyper}
    assert found == {(method, name) for name, (methods, *_) in BOUNDS.items() for method in methods}
    assert all(isinstance(h, Hyper) for rule in rules.ALL.values() for h in rule.hyper.values())


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_of_the_packages_methods(name):
    methods, inside, outside, text = BOUNDS[name]
    for rule in map(rules.get, methods):
        for value in (*inside, None):
            rule.check_hyper({name: value})
        wrong = (*outside, math.nan, True, "0.5", "", torch.tensor(0.5), [0.5])
        for value in wrong:
            with pytest.raises(ValueError, match=f"^Invalid {name}: .*, must be {text}$"):
                rule.check_hyper({name: value})
    with pytest.raises(ValueError, match=f"Invalid {name}: {outside[0]}, must be"):
        rule.check_hyper({name: outside[0]})


def test_auto_is_for_defaults_that_are_functions():
    rules.pc_dmsgd.check_hyper({"correction_rate": "auto", "correction_gain": None})
    rules.qg_dmsgd.check_hyper({"mu": "auto"})
    for rule, name in ((rules.pc_dmsgd, "correction_gain"), (rules.adam, "beta2"), (mine(boost=1.0), "boost")):
        with pytest.raises(ValueError, match=f"Invalid {name}: 'auto'"):
            rule.check_hyper({name: "auto"})


def test_names_that_a_method_has_not():
    with pytest.raises(
        TypeError, match="method 'dmsgd' has no hyper-parameter 'correction_gain'; it has lr, momentum, w"
    ):
        rules.dmsgd.check_hyper({"correction_gain": 3})
    for wrong, meant in (
        ("weight_decy", "weight_decay"),
        ("Momentun", "momentum"),
        ("corection_gain", "correction_gain"),
    ):
        with pytest.raises(TypeError, match=f"has no hyper-parameter '{wrong}'; it has .*. Did you mean '{meant}'?"):
            rules.pc_dmsgd.check_hyper({wrong: 1})
    with pytest.raises(TypeError, match="Did you mean 'topology'?"):
        rules.pc_dmsgd.check_hyper({"topolgy": "ring"}, options=("topology", "schedule"))
    with pytest.raises(TypeError, match="it has lr, momentum, weight_decay, correction_rate, correction_gain"):
        rules.pc_dmsgd.check_hyper({"correction_rate": 2.0, "gain": 3})  # the name is told before the value


def test_entries_of_a_parameter_group():
    """What was set, and for the rest the default: a number, or "auto" for a function."""
    assert rules.pc_dmsgd.defaults({}) == {"correction_rate": "auto", "correction_gain": 10.0}
    assert rules.pc_dmsgd.defaults({"correction_rate": 0.0, "correction_gain": None}) == {
        "correction_rate": 0.0,
        "correction_gain": 10.0,
    }
    assert list(rules.adam.defaults({"eps": 1e-6}).items()) == [("beta2", 0.999), ("eps", 1e-6)]
    assert rules.dmsgd.defaults({}) == {}
    h = rules.pc_dmsgd.scalars(0.1, 0.9, 0.0, 0.5, rules.pc_dmsgd.defaults({}))
    assert h == rules.pc_dmsgd.scalars(0.1, 0.9, 0.0, 0.5)


def test_a_users_rule_has_no_bounds_but_its_own():
    """Whatever the names: once a rule's "beta2" had Adam's bounds."""
    rule = mine(beta2=2.0, mu=-1.0, eps=0, correction_rate=7.0, correction_gain=lambda momentum, rho: -momentum)
    rule.check_hyper({"beta2": 3.0, "mu": math.inf, "eps": -1, "correction_rate": -5.0, "correction_gain": "auto"})
    h = rule.scalars(0.1, 0.9, 0.0, hyper={"beta2": 4.0})
    assert (h.beta2, h.mu, h.eps, h.correction_rate, h.correction_gain) == (4.0, -1.0, 0, 7.0, -0.9)
    for value in (math.nan, False, torch.ones(()), "high"):
        with pytest.raises(ValueError, match="Invalid beta2: .*, must be a number"):
            rule.check_hyper({"beta2": value})
    graph = topology.ring(4)
    assert consensus_growth(rule, graph, beta2=5.0) == consensus_growth("dmsgd", graph)
    assert simulate(rule, graph, lambda k, x: x, np.ones(3), 2, 0.1, mu=3.0).shape == (3, 4, 3)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        ({"at_least": 0, "below": 2}, (0, 1.9), (-1, 2), r"in \[0, 2\)"),
        ({"above": 0, "at_most": 2}, (1e-9, 2), (0, 2.1), r"in \(0, 2\]"),
        ({"above": -1}, (0, math.inf), (-1,), r"above -1 \(math.inf is allowed\)"),
        ({"at_least": 0.5, "below": math.inf}, (0.5, 9), (0, math.inf), ">= 0.5 and finite"),
        ({"at_most": 3}, (3, -math.inf), (4,), "<= 3"),
        ({"below": 3}, (2.9,), (3,), "below 3"),
    ],
)
def test_bounds_of_a_users_rule(bounds, inside, outside, text):
    mixed = mine(boost=Hyper(1, **bounds))
    for rule in (mixed, mixed.under("awc")):
        for value in inside:
            rule.check_hyper({"boost": value})
        for value in outside:
            with pytest.raises(ValueError, match=f"^Invalid boost: {value}, must be {text}$"):
                rule.check_hyper({"boost": value})


def test_a_default_must_keep_its_bounds():
    with pytest.raises(ValueError, match=r"Invalid default: 2, must be in \[0, 1\]"):
        Hyper(2, at_least=0, at_most=1)
    for nothing in (None, "auto", True, math.nan):
        with pytest.raises(ValueError, match="Invalid default: .*, must be a number"):
            Hyper(nothing)
    with pytest.raises(ValueError, match="one lower bound at most"):
        Hyper(1, at_least=0, above=0)
    with pytest.raises(ValueError, match="one lower bound at most"):
        Hyper(1, at_most=2, below=2)


@pytest.mark.parametrize("name", rule_module.RESERVED)
def test_names_that_the_optimizer_needs_are_refused(name):
    assert {"lr", "momentum", "weight_decay", "params", "step", "memory"} < set(rule_module.RESERVED)
    with pytest.raises(ValueError, match=f"rule 'mine': no hyper-parameter may be called '{name}'"):
        mine(**{name: 1.0})


def test_awc_keeps_all_that_a_rule_has():
    for rule in rules.ALL.values():
        try:
            awc = rule.under("awc")
        except ValueError:
            continue
        for what in ("name", "update", "state", "hyper", "derive", "average", "centered", "counts"):
            assert getattr(awc, what) == getattr(rule, what), (rule, what)
        assert awc.H._fields == tuple(f for f in rule.H._fields if f != "theta") and awc.under("awc") is awc
        assert awc.under(rule.schedule).send.fn(1.0, 1.0, *_numbers(rule)) == rule.send.fn(1.0, 1.0, *_numbers(rule))


def _numbers(rule):
    values = torch.ones(1 + len(rule.state), dtype=torch.float64)
    return rule.State(*values[1:]), rule.scalars(0.1, 0.9, 0.01, 0.5)


def test_a_default_may_ask_for_the_graph():
    """Functions of (momentum), of (momentum, rho) and of (momentum, rho, static)."""
    rule = mine(a=lambda beta, rho: beta + rho, b=lambda beta, rho, static: beta + rho + 10 * static, c=7.0)
    h = rule.scalars(0.1, 0.5, 0.0, 0.25, static=True)
    assert (h.a, h.b, h.c) == (0.75, 10.75, 7.0)
    assert rule.scalars(0.1, 0.5, 0.0, 0.25).b == 0.75


def test_theta_is_the_schedules():
    with pytest.raises(ValueError, match="rule 'mine': theta is the schedule's"):
        mine(theta=1.0)
