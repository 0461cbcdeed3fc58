"""The rule of fused_dlam/rules/README.md, as a user would write it: nothing of it is in the package."""

from fused_dlam import Rule, jit
from fused_dlam.rules import Hyper


@jit
def send(x, g, s, h):
    return (x - h.lr * (h.momentum * s.m + g),)


@jit
def update(x, g, s, pull, h):
    m = h.momentum * s.m + g
    return x - h.lr * (m + h.boost * g) + pull[0], (m,)


mine = Rule("mine", send, update, state=("m",), hyper={"boost": Hyper(0.1, at_least=0)})
