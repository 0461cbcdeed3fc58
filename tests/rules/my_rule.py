"""The rule of README, as a user would write it: nothing of it is in the package."""

from fused_dlam import Rule, jit


@jit
def send(x, g, s, h):
    return (x - h.lr * (h.momentum * s.m + g),)


@jit
def update(x, g, s, pull, h):
    m = h.momentum * s.m + g
    return x - h.lr * (m + h.boost * g) + pull[0], (m,)


mine = Rule("mine", send, update, state=("m",), hyper={"boost": 0.1})
