"""Promises about mistakes: a wrong name, schedule, shape or form of a rule is refused, by a sentence that says what is
wrong and what would be right.
"""

import numpy as np
import oracle
import pytest

from fused_dlam import Rule, consensus_growth, jit, rules, simulate, topology


def simulate_two_steps(method="dmsgd", top="ring", grad=lambda k, x: x, x0=None, **options):
    return simulate(method, top, grad, np.ones((4, 3)) if x0 is None else x0, 2, 0.1, **options)


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="unknown method 'lion'; known: psgd, .*pc-dmsgd"):
        simulate_two_steps("lion")
    for wrong, meant in (("pc_dmsgd", "pc-dmsgd"), ("DecentLaM", "decentlam"), ("adamW", "adamw")):
        with pytest.raises(ValueError, match=f"unknown method '{wrong}'; known: .*. Did you mean '{meant}'?"):
            simulate_two_steps(wrong)
    with pytest.raises(TypeError, match="method must be a name or a Rule"):
        simulate_two_steps(3)
    with pytest.raises(TypeError, match="'dmsgd' has no hyper-parameter 'mu'; it has lr, momentum, weight_decay"):
        simulate_two_steps("dmsgd", mu=0.1)
    with pytest.raises(TypeError, match="'pc-dmsgd' has no hyper-parameter 'gain'; it has .*correction_gain"):
        consensus_growth("pc-dmsgd", topology.ring(4), gain=3)
    with pytest.raises(ValueError, match="unknown topology 'circle'"):
        simulate_two_steps(top="circle")


@pytest.mark.parametrize("certify", [False, True])
def test_schedules_are_checked(certify):
    def attempt(method, schedule):
        if certify:
            return consensus_growth(method, topology.ring(4), schedule=schedule)
        return simulate_two_steps(method, schedule=schedule)

    for method in oracle.ONLY_ATC:
        for schedule in ("midpoint", "awc"):
            with pytest.raises(ValueError, match=f"'{schedule}' needs .*'{method}' is not one"):
                attempt(method, schedule)
    with pytest.raises(ValueError, match="Invalid schedule: 'overlap', must be 'auto', 'atc', 'midpoint' or 'awc'"):
        attempt("dmsgd", "overlap")
    with pytest.raises(ValueError, match="'awc-dmsgd' sends x itself: its schedule is 'awc', not 'atc'"):
        attempt("awc-dmsgd", "atc")


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"grad returned shape \(4, 2\), expected \(4, 3\)"):
        simulate_two_steps(grad=lambda k, x: x[:, :2])
    with pytest.raises(ValueError, match=r"x0 must be \[n, d\]"):
        simulate_two_steps(x0=np.ones(3))
    with pytest.raises(ValueError, match="for 5 workers, but there are 4"):
        simulate_two_steps(top=topology.ring(5))


@jit
def send_no_tuple(x, g, s, h):
    return x - h.lr * g


@jit
def update_bare(x, g, s, pull, h):
    return x + pull[0]


@jit
def update_state_not_in_tuple(x, g, s, pull, h):
    return x + pull[0], s.momentum_buffer + g


@jit
def update_two_buffers(x, g, s, pull, h):
    return x + pull[0], (g, g)


def plain(x, g, s, h):
    return (x,)


def test_a_rule_of_the_wrong_form_is_refused():
    with pytest.raises(TypeError, match="'mine': send must be decorated with @fused_dlam.jit"):
        Rule("mine", plain, update_bare)
    with pytest.raises(TypeError, match="'mine': update must be decorated"):
        Rule("mine", rules.dmsgd.send, plain)
    with pytest.raises(ValueError, match="'mine': send must return a non-empty tuple"):
        Rule("mine", send_no_tuple, update_bare)
    for update in (update_bare, update_state_not_in_tuple, update_two_buffers):
        with pytest.raises(ValueError, match=r"'mine': update must return x', \(one value for each of"):
            Rule("mine", rules.dsgd.send, update, ("momentum_buffer",))
    with pytest.raises(ValueError, match="average must be 'neighbors' or 'gradient', not 'all'"):
        Rule("mine", rules.dsgd.send, rules.dsgd.update, average="all")
