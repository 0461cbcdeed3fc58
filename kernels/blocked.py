"""The reference passes: a rule's equations on torch tensors, over cache-sized blocks of flat buffers, in place."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .rule import Rule

# Elements per block: the block and its temporaries stay in cache. Naive operations on a whole flat buffer of 25.5M
# floats were 14 times slower (fresh 100 MB temporaries, page faults).
BLOCK = 1 << 17


class Scalars(NamedTuple):
    """What one step's passes need beside buffers."""

    h: tuple  # the rule's named tuple, see Rule.scalars
    weights: tuple[float, ...]  # one for each received message, in the order of `received`
    grad_scale: float = 1.0  # multiplies the gradient first: -1 maximizes, 1/loss scale unscales


class Blocked:
    """Runs anywhere torch runs: `set` the step's scalars, then `pack` and `combine` any number of buffers.

    Buffers are flat and of one length N: x and the tuple `state` in the master type, g in any floating type, messages
    [messages, N] and received [d, messages, N] in the type of the messages.
    """

    name = "torch"

    def __init__(self, rule: Rule):
        self.rule = rule
        self.scalars = Scalars((), ())

    def set(self, scalars: Scalars) -> None:
        self.scalars = scalars

    def pack(self, x, g, state, messages) -> None:
        """Writes this worker's messages."""
        rule, scalars = self.rule, self.scalars
        for b in _blocks(x):
            s = rule.State(*(t[b] for t in state))
            for out, y in zip(messages, rule.send.fn(x[b], _gradient(g[b], x, scalars), s, scalars.h), strict=True):
                out[b].copy_(y)

    def combine(self, x, g, state, received) -> None:
        """Updates x and state in place from the received messages, the first len(weights) of them."""
        rule, scalars, weights = self.rule, self.scalars, self.scalars.weights
        for b in _blocks(x):
            xb, gb, s = x[b], _gradient(g[b], x, scalars), rule.State(*(t[b] for t in state))
            if weights:
                own = rule.send.fn(xb, gb, s, scalars.h)
                pull = tuple(_pull(own[k], [r[k, b] for r in received], weights) for k in range(len(own)))
            else:
                pull = (0.0,) * rule.messages
            new = rule.update.fn(xb, gb, s, pull, scalars.h)
            # An equation may hand one buffer on as another (p' = m): take copies before anything is overwritten.
            new_s = [v.clone() if any(v is t for t in (xb, *s)) and v is not t0 else v for v, t0 in zip(new[1], s)]
            xb.copy_(new[0])
            for t, v in zip(s, new_s, strict=True):
                t.copy_(v)


def _blocks(x):
    return (slice(lo, lo + BLOCK) for lo in range(0, x.numel(), BLOCK))


def _gradient(g, x, scalars: Scalars):
    g = g.to(x.dtype)
    return g if scalars.grad_scale == 1.0 else g * scalars.grad_scale


def _pull(y, received, weights):
    """sum_k w_k (r_k - q), q being y as it was sent: rounded to the type of the messages."""
    q = y.to(received[0].dtype).to(y.dtype)
    pull = None
    for r, w in zip(received, weights, strict=False):
        t = (r.to(y.dtype) - q).mul_(w)
        pull = t if pull is None else pull.add_(t)
    return pull
