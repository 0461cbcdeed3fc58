"""Averaging alone, for parameters that another optimizer steps: x' = x + pull, which is W times what was sent.

`mix` is adapt then combine: x is sent after the inner optimizer's step, and x' = W x.

`mix_ahead` is adapt while communicating: x is sent before the inner optimizer's step d is known, and x' = W x + d. When
the messages arrive x has become x + d. So the worker keeps what it sent in a buffer, and pull is relative to that.

`mix_halfway` is the midpoint of both: x + d/2 is sent, and x' = W (x + d/2) + d/2. The worker keeps the x of before.

These belong to the optimizer `Gossip`; they are not methods, so `rules.ALL` does not have them.
"""

from __future__ import annotations

from .jit import jit
from .rule import Rule, send_parameter


@jit
def update_mix(x, g, s, pull, h):
    return x + pull[0], ()


mix = Rule("gossip", send_parameter, update_mix)


@jit
def send_sent(x, g, s, h):
    return (s.sent,)


@jit
def update_mix_ahead(x, g, s, pull, h):
    return x + pull[0], (x + pull[0],)


mix_ahead = Rule("gossip", send_sent, update_mix_ahead, ("sent",))


@jit
def send_halfway(x, g, s, h):
    return (h.half * (x + s.before),)


@jit
def update_mix_halfway(x, g, s, pull, h):
    return x + pull[0], (s.before,)


mix_halfway = Rule("gossip", send_halfway, update_mix_halfway, ("before",), derive=lambda h, memory: {"half": 0.5})
