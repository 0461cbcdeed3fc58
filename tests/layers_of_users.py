"""Layers, topologies and rules as a user would write them. They are in a module, so that worker processes find them."""

from dataclasses import dataclass

import torch

from fused_dlam import Rule, jit, topology
from fused_dlam.layers import Layer
from fused_dlam.rules import Hyper


@dataclass(frozen=True)
class Lookahead(Layer):
    """Every `every` steps each worker goes back half of the way it went since (Zhang et al. 2019)."""

    every: int = 3
    state = {"slow_weights": "x"}

    def after(self, b, group, step, mean):
        if (step + 1) % self.every == 0:
            slow = b.extra["slow_weights"]
            slow.lerp_(b.x, 0.5)
            b.x.copy_(slow)


@dataclass(frozen=True)
class SignedGradient(Layer):
    """The sign of the gradient, times a setting of the group."""

    strength: float = 0.1

    @property
    def settings(self):
        return {"sign_strength": self.strength}

    def check(self, group):
        if not group["sign_strength"] >= 0:
            raise ValueError(f"Invalid sign_strength: {group['sign_strength']}")

    def finishes(self, group):
        return True

    def before(self, b, active, group, step, scale):
        for slot, now in zip(b.slots, active, strict=True):
            if now:
                g = b.g[slot.span]
                g.copy_(torch.sign(g * scale + group["weight_decay"] * b.x[slot.span]) * group["sign_strength"])


def spaced(n, every=1, exact=None, name="one-peer-exponential"):
    """A topology with local steps, and with exact averages."""
    graph = topology.get(name, n).every(every)
    return graph if exact is None else graph.with_global_average(exact)


@jit
def send(x, g, s, h):
    return (x - h.lr * h.beta2 * g,)


@jit
def update(x, g, s, pull, h):
    return x - h.lr * h.beta2 * g + pull[0], ()


#: Hyper-parameters whose names other methods use as well, with bounds of its own, or none.
borrowed_names = Rule("borrowed-names", send, update, hyper={"beta2": 2.0, "mu": Hyper(5.0, at_least=4.0), "eps": -1.0})
