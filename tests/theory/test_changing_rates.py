"""Promises about learning rates that come and go, on linear regression with unlike workers: the guards of PC-DmSGD and
DecentLaM keep warm restarts and toggling rates bounded, with bfloat16 messages too; without the guards those blow up.
MI-DmSGD has no division to guard. Its default rate of correction is one that no rhythm can pump.
"""

import math

import numpy as np
import oracle
import pytest
from hard_graphs import GAINS

from fused_dlam import Rule, jit, rules, simulate, topology


def derive_unguarded(h, memory):
    rate = h["correction_rate"]
    return {"leak": 1 - rate / h["correction_gain"], "correction": rate / h["lr"] if h["lr"] else 0.0}


@jit
def send_rounded(x, g, s, h):
    """x - lr u as bfloat16: split = 2^45 + 1 leaves 8 of the 53 bits (Veltkamp)."""
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    y = x - h.lr * u
    t = h.split * y
    return (t - (t - y),)


@jit
def send_descended_rounded(x, g, s, h):
    y = x - h.lr * (g + h.weight_decay * x)
    t = h.split * y
    return (t - (t - y),)


def rounded(rule, send, derive):
    """A rule of the package with bfloat16 messages, and with `derive` in place of its own."""
    hyper = {**rule.hyper, "split": 2.0**45 + 1}
    return Rule(f"{rule.name}, bfloat16 messages", send, rule.update, rule.state, hyper=hyper, derive=derive)


PC = rules.pc_dmsgd
ROUNDED = rounded(PC, send_rounded, PC.derive)
UNGUARDED = Rule("pc-dmsgd, 1/lr", PC.send, PC.update, PC.state, hyper=PC.hyper, derive=derive_unguarded)
UNGUARDED_ROUNDED = rounded(PC, send_rounded, derive_unguarded)
LR = 0.05


def restart(k):
    """A warm restart: 500 steps at 1e-6 in between."""
    return 1e-6 if 500 <= k < 1000 else LR


def toggle(k):
    return LR * (1, 1e-3)[k // 5 % 2]


def peak_error(method, top, lr, **hyper):
    """The largest squared error after the first 50 steps of 2,000, relative to the optimum."""
    problem = oracle.LeastSquares(top.n, d=10, rows=50)
    with np.errstate(all="ignore"):
        error = problem.error(simulate(method, top, problem, np.zeros((top.n, 10)), 2000, lr, **hyper))
    return np.nan_to_num(error[50:], nan=math.inf).max()


@pytest.mark.parametrize(("gain", "bound"), [(1.0, 0.4), (10.0, 0.2), (math.inf, 0.02)])
def test_a_warm_restart_stays_bounded(gain, bound):
    """n = 16, one-peer exponential: the peak is at most DmSGD's own (0.30), at gain 10 a fraction of it, at infinity
    none; with bfloat16 messages too. The control, 1/lr without guard, replays the rounding of the messages."""
    top = topology.one_peer_exponential(16)
    assert peak_error("dmsgd", top, restart) == pytest.approx(0.30, abs=0.02)
    assert peak_error("pc-dmsgd", top, restart, correction_gain=gain) < bound
    assert peak_error(ROUNDED, top, restart, correction_gain=gain) < bound
    assert peak_error(UNGUARDED_ROUNDED, top, restart, correction_gain=gain) > 10


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("name", ["one-peer-exponential", "exponential", "ring"])
def test_toggling_rates_stay_bounded(name, gain):
    """Every five steps between lr and lr / 1000: below DmSGD's peak on the same graph. The control overflows."""
    top = topology.get(name, 16)
    bound = min(0.15, peak_error("dmsgd", top, toggle))
    assert peak_error("pc-dmsgd", top, toggle, correction_gain=gain) < bound
    assert peak_error(ROUNDED, top, toggle, correction_gain=gain) < bound
    assert not peak_error(UNGUARDED, top, toggle, correction_gain=gain) < 1e6


def test_decentlam_restarts_warm():
    """On the ring, with bfloat16 messages: 0.4. The control, 1/lr without guard: 1e4 and more."""
    guarded = rounded(rules.decentlam, send_descended_rounded, rules.decentlam.derive)
    unguarded = rounded(rules.decentlam, send_descended_rounded, lambda h, memory: {"inverse_lr": 1 / h["lr"]})
    assert peak_error("decentlam", topology.ring(16), restart) < 1
    assert peak_error(guarded, topology.ring(16), restart) < 1
    assert peak_error(unguarded, topology.ring(16), restart) > 1e3


# -- MI-DmSGD ----------------------------------------------------------------------------------------------------------


def off(on, without, low=0.0, lr=LR):
    return lambda k: lr * (1 if k % (on + without) < on else low)


SCHEDULES = {
    "restart": restart,
    "toggle": toggle,
    "10 on 28 off": off(10, 28, lr=0.02),  # at 0.05 this rhythm pumps momentum itself, all-reduce's too
    "30 on 100 off": off(30, 100),
    "zeros": lambda k: 0.0 if 700 <= k < 800 else LR,
    "cosine restarts": lambda k: LR * (1 + math.cos(math.pi * (k % 100) / 100)) / 2,
    "random": lambda k: LR * 10 ** -np.random.default_rng(k).uniform(0, 6),
}


@pytest.mark.parametrize("what", SCHEDULES)
@pytest.mark.parametrize(("name", "bound"), [("one-peer-exponential", 0.15), ("exponential", 0.15), ("ring", 0.45)])
def test_mi_dmsgd_stays_bounded_under_any_schedule(name, bound, what):
    """n = 16. Most of these peaks are what is left of the start at step 50."""
    assert peak_error("mi-dmsgd", topology.get(name, 16), SCHEDULES[what]) < bound


def test_a_rate_of_correction_that_a_rhythm_pumps():
    """Ring of 16, 10 steps on and 28 off: the control, e = 1/2 = 9.9 mu, overflows; the default, 2 mu, does not."""
    rhythm = off(10, 28, lr=0.02)
    assert peak_error("mi-dmsgd", topology.ring(16), rhythm) < 0.45
    assert not peak_error("mi-dmsgd", topology.ring(16), rhythm, correction_rate=0.5) < 1e6
