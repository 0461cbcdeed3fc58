"""The momentum SGD methods of the literature, two equations each. PC-DmSGD is in pc_dmsgd.py.

Letters: x parameter, g gradient, m momentum (in gradient units), p correction, u the momentum step, W mixing matrix,
lr (gamma) learning rate, beta momentum. Weight decay is coupled, as in torch.optim.SGD. All buffers start at zero.

`x + pull` is the weighted average of the workers' messages where x stands for the own message. The equations use
displacements (pull) in the place of averages for two reasons. Rounding: after 2,000 float32 steps DecentLaM's error
against float64 is 4.0e-7 this way and 5.3e-4 the other. And workers that are equal stay bit-equal.
"""

from __future__ import annotations

from .hyper import Hyper
from .jit import jit
from .rule import Rule, send_parameter
from .scalars import Scalar, largest, ratio


def inverse_lr(h: dict, memory: dict) -> Scalar:
    """1/lr with a guard: 1/max(lr, largest lr so far / 100), and 0 where lr = 0.

    The guard bounds it, because 1/lr alone would replay disagreement and rounding 1e4-fold when a schedule restarts
    from lr = 1e-6.
    """
    lr = h["lr"]
    memory["lr_max"] = largest(memory.get("lr_max", 0.0), lr)
    return ratio(1.0, largest(lr, memory["lr_max"] / 100), where=lr)


def derive_inverse_lr(h: dict, memory: dict) -> dict:
    return {"inverse_lr": inverse_lr(h, memory)}


# -- Exact averaging by all-reduce: what the others are compared with --------------------------------------------------


@jit
def send_gradient(x, g, s, h):
    return (g,)


@jit
def update_psgd(x, g, s, pull, h):
    return x - h.lr * (g + pull[0] + h.weight_decay * x), ()


# x' = x - lr J g: SGD on the mean gradient.
psgd = Rule("psgd", send_gradient, update_psgd, average="gradient")


@jit
def update_pmsgd(x, g, s, pull, h):
    m = h.momentum * s.momentum_buffer + (g + pull[0] + h.weight_decay * x)
    return x - h.lr * m, (m,)


# m' = beta m + J g, x' = x - lr m': torch.optim.SGD with momentum, on the mean gradient.
pmsgd = Rule("pmsgd", send_gradient, update_pmsgd, ("momentum_buffer",), average="gradient")


# -- Gossip ------------------------------------------------------------------------------------------------------------


@jit
def send_descended(x, g, s, h):
    """x - lr g: what DSGD and DecentLaM send."""
    return (x - h.lr * (g + h.weight_decay * x),)


@jit
def update_dsgd(x, g, s, pull, h):
    return x - h.lr * (g + h.weight_decay * x) + pull[0], ()


# x' = W (x - lr g). Lopes and Sayed 2008; Yuan, Ling and Yin 2016.
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


# m' = beta m + g, x' = W (x - lr m'): the momentum is the worker's own. Assran et al. 2019; Yuan et al. 2021.
dmsgd = Rule("dmsgd", send_momentum_step, update_dmsgd, ("momentum_buffer",))


@jit
def send_da_dmsgd(x, g, s, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * u, u


@jit
def update_da_dmsgd(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * u + pull[0], (u + pull[1],)


# x' = W (x - lr u), m' = W u: the momentum is averaged too, by a second message. Yu, Jin and Yang 2019.
da_dmsgd = Rule("da-dmsgd", send_da_dmsgd, update_da_dmsgd, ("momentum_buffer",))

# m' = beta m + g, x' = W x - lr m': DmSGD under the adapt-while-communicating schedule. Balu et al. 2020.
awc_dmsgd = Rule("awc-dmsgd", send_parameter, update_dmsgd, ("momentum_buffer",))


@jit
def update_qg_dmsgd(x, g, s, pull, h):
    # m' = mu m - (1 - mu) d / lr with d = pull - lr u: the momentum is a running mean of the worker's displacements.
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    m = h.mu * s.momentum_buffer + (h.one_minus_mu * u - h.pull_rate * pull[0])
    return x - h.lr * u + pull[0], (m,)


def derive_qg_dmsgd(h: dict, memory: dict) -> dict:
    one_minus_mu = 1.0 - h["mu"]
    return {"one_minus_mu": one_minus_mu, "pull_rate": one_minus_mu * inverse_lr(h, memory)}


# Quasi-global momentum (Lin et al. 2021). By default mu is beta, as in their code.
qg_dmsgd = Rule(
    "qg-dmsgd",
    send_momentum_step,
    update_qg_dmsgd,
    ("momentum_buffer",),
    hyper={"mu": Hyper(lambda momentum, rho: momentum, at_least=0, below=1)},
    derive=derive_qg_dmsgd,
)


@jit
def update_decentlam(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * u + pull[0], (u - h.inverse_lr * pull[0],)


# x^{k+1} = W (x^k - lr g^k) + beta (x^k - x^{k-1}) at a constant rate (Yuan et al., ICCV 2021, for symmetric W).
decentlam = Rule("decentlam", send_descended, update_decentlam, ("momentum_buffer",), derive=derive_inverse_lr)
