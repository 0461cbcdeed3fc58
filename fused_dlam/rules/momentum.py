"""The momentum SGD methods, two equations each.

Letters: x parameter, g gradient, m momentum (in gradient units), p correction, u the momentum step, W mixing matrix,
lr (gamma) learning rate, beta momentum. Weight decay is coupled, as in torch.optim.SGD. All buffers start at zero.

`x + pull` is the weighted average of the workers' messages where x stands for the own message. The equations are
written with displacements (pull) instead of averages: after 2,000 float32 steps DecentLaM's error against float64 is
4.0e-7 this way and 5.3e-4 the other, and equal workers stay bit-equal.
"""

from __future__ import annotations

from .jit import jit
from .rule import Rule, send_parameter
from .scalars import Scalar, largest, ratio


def inverse_lr(h: dict, memory: dict) -> Scalar:
    """1/lr, bounded: 1/max(lr, largest lr so far / 100), and 0 where lr = 0.

    Unbounded, a warm restart from lr = 1e-6 would replay disagreement and rounding 1e4-fold.
    """
    lr = h["lr"]
    memory["lr_max"] = largest(memory.get("lr_max", 0.0), lr)
    return ratio(1.0, largest(lr, memory["lr_max"] / 100), where=lr)


def derive_inverse_lr(h: dict, memory: dict) -> dict:
    return {"inverse_lr": inverse_lr(h, memory)}


# -- Exact averaging by all-reduce: the yardsticks -------------------------------------------------------------------


@jit
def send_gradient(x, g, s, h):
    return (g,)


@jit
def update_psgd(x, g, s, pull, h):
    return x - h.lr * (g + pull[0] + h.weight_decay * x), ()


psgd = Rule("psgd", send_gradient, update_psgd, average="gradient")


@jit
def update_pmsgd(x, g, s, pull, h):
    m = h.momentum * s.momentum_buffer + (g + pull[0] + h.weight_decay * x)
    return x - h.lr * m, (m,)


pmsgd = Rule("pmsgd", send_gradient, update_pmsgd, ("momentum_buffer",), average="gradient")


# -- Gossip ----------------------------------------------------------------------------------------------------------


@jit
def send_descended(x, g, s, h):
    """x - lr g: what DSGD and DecentLaM send."""
    return (x - h.lr * (g + h.weight_decay * x),)


@jit
def update_dsgd(x, g, s, pull, h):
    return x - h.lr * (g + h.weight_decay * x) + pull[0], ()


dsgd = Rule("dsgd", send_descended, update_dsgd)


@jit
def send_momentum_step(x, g, s, h):
    """x - lr u with u = beta m + g: what DmSGD, QG-DmSGD and PC-DmSGD send."""
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return (x - h.lr * u,)


@jit
def update_dmsgd(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * u + pull[0], (u,)


dmsgd = Rule("dmsgd", send_momentum_step, update_dmsgd, ("momentum_buffer",))


@jit
def send_da_dmsgd(x, g, s, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * u, u


@jit
def update_da_dmsgd(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * u + pull[0], (u + pull[1],)


da_dmsgd = Rule("da-dmsgd", send_da_dmsgd, update_da_dmsgd, ("momentum_buffer",))

awc_dmsgd = Rule("awc-dmsgd", send_parameter, update_dmsgd, ("momentum_buffer",))


@jit
def update_qg_dmsgd(x, g, s, pull, h):
    # The displacement d = pull - lr u, filtered in gradient units: m' = mu m - (1 - mu) d / lr.
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    m = h.mu * s.momentum_buffer + (h.one_minus_mu * u - h.pull_rate * pull[0])
    return x - h.lr * u + pull[0], (m,)


def derive_qg_dmsgd(h: dict, memory: dict) -> dict:
    one_minus_mu = 1.0 - h["mu"]
    return {"one_minus_mu": one_minus_mu, "pull_rate": one_minus_mu * inverse_lr(h, memory)}


qg_dmsgd = Rule(
    "qg-dmsgd",
    send_momentum_step,
    update_qg_dmsgd,
    ("momentum_buffer",),
    hyper={"mu": lambda momentum, rho: momentum},
    derive=derive_qg_dmsgd,
)


@jit
def update_decentlam(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * u + pull[0], (u - h.inverse_lr * pull[0],)


decentlam = Rule(
    "decentlam",
    send_descended,
    update_decentlam,
    ("momentum_buffer",),
    derive=derive_inverse_lr,
)


# -- PC-DmSGD, ours --------------------------------------------------------------------------------------------------


@jit
def update_pc_dmsgd(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    p = h.leak * s.correction_buffer + h.correction * pull[0]
    return x - h.lr * u + pull[0], (u - p, p)


def auto_correction_rate(momentum: float, rho: float) -> float:
    """The correction rate e = min{(1-beta)/10, (1-beta)^2, (1-beta)(1-rho)} that `correction_rate="auto"` takes."""
    return min((1 - momentum) / 10, (1 - momentum) ** 2, (1 - momentum) * (1 - rho))


def derive_pc_dmsgd(h: dict, memory: dict) -> dict:
    """leak = 1 - e/kappa and correction = e/den, den = max(lr, G, largest lr / 100), G a running mean of lr.

    The mean keeps learning rates that toggle every few steps bounded; the floor keeps a warm restart from a tiny
    rate bounded. 0 while den = 0.
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
    hyper={"correction_rate": auto_correction_rate, "correction_gain": 10.0},
    derive=derive_pc_dmsgd,
    centered=("correction_buffer",),
)
