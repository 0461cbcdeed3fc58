"""Methods that correct a worker's drag by what its neighbors tell: D2, exact diffusion, NIDS, EXTRA, and tracking.

Letters as in momentum.py. c is a correction in gradient units; it starts at zero and sums to zero over the workers.

The published forms keep the last x and the last g. Written with pulls one buffer is enough:

    D2        x' = W (x - lr (c + m)), c = (x_prev - x) / lr_prev - m_prev   becomes   c' = c - pull / lr
    tracking  y' = W y + g' - g, a tracked gradient                          becomes   t' = y + pull - g, y' = t' + g'

So c of D2 is an integral of the pull without a leak. Momentum 0 gives D2, exact diffusion, NIDS, EXTRA and gradient
tracking as published.
"""

from __future__ import annotations

from .jit import jit
from .momentum import derive_inverse_lr, inverse_lr
from .rule import Rule, send_parameter


@jit
def send_corrected(x, g, s, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return (x - h.lr * (u + s.correction_buffer),)


@jit
def update_d2_dmsgd(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    c = s.correction_buffer - h.inverse_lr * pull[0]
    return x - h.lr * (u + s.correction_buffer) + pull[0], (u, c)


# D2 (Tang et al., ICML 2018) with the momentum m in the place of the gradient. A symmetric static W needs every
# eigenvalue above -1/3; rings of an even number have one of exactly -1/3. Of the graphs of the package with 3, 4, 8,
# 12, 16, 25, 32 and 64 workers `consensus_growth` accepts, at momentum 0 and 0.9: full, star, odd rings,
# symmetric-exponential up to 32, od-equidyn up to 12 and at 25, exponential of 12, and of the others only some with 3
# or 4 workers. It is 1.2599 on one-peer-exponential 8 and 1.3660 on the hypercube of 8 (`fused-dlam topology NAME -n N`
# has both certificates). Where D2 is stable `rate_limit` is all-reduce's, 2 (1 + beta), for equal curvature.
d2_dmsgd = Rule(
    "d2-dmsgd",
    send_corrected,
    update_d2_dmsgd,
    ("momentum_buffer", "correction_buffer"),
    derive=derive_inverse_lr,
    centered=("correction_buffer",),
)


@jit
def update_exact_diffusion(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    c = s.correction_buffer - h.half_inverse_lr * pull[0]
    return x - h.lr * (u + s.correction_buffer) + h.half * pull[0], (u, c)


# Exact diffusion (Yuan et al. 2019) is D2 with the lazy (I + W)/2 in the place of W: half of every pull. With momentum
# it is EDM (Hu et al. 2025); momentum=0 is the original. On the graphs of the package with 3 to 64 workers
# `consensus_growth` says, at momentum 0.9 as at 0 (`fused-dlam topology NAME -n N` has both certificates):
#   accepted at every size: all symmetric static graphs, one-peer-ring, random-match, od-equidyn, ou-equidyn
#   accepted up to          8 workers: d-equistatic (12: 1.0424), inner-outer-exponential (12: 1.0398)
#                          12 workers: exponential (16: 1.0313)
#                          16 workers: one-peer-exponential (0.9911; 25: 1.0258), one-peer-hypercube (32: 1.0553)
#   base-k                 3, 4, 8 and 16 are accepted; 12: 1.0553, 25: 1.1330
#   refused                one-way-ring (8: 1.2557)
# Where it is accepted, `rate_limit` is all-reduce's, 3.80, for equal curvature: W's half is the midpoint. Exceptions at
# momentum 0.9 are 0.31 on one-peer-exponential 12 and 16, one-peer-hypercube 16 and base-k 16, where disagreement grows
# up to 1.01-fold per step between 0.31 and 0.46, and 0.65 on the one-peer-ring of 3.
exact_diffusion = Rule(
    "exact-diffusion",
    send_corrected,
    update_exact_diffusion,
    ("momentum_buffer", "correction_buffer"),
    derive=lambda h, memory: {"half": 0.5, "half_inverse_lr": 0.5 * inverse_lr(h, memory)},
    centered=("correction_buffer",),
)


# What a first step remembers is that there was one.
def derive_nids(h: dict, memory: dict) -> dict:
    half = 0.5 if "lr_max" in memory else 0.0
    return {"half": half, "half_inverse_lr": half * inverse_lr(h, memory)}


# NIDS (Li, Shi and Yan 2019) for a smooth loss and one learning rate: x'' = (I+W)/2 (2x' - x - lr (g' - g)), which is
# exact diffusion, from x' = x - lr g: in the first step nobody averages.
nids = Rule(
    "nids",
    send_corrected,
    update_exact_diffusion,
    ("momentum_buffer", "correction_buffer"),
    derive=derive_nids,
    centered=("correction_buffer",),
)

# EXTRA (Shi, Ling, Wu and Yin 2015) with their W~ = (I+W)/2: x' = W x - lr g + sum over the past of (W - W~) x. So it
# is D2 that sends x itself, and integrates half of the pull. A symmetric static W needs no more than eigenvalues above
# -1; its learning rates end where (1 + the smallest eigenvalue) / (the largest curvature) does, at momentum 0.
extra = Rule(
    "extra",
    send_parameter,
    update_d2_dmsgd,
    ("momentum_buffer", "correction_buffer"),
    derive=lambda h, memory: {"inverse_lr": 0.5 * inverse_lr(h, memory)},
    centered=("correction_buffer",),
)


@jit
def send_tracked(x, g, s, h):
    y = s.tracking_buffer + (g + h.weight_decay * x)
    m = h.momentum * s.momentum_buffer + y
    return x - h.lr * m, y


@jit
def update_gradient_tracking(x, g, s, pull, h):
    g = g + h.weight_decay * x
    y = s.tracking_buffer + g
    m = h.momentum * s.momentum_buffer + y
    return x - h.lr * m + pull[0], (m, y - g + pull[1])


# Gradient tracking with one exchange per step: x' = W (x - lr m), m = beta m_prev + y, y' = W y + g' - g, y_0 = g_0
# (Xu et al. 2015; Di Lorenzo and Scutari 2016; Nedic et al. 2017). Momentum acts on y as in the code of Lin et al.
# 2021. The variant y' = W (y + g' - g) (Aug-DGM, Xu et al. 2015; ATC-DIGing) needs two exchanges in turn, because the
# step uses the average: tests/theory/test_decent_bench.py has it as a rule that takes two steps for one.
gradient_tracking = Rule(
    "gradient-tracking",
    send_tracked,
    update_gradient_tracking,
    ("momentum_buffer", "tracking_buffer"),
    centered=("tracking_buffer",),
)


@jit
def send_momentum_tracking(x, g, s, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x, u - s.correction_buffer


@jit
def update_momentum_tracking(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    y = u - s.correction_buffer
    return x - h.lr * y + pull[0], (u, s.correction_buffer - pull[1])


# Momentum tracking (Takezawa et al., TMLR 2023): m' = beta m + g, x' = W x - lr (m' - c), c' = W (c - m') + m'. The
# paper starts m and c at (g_0 - mean g_0) / (1 - beta), by one all-reduce. Here they start at zero, like all buffers.
momentum_tracking = Rule(
    "momentum-tracking",
    send_momentum_tracking,
    update_momentum_tracking,
    ("momentum_buffer", "correction_buffer"),
    centered=("correction_buffer",),
)
