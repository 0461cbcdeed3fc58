"""Methods for graphs on which a worker divides what it has, and knows nothing of what others weigh.

Letters as in momentum.py. A is the graph, whose columns sum to one; w are the masses, w' = A w, which all ranks know
(topology/mass.py). The papers' variables are x, which A moves, and what the model computes with, z = x / w:

    push-sum      m' = beta m + g,  x' = A (x - lr m'),  w' = A w,  z' = x' / w'
    push-diging   the same with m' = beta m + y,  y' = A y + g' - g,  y_0 = g_0: what A moves is y too
    push-pull     m' = beta m + y,  z' = R (z - lr m'),  y as before

Here x is z, and averages are those of R = diag(1/w') A diag(w), whose rows sum to one: A x / w' = R z. So a message is
z - (lr/w) m', or y / w, and A y = w' R (y / w) = w' (y / w + pull). The sum of the papers' x over the workers,
sum_i w_i z_i, moves as all-reduce momentum SGD does; so a graph whose rows alone sum to one loses its bias too, with
the masses for which this sum stays. Where all masses are one these are DmSGD and gradient tracking, digit by digit.

Tracking keeps t = y - g as in corrected.py; it sums to zero over the workers.
"""

from __future__ import annotations

from .jit import jit
from .momentum import send_momentum_step, update_dmsgd
from .rule import Rule

# Stochastic gradient push (Assran et al., ICML 2019, algorithm 1), with the momentum of a worker's own gradients as in
# their experiments. The equations are DmSGD's: only the rate is the worker's own.
push_sum = Rule(
    "push-sum",
    send_momentum_step,
    update_dmsgd,
    ("momentum_buffer",),
    derive=lambda h, memory: {"lr": h["lr"] * h["inverse_mass"]},
    mass=("inverse_mass",),
)


@jit
def send_pushed(x, g, s, h):
    y = s.tracking_buffer + (g + h.weight_decay * x)
    m = h.momentum * s.momentum_buffer + y
    return x - h.lr * m, h.inverse_mass * y


@jit
def update_pushed(x, g, s, pull, h):
    g = g + h.weight_decay * x
    y = s.tracking_buffer + g
    m = h.momentum * s.momentum_buffer + y
    return x - h.lr * m + pull[0], (m, h.change * y - g + h.next_mass * pull[1])


def derive_push_pull(h: dict, memory: dict) -> dict:
    return {"change": h["next_mass"] * h["inverse_mass"]}


def derive_push_diging(h: dict, memory: dict) -> dict:
    return {**derive_push_pull(h, memory), "lr": h["lr"] * h["inverse_mass"]}


TRACKING = ("momentum_buffer", "tracking_buffer")
MASSES = ("inverse_mass", "next_mass")

# Push-DIGing (Nedic, Olshevsky and Shi 2017, algorithm 2): gradient tracking on graphs that change and are directed.
push_diging = Rule(
    "push-diging",
    send_pushed,
    update_pushed,
    TRACKING,
    derive=derive_push_diging,
    centered=("tracking_buffer",),
    mass=MASSES,
)

# Push-pull (Pu, Shi, Xu and Nedic 2021; Xin and Khan's AB, 2018): nothing is divided. R may be any matrix whose rows
# sum to one and C any whose columns do; here one graph has both, C = A and R = diag(1/w') A diag(w). What all agree on
# moves by lr sum_i w_i y_i / n: where y has settled, w_i mean(g), by mean(w^2) times what push-diging's does.
push_pull = Rule(
    "push-pull",
    send_pushed,
    update_pushed,
    TRACKING,
    derive=derive_push_pull,
    centered=("tracking_buffer",),
    mass=MASSES,
)
