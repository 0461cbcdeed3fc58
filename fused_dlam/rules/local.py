"""Methods with local steps: they exchange where the topology has neighbors, e.g. `topology.ring(8).every(4)`.

Letters as in corrected.py; K is the number of steps in a round, the one that exchanges included, which the host counts
(`Rule(rounds=True)`). In the other steps every pull is zero, so the equations are those of one step. All three keep
c = 0 summed over the workers, and with momentum 0 they are as published; u stands where they have g.

    LED       phi = x - lr (u + c) in every step;  x' = W phi,    c' = c + (phi - x') / (K lr)     once a round
    ProxSkip  the same by chance p:                x' = W~ phi,   c' = c + p (phi - x') / lr,      W~ = (I+W)/2
    K-GT      the same phi;  x' = W phi,  c' = c + (W - I) z,  z the mean of the round's u + c

The first two are D2 and exact diffusion whose correction knows how many steps it is to correct.
"""

from __future__ import annotations

from .corrected import send_corrected, update_d2_dmsgd, update_exact_diffusion
from .hyper import Hyper
from .jit import jit
from .momentum import inverse_lr
from .rule import Rule
from .scalars import Scalar


def round_length(h: dict, memory: dict) -> Scalar:
    """K of the round that ends with this step, or else of the last one that has ended: a pull may come late."""
    steps = memory.get("steps since exchange", 0.0) + 1.0
    ended = steps if h["exchanges"] else memory.get("steps in round", 1.0)
    memory["steps since exchange"], memory["steps in round"] = 0.0 if h["exchanges"] else steps, ended
    return ended


# Local exact diffusion (Alghunaim 2024), its beta = 1/K: exact where lr is constant within a round. With one step in a
# round it is D2, so a symmetric static W needs eigenvalues above -1/3 there; `topology.lazy()` has none below 0, and
# makes exact diffusion of it.
led = Rule(
    "led",
    send_corrected,
    update_d2_dmsgd,
    ("momentum_buffer", "correction_buffer"),
    derive=lambda h, memory: {"inverse_lr": inverse_lr(h, memory) / round_length(h, memory)},
    centered=("correction_buffer",),
    rounds=True,
)


def derive_proxskip(h: dict, memory: dict) -> dict:
    return {"half": 0.5, "half_inverse_lr": 0.5 * h["probability"] * inverse_lr(h, memory)}


# ProxSkip, or Scaffnew (Mishchenko et al. 2022), decentralized with the W~ of exact diffusion (Guo et al. 2023 at
# chi = 1). Each step exchanges with a probability p that all ranks draw alike: `topology.sometimes(graph, p)`. With
# p = 1 it is exact diffusion.
proxskip = Rule(
    "proxskip",
    send_corrected,
    update_exact_diffusion,
    ("momentum_buffer", "correction_buffer"),
    hyper={"probability": Hyper(1.0, above=0, at_most=1)},
    derive=derive_proxskip,
    centered=("correction_buffer",),
)


@jit
def send_k_gt(x, g, s, h):
    d = h.momentum * s.momentum_buffer + (g + h.weight_decay * x) + s.correction_buffer
    return x - h.lr * d, h.inverse_round * (s.round_buffer + d)


@jit
def update_k_gt(x, g, s, pull, h):
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    d = u + s.correction_buffer
    return x - h.lr * d + pull[0], (u, s.correction_buffer + pull[1], h.goes_on * (s.round_buffer + d))


def derive_k_gt(h: dict, memory: dict) -> dict:
    return {"inverse_round": 1.0 / round_length(h, memory), "goes_on": 0.0 if h["exchanges"] else 1.0}


# K-GT (Liu, Lin, Koloskova and Stich 2024) at their eta_s = 1. With one step in a round c + g is the tracked gradient
# of gradient tracking. Their c starts at mean g - g, by an all-reduce; here at zero.
k_gt = Rule(
    "k-gt",
    send_k_gt,
    update_k_gt,
    ("momentum_buffer", "correction_buffer", "round_buffer"),
    derive=derive_k_gt,
    centered=("correction_buffer",),
    rounds=True,
)
