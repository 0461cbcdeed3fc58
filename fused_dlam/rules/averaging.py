"""Averaging alone, for parameters that another optimizer steps: x' = x + pull, that is W times what was sent.

Adapt then combine sends x after the inner optimizer's step: x' = W x. Adapt while communicating sends x before the
step d is known, x' = W x + d: x has moved on to x + d when the messages are there, so the worker keeps what it sent
in a buffer, and pull is taken of that.
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
