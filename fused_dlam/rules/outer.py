"""The outer methods of low-communication training that gossip: GASLoC and NoLoCo.

x is the anchor, where a round of inner steps begins, y where they end, and g = x - y the outer gradient (DiLoCo's
pseudo-gradient, in units of x). lr is the outer learning rate and beta the outer `momentum`. d is the displacement that
the momentum repeats: in units of x, as the papers have it, so that a schedule of lr leaves it alone. It starts at zero.
DiLoCo itself is `nesterov-pmsgd` on g; README.md says which other methods of the list are whose outer method.

    gasloc   z = x - lr g,  x' = W z + beta (z - z_prev)
    noloco   d' = beta d - lr W g + c (W x - x),  x' = x + d'

GASLoC (Cagnasso, Belilovsky and Oyallon 2026, arXiv 2606.11081) writes z - alpha Lambda z for W z, with the Laplacian
Lambda = I - W; alpha is the `gossip_rate`. Written with d = x - z_prev one buffer is enough, and z is the message:

    d' = alpha pull + beta (d - lr g),  x' = x - lr g + d'

At a constant rate its mean over the workers is torch's Nesterov SGD on the mean of g, that is DiLoCo's anchor, on every
doubly stochastic graph. Without gradients and at alpha = 1 it is W x + beta (x - x_prev), which is DecentLaM's map:
where the graph is directed or changes it is unstable at momenta at which other methods are not.

NoLoCo (Kolehmainen et al. 2025, arXiv 2506.10911) averages with one random worker, `topology.random_match`. W has 1/2
and 1/2 there; any graph goes. The paper sends g and x. They enter as c W (x - (lr/c) g) alone, so one message is
enough:

    send x - (lr/c) g,  d' = beta d - lr g + c pull,  x' = x + d'

c, the paper's gamma, is the `gossip_rate`. The authors' code has c = lr = 0.7, where the message is y itself, and beta
= 0.5. The momentum is the heavy ball's: with one worker and a constant rate this is torch.optim.SGD(momentum=beta).

Without gradients both are d' = beta d + r pull, x' = x + d' with r the `gossip_rate`. On random pairs of n workers, n
even, the mean square of the disagreement shrinks if and only if 0 < r < 2 (1 - beta^2) / (1 - beta/(n - 1)): for many
workers 1.5 at beta = 0.5 and 0.38 at 0.9 (exact, from the second moments of x and d; tests/rules/test_outer.py).
"""

from __future__ import annotations

from math import inf

from .hyper import Hyper
from .jit import jit
from .momentum import send_descended
from .rule import Rule


@jit
def update_gasloc(x, g, s, pull, h):
    step = h.lr * (g + h.weight_decay * x)
    d = h.gossip_rate * pull[0] + h.momentum * (s.displacement - step)
    return x - step + d, (d,)


gasloc = Rule(
    "gasloc",
    send_descended,
    update_gasloc,
    ("displacement",),
    hyper={"gossip_rate": Hyper(1.0, above=0, below=inf)},
)


@jit
def send_noloco(x, g, s, h):
    return (x - h.share * (g + h.weight_decay * x),)


@jit
def update_noloco(x, g, s, pull, h):
    d = h.momentum * s.displacement - h.lr * (g + h.weight_decay * x) + h.gossip_rate * pull[0]
    return x + d, (d,)


noloco = Rule(
    "noloco",
    send_noloco,
    update_noloco,
    ("displacement",),
    hyper={"gossip_rate": Hyper(0.7, above=0, below=inf)},
    derive=lambda h, memory: {"share": h["lr"] / h["gossip_rate"]},
)
