"""A parameter without a gradient takes no local step: it is averaged, and nothing else.

Yet what it sends pulls at its neighbors, and theirs at it. Buffers whose sum over the workers is zero (`Rule.centered`)
take their share of that pull here too. If only the neighbors' did, the sum would be off for ever: one missing gradient
in step 3 of 1,000 left D2 and gradient tracking 18 % off the optimum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .engine import Engine
    from .flight import Flight


def average(engine: Engine, flight: Flight, span: slice) -> None:
    """x and the centered buffers of a run of parameters take the neighbors' pull; the other buffers stay.

    The rule's own update tells how: at x = 0 without gradient and state, x' is what the pull makes of x (exact
    diffusion takes half of it); with the centered buffers, the new ones are the old ones and their part of the pull. A
    correction that leaks does so on all workers, in steps without an exchange too. Where masses change, what was sent
    of the weight decay of x counts: it is taken at x itself.
    """
    b, rule = flight.b, engine.rule
    x, wide = b.x[span], b.x.dtype
    sent = x.new_zeros(rule.messages, len(x)) if flight.message is None else flight.message[:, span].to(wide)
    pull = torch.zeros_like(sent)
    for k, w in enumerate(flight.peers.weights if flight.peers.sources else ()):
        pulled = flight.received[k, :, span].to(wide) - sent
        if engine.guard:
            pulled = torch.nan_to_num(pulled, nan=0.0, posinf=0.0, neginf=0.0)
        pull += w * pulled
    zero = torch.zeros_like(x)
    kept = [name in rule.centered for name in rule.state]
    old = [t[span] if keep else zero for t, keep in zip(b.state, kept, strict=True)]
    h = engine.local.scalars_of(b).h
    at = x.clone() if rule.mass else zero
    x += rule.update.fn(zero, zero, rule.State(*(zero for _ in old)), tuple(pull), h)[0]
    if engine.skipped or not any(kept):  # skipped on all workers: nobody's buffers take it
        return
    _, new = rule.update.fn(at, zero, rule.State(*old), tuple(pull), h)
    for t, value, keep in zip(b.state, new, kept, strict=True):
        if keep:
            t[span].copy_(value)
