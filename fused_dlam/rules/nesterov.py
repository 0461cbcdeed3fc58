"""Nesterov's form of five methods, as torch.optim.SGD(nesterov=True) has it.

The step is g + beta u in the place of u = beta m + g. Letters as in momentum.py. The name of such a method is
"nesterov-" and the method's own, as in "nesterov-dmsgd". State buffers, hyper-parameters and bounds are the method's
own too.
"""

from __future__ import annotations

from .jit import jit
from .momentum import derive_qg_dmsgd, qg_dmsgd, send_gradient
from .pc_dmsgd import derive_pc_dmsgd, pc_dmsgd
from .rule import Rule, send_parameter


@jit
def update_nesterov_pmsgd(x, g, s, pull, h):
    g = g + pull[0] + h.weight_decay * x
    m = h.momentum * s.momentum_buffer + g
    return x - h.lr * (g + h.momentum * m), (m,)


nesterov_pmsgd = Rule("nesterov-pmsgd", send_gradient, update_nesterov_pmsgd, ("momentum_buffer",), average="gradient")


@jit
def send_nesterov_step(x, g, s, h):
    g = g + h.weight_decay * x
    u = h.momentum * s.momentum_buffer + g
    return (x - h.lr * (g + h.momentum * u),)


@jit
def update_nesterov_dmsgd(x, g, s, pull, h):
    g = g + h.weight_decay * x
    u = h.momentum * s.momentum_buffer + g
    return x - h.lr * (g + h.momentum * u) + pull[0], (u,)


nesterov_dmsgd = Rule("nesterov-dmsgd", send_nesterov_step, update_nesterov_dmsgd, ("momentum_buffer",))
nesterov_awc_dmsgd = Rule("nesterov-awc-dmsgd", send_parameter, update_nesterov_dmsgd, ("momentum_buffer",))


@jit
def update_nesterov_qg_dmsgd(x, g, s, pull, h):
    g = g + h.weight_decay * x
    step = g + h.momentum * (h.momentum * s.momentum_buffer + g)
    m = h.mu * s.momentum_buffer + (h.one_minus_mu * step - h.pull_rate * pull[0])
    return x - h.lr * step + pull[0], (m,)


# The lookahead enters the displacement that the momentum filters, as in the code of Lin et al. 2021.
nesterov_qg_dmsgd = Rule(
    "nesterov-qg-dmsgd",
    send_nesterov_step,
    update_nesterov_qg_dmsgd,
    ("momentum_buffer",),
    hyper=qg_dmsgd.hyper,
    derive=derive_qg_dmsgd,
)


@jit
def update_nesterov_pc_dmsgd(x, g, s, pull, h):
    g = g + h.weight_decay * x
    u = h.momentum * s.momentum_buffer + g
    p = h.leak * s.correction_buffer + h.correction * pull[0]
    return x - h.lr * (g + h.momentum * u) + pull[0], (u - p, p)


# The correction acts on the momentum as in PC-DmSGD. So the workers' mean is Nesterov SGD on the mean gradient.
nesterov_pc_dmsgd = Rule(
    "nesterov-pc-dmsgd",
    send_nesterov_step,
    update_nesterov_pc_dmsgd,
    ("momentum_buffer", "correction_buffer"),
    hyper=pc_dmsgd.hyper,
    derive=derive_pc_dmsgd,
    centered=("correction_buffer",),
)
