"""What the tests of the CPU passes share: rules of a user's own, random buffers, and the rule's text as the oracle."""

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from fused_dlam import Rule, jit, rules
from fused_dlam.kernels import numba_passes
from fused_dlam.kernels.numba_passes import NumbaPasses
from fused_dlam.kernels.torch_passes import TorchPasses
from fused_dlam.rules.scalars import Scalars

needs_numba = pytest.mark.skipif(not numba_passes.available(), reason="needs numba")
both = pytest.mark.parametrize("backend", [TorchPasses, pytest.param(NumbaPasses, marks=needs_numba)])
F, D, B, H = torch.float32, torch.float64, torch.bfloat16, torch.float16
# (parameters and state, gradient, messages)
TYPES = {"fff": (F, F, F), "fbb": (F, B, B), "ffb": (F, F, B), "fhf": (F, H, F), "ddd": (D, D, D), "dfb": (D, F, B)}
AWC = rules.decentlam.under("awc")


# -- Rules of a user's own: the forms that the built-in ones do not have ---------------------------------------------


@jit
def send_quotient(x, g, s, h):
    return x - h.lr / (h.momentum + h.lr) * g / h.scale, -g / h.lr + s.a


@jit
def update_quotient(x, g, s, pull, h):
    a = h.lr * h.momentum * s.a - g * pull[1] / (h.scale + s.b * s.b)
    return h.momentum - a + pull[0], (a, h.lr / (h.scale + a * a))


@jit
def send_state(x, g, s, h):
    return s.a, s.a


@jit
def update_hand_on(x, g, s, pull, h):
    return s.b, (s.b, s.a + pull[0], s.c, x)


quotient = Rule("quotient", send_quotient, update_quotient, ("a", "b"), hyper={"scale": 2.0})
hand_on = Rule("hand-on", send_state, update_hand_on, ("a", "b", "c", "e"))


# -- The oracle ------------------------------------------------------------------------------------------------------


def sqrt_rounded_once():
    """torch's own is MKL's on CPUs, off by a rounding for every fifth value of float32."""
    return patch.object(torch.Tensor, "sqrt", lambda v: torch.from_numpy(np.sqrt(v.numpy())))


def problem(rule, n, d, types=TYPES["fff"], scale=1.0, seed=0):
    """Random buffers of a worker with d neighbors. The weights do not sum to one: nothing may rely on it."""
    master, gradient, wire = types
    random = torch.Generator().manual_seed(seed)

    def values(*shape, dtype=master):
        return torch.randn(*shape, generator=random, dtype=D).to(dtype)

    return SimpleNamespace(
        rule=rule,
        x=values(n),
        g=values(n, dtype=gradient),
        state=tuple(values(n).square() if name.endswith("sq") else values(n) for name in rule.state),
        messages=torch.full((rule.messages, n), torch.nan, dtype=wire),
        received=values(d, rule.messages, n, dtype=wire),
        scalars=Scalars(
            rule.scalars(lr=0.1, momentum=0.9, weight_decay=0.01, rho=0.5),
            tuple(0.3 / (k + 1) for k in range(d)),
            scale,
        ),
    )


def run(backend, p):
    """(messages, x', state'): what the passes make of copies of the buffers of p."""
    passes = backend(p.rule)
    passes.set(p.scalars)
    x, state, messages = p.x.clone(), tuple(t.clone() for t in p.state), p.messages.clone()
    passes.pack(x, p.g, state, messages)
    assert torch.equal(x, p.x), "pack must not touch the parameters"
    passes.combine(x, p.g, state, p.received)
    return messages, x, state


def text(p, dtype, messages=None, guard=False):
    """The same by the rule's text, operation by operation, in the given type; `messages`: take these as sent."""

    def finite(value):
        return torch.where(value.abs() <= torch.finfo(p.x.dtype).max, value, 0.0) if guard else value

    h, weights, scale, _ = p.scalars
    x, state = p.x.to(dtype), p.rule.State(*(t.to(dtype) for t in p.state))
    g = finite(p.g.to(dtype) if scale == 1.0 else p.g.to(dtype) * scale)
    with sqrt_rounded_once():
        own = p.rule.send.fn(x, g, state, h)
    sent = torch.stack(own).to(p.messages.dtype) if messages is None else messages
    pull = [0.0] * p.rule.messages
    for k in range(p.rule.messages if weights else 0):
        parts = [finite(r[k].to(dtype) - sent[k].to(dtype)) * w for r, w in zip(p.received, weights, strict=True)]
        pull[k] = sum(parts[1:], parts[0])
    with sqrt_rounded_once():
        new_x, new_state = p.rule.update.fn(x, g, state, tuple(pull), h)
    return own, new_x, new_state


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip((a[0], a[1], *a[2]), (b[0], b[1], *b[2]), strict=True))


def check_against_float64(backend, p):
    messages, x, state = run(backend, p)
    own, exact_x, exact_state = text(p, D, messages)
    values = torch.cat([t.flatten().to(D) for t in (p.x, *own, exact_x, *exact_state, p.received, torch.ones(1))])
    roundings = 16 * torch.finfo(p.x.dtype).eps * float(values.abs().max())
    for got, exact in zip((x, *state), (exact_x, *exact_state), strict=True):
        torch.testing.assert_close(got.to(D), exact, rtol=0, atol=roundings)
    for got, exact in zip(messages, own, strict=True):
        torch.testing.assert_close(got.to(D), exact, rtol=torch.finfo(got.dtype).eps, atol=roundings)
