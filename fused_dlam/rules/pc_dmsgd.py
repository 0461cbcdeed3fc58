"""PC-DmSGD, pull-corrected DmSGD: our method for directed and one-peer graphs, where DecentLaM is unstable.

    u = beta m + g,  x' = x - lr u + pull,  p' = (1 - e/kappa) p + (e/lr) pull,  m' = u - p'

Letters as in momentum.py; e is the correction rate and kappa the correction gain. p is a slow, leaky integral of the
pull. Neighbors pull a worker back that its own data drag away; the pull builds up in p; and p cancels that drag in the
momentum. With doubly stochastic W the pulls sum to zero, so the workers' mean moves exactly like momentum SGD with
all-reduce on the mean gradient.

The gain sets the bias that is left: kappa = 1 has DSGD's, a larger kappa divides the squared bias by about
(1 + beta (kappa - 1))^2, and kappa = inf has none. At inf p never forgets, so the mean of p over the workers must be
zero: a change of their number has to start p anew.

Related methods: QG-DmSGD filters the gradient too, so it is slower. Exact diffusion with momentum integrates the pull
fast and without a leak, and is unstable on many directed graphs. Momentum tracking needs two messages.
"""

from __future__ import annotations

from .hyper import Hyper
from .jit import jit
from .momentum import send_momentum_step
from .rule import Rule
from .scalars import largest, ratio


@jit
def update_pc_dmsgd(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    p = h.leak * s.correction_buffer + h.correction * pull[0]
    return x - h.lr * u + pull[0], (u - p, p)


def auto_correction_rate(momentum: float, rho: float) -> float:
    """The rate e that `correction_rate="auto"` takes: min{(1-beta)/10, (1-beta)^2, (1-beta)(1-rho)}.

    rho is the contraction per step. The third term is for badly connected graphs: without it a one-way ring of 16
    workers is unstable at beta = 0.9 and gain infinity.
    """
    return min((1 - momentum) / 10, (1 - momentum) ** 2, (1 - momentum) * (1 - rho))


def derive_pc_dmsgd(h: dict, memory: dict) -> dict:
    """leak = 1 - e/kappa. correction = e/den with den = max(lr, G, largest lr so far / 100), and 0 while den = 0.

    G is a running mean of lr; it bounds the correction where the rate toggles every few steps. The largest rate / 100
    bounds it where a schedule restarts from a tiny rate.
    """
    lr, e = h["lr"], h["correction_rate"]
    memory["lr_max"] = largest(memory.get("lr_max", 0.0), lr)
    memory["lr_mean"] = (1 - e) * memory.get("lr_mean", lr) + e * lr
    den = largest(largest(lr, memory["lr_mean"]), memory["lr_max"] / 100)
    return {"leak": 1.0 - e / h["correction_gain"], "correction": ratio(e, den, where=den)}


pc_dmsgd = Rule(
    "pc-dmsgd",
    send_momentum_step,
    update_pc_dmsgd,
    ("momentum_buffer", "correction_buffer"),
    hyper={
        "correction_rate": Hyper(auto_correction_rate, at_least=0, at_most=1),
        "correction_gain": Hyper(10.0, at_least=1),  # math.inf: the correction does not leak
    },
    derive=derive_pc_dmsgd,
    centered=("correction_buffer",),
)
