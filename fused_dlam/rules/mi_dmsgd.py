"""MI-DmSGD, midpoint and integral: our method for any graph. It sends the middle of the local step.

    u = beta m + g,  d = rho p - lr u
    send x + d/2,    x' = x + d + pull,  p' = (1 - e rho/kappa) p + e pull,  m' = u

Letters as in momentum.py; e is the correction rate and kappa the correction gain. rho = lr / (the largest lr so far).

**The midpoint.** Without p, for quadratics of any curvatures 0 <= lr H_i < 2 (1 + beta), different on every worker, and
for any sequence of doubly stochastic matrices, a sum of squares never grows (theory/README.md has the proof). So for
equal curvature one message to one peer keeps the whole range of all-reduce's learning rates, on any graph.

**The integral.** p is a slow, leaky integral of the pull, as in PC-DmSGD, but in units of x: a worker whose data drag
it away is pulled back by its neighbors, the pull builds up in p, and p takes the place of the pull. The pulls sum to
zero over the workers, so p does too, and the workers' mean moves exactly as all-reduce momentum SGD. Nothing is divided
by lr. p belongs to the largest rate so far, and a smaller rate takes a smaller share of it and leaks less: so the bias
that is left, (lr u)/(1 + kappa) in the pull, falls with the rate, and a rate of 0 forgets nothing.

Related: NIDS (Li, Shi and Yan 2019) has this half step without momentum, on static symmetric W. Exact diffusion with
momentum on a static W is this with the whole step, e = 1 and no leak.
"""

from __future__ import annotations

from typing import Any

from .adaptive import HYPER, MOMENTS, derive_adam
from .hyper import Hyper
from .jit import jit
from .rule import Rule
from .scalars import largest, ratio


@jit
def send_mi_dmsgd(x, g, s, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return (x - h.lr * u + h.share * s.correction_buffer,)


@jit
def update_mi_dmsgd(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    y = x - h.lr * u + h.share * s.correction_buffer
    return y + pull[0], (u, h.leak * s.correction_buffer + h.correction * pull[0])


def auto_displacement_rate(momentum: float, rho: float, static: bool) -> float:
    """The rate e that `correction_rate="auto"` takes: min{1/2, 2(1-rho)} with one symmetric matrix for all steps, else
    min{(1-rho)/(1+rho), 5(1-beta)}.

    rho is the contraction per step. For a directed static W of eigenvalues within a circle of radius rho the first is
    half the largest that is stable without gradients, exactly; with a symmetric one any e below 2 is stable at a
    constant rate, and with 2(1-rho) no schedule of rates makes disagreement grow (theory/README.md, theorems 2 to 4).

    The last term counts from beta = 0.95 on. Where matrices change p must be slow beside the momentum too: at 0.99 the
    largest stable lr * h on one-peer graphs of 16 workers is 0.45 without it, with 20 (1-beta) in its place still 0.45,
    and with 10 (1-beta) or less all-reduce's 3.98.
    """
    return min(0.5, 2 * (1 - rho)) if static else min((1 - rho) / (1 + rho), 5 * (1 - momentum))


def derive_mi_dmsgd(h: dict, memory: dict) -> dict:
    """share = rho = lr / (the largest lr so far), 0 while that is 0; leak = 1 - e rho/kappa."""
    lr, e = h["lr"], h["correction_rate"]
    memory["lr_max"] = largest(memory.get("lr_max", 0.0), lr)
    share = ratio(lr, memory["lr_max"], where=memory["lr_max"])
    return {"share": share, "correction": e, "leak": 1.0 - e / h["correction_gain"] * share}


CORRECTION = {
    "correction_rate": Hyper(auto_displacement_rate, at_least=0, at_most=1),
    "correction_gain": Hyper(300.0, at_least=1),  # math.inf: the correction does not leak
}

INTEGRAL: dict[str, Any] = {"centered": ("correction_buffer",), "schedule": "midpoint"}
FORM = {"state": ("momentum_buffer", "correction_buffer"), "hyper": CORRECTION, "derive": derive_mi_dmsgd, **INTEGRAL}

mi_dmsgd = Rule("mi-dmsgd", send_mi_dmsgd, update_mi_dmsgd, **FORM)


@jit
def send_nesterov_mi_dmsgd(x, g, s, h):
    g = g + h.weight_decay * x
    u = h.momentum * s.momentum_buffer + g
    return (x - h.lr * (g + h.momentum * u) + h.share * s.correction_buffer,)


@jit
def update_nesterov_mi_dmsgd(x, g, s, pull, h):
    g = g + h.weight_decay * x
    u = h.momentum * s.momentum_buffer + g
    y = x - h.lr * (g + h.momentum * u) + h.share * s.correction_buffer
    return y + pull[0], (u, h.leak * s.correction_buffer + h.correction * pull[0])


nesterov_mi_dmsgd = Rule("nesterov-mi-dmsgd", send_nesterov_mi_dmsgd, update_nesterov_mi_dmsgd, **FORM)


@jit
def send_mi_adamw(x, g, s, h):
    m = h.momentum * s.exp_avg + h.one_minus_momentum * g
    v = h.beta2 * s.exp_avg_sq + h.one_minus_beta2 * (g * g)
    return (h.keep * x - h.step_size * (m / (v.sqrt() + h.scaled_eps)) + h.share * s.correction_buffer,)


@jit
def update_mi_adamw(x, g, s, pull, h):
    m = h.momentum * s.exp_avg + h.one_minus_momentum * g
    v = h.beta2 * s.exp_avg_sq + h.one_minus_beta2 * (g * g)
    y = h.keep * x - h.step_size * (m / (v.sqrt() + h.scaled_eps)) + h.share * s.correction_buffer
    return y + pull[0], (m, v, h.leak * s.correction_buffer + h.correction * pull[0])


# AdamW's step in the place of momentum's. The integral asks for nothing but a step in units of x. It ends where the
# workers' steps sum to zero, which with second moments of their own is not quite where their gradients do.
mi_adamw = Rule(
    "mi-adamw",
    send_mi_adamw,
    update_mi_adamw,
    (*MOMENTS, "correction_buffer"),
    hyper={**HYPER, **CORRECTION},
    derive=lambda h, memory: {**derive_mi_dmsgd(h, memory), **derive_adam(h, memory)},
    counts="adam_steps",
    **INTEGRAL,
)
