"""Decentralized Adam: every worker's moments are its own, and the parameters are averaged.

    x' = W (x - lr d),  d = m^ / (sqrt(v^) + eps)

m^ and v^ are the bias-corrected moments of the worker's own gradients (Kingma and Ba 2015). This is the form of
BlueFog's adapt-then-combine optimizer. With schedule="awc" it is W x - lr d, the form of Decent-DP. beta_1 is
`momentum`, so that schedules of momentum reach it. With one worker these are torch.optim.Adam and AdamW (Loshchilov
and Hutter 2019).

The moments are not averaged, so the bias is at least DSGD's: workers with unlike data take steps of like size in unlike
directions.
"""

from __future__ import annotations

from math import inf

from .hyper import Hyper
from .jit import jit
from .rule import Rule


@jit
def send_adam(x, g, s, h):
    g = g + h.weight_decay * x
    m = h.momentum * s.exp_avg + h.one_minus_momentum * g
    v = h.beta2 * s.exp_avg_sq + h.one_minus_beta2 * (g * g)
    return (x - h.step_size * (m / (v.sqrt() + h.scaled_eps)),)


@jit
def update_adam(x, g, s, pull, h):
    g = g + h.weight_decay * x
    m = h.momentum * s.exp_avg + h.one_minus_momentum * g
    v = h.beta2 * s.exp_avg_sq + h.one_minus_beta2 * (g * g)
    return x - h.step_size * (m / (v.sqrt() + h.scaled_eps)) + pull[0], (m, v)


@jit
def send_adamw(x, g, s, h):
    m = h.momentum * s.exp_avg + h.one_minus_momentum * g
    v = h.beta2 * s.exp_avg_sq + h.one_minus_beta2 * (g * g)
    return (h.keep * x - h.step_size * (m / (v.sqrt() + h.scaled_eps)),)


@jit
def update_adamw(x, g, s, pull, h):
    m = h.momentum * s.exp_avg + h.one_minus_momentum * g
    v = h.beta2 * s.exp_avg_sq + h.one_minus_beta2 * (g * g)
    return h.keep * x - h.step_size * (m / (v.sqrt() + h.scaled_eps)) + pull[0], (m, v)


def derive_adam(h: dict, memory: dict) -> dict:
    """The bias corrections after t steps, moved from the elements to two scalars as in section 2 of Adam's paper:

        lr m^ / (sqrt(v^) + eps) = step_size m / (sqrt(v) + scaled_eps)

    with r = sqrt(1 - beta_2^t), step_size = lr r / (1 - beta_1^t) and scaled_eps = eps r. This saves an operation per
    element. t counts the group's steps; torch counts each parameter's, so a parameter whose first gradient comes late
    gets these scalars for its own t (`Rule.scalars_at`). keep = 1 - lr lambda is AdamW's decoupled decay; Adam's is
    coupled, lambda x in the gradient.
    """
    t = memory["adam_steps"] = memory.get("adam_steps", 0) + 1
    beta1, beta2 = h["momentum"], h["beta2"]
    r = (1.0 - beta2**t) ** 0.5
    return {
        "one_minus_momentum": 1.0 - beta1,
        "one_minus_beta2": 1.0 - beta2,
        "step_size": h["lr"] * r / (1.0 - beta1**t),
        "scaled_eps": h["eps"] * r,
        "keep": 1.0 - h["lr"] * h["weight_decay"],
    }


MOMENTS = ("exp_avg", "exp_avg_sq")
HYPER = {"beta2": Hyper(0.999, at_least=0, below=1), "eps": Hyper(1e-8, above=0, below=inf)}

adam = Rule("adam", send_adam, update_adam, MOMENTS, hyper=HYPER, derive=derive_adam, counts="adam_steps")
adamw = Rule("adamw", send_adamw, update_adamw, MOMENTS, hyper=HYPER, derive=derive_adam, counts="adam_steps")
