"""What the tests of the Triton kernels on the CPU share: all rules, and random buffers."""

import os

import numpy as np
import pytest
import torch

import fused_dlam
from fused_dlam import rules
from fused_dlam.rules.averaging import mix_ahead
from fused_dlam.rules.scalars import Scalars

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_a_process_of_its_own starts")


# -- A rule of ten lines outside the package: DmSGD that also mixes a running mean of what it sent ---------------------


@fused_dlam.jit
def send_blend(x, g, s, h):
    return x - h.lr * (g + h.weight_decay * x), s.mean


@fused_dlam.jit
def update_blend(x, g, s, pull, h):
    m = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    return x - h.lr * m + pull[0], (m, h.keep * s.mean + h.blend * (x + pull[1]))


blend = fused_dlam.Rule(
    "blend", send_blend, update_blend, ("momentum_buffer", "mean"), hyper={"keep": 0.75, "blend": 0.25}
)

# ----------------------------------------------------------------------------------------------------------------------

RULES = [*rules.ALL.values(), blend, mix_ahead, rules.dmsgd.under("midpoint"), rules.adamw.under("midpoint")]
for rule in list(RULES):
    try:
        if rule.schedule != "awc" and rule.under("awc").name not in (r.name for r in RULES if r.schedule == "awc"):
            RULES.append(rule.under("awc"))
    except ValueError:
        pass
RULES += [rules.mi_dmsgd.outer(), rules.mi_dmsgd.under("awc").outer()]
IDS = [f"{rule.name}-{rule.schedule}{'-outer' * rule.traveled}" for rule in RULES]

WEIGHTS = (0.3, 0.1, 0.2, 0.05, 0.15, 0.125)
TYPES = (torch.float32, torch.bfloat16)
GUARD = 7.0  # beyond the buffers, and must stay


class Problem:
    """Random buffers of one length; `run` gives the results of pack and combine as float64 copies."""

    def __init__(self, rule, n, d, message=torch.float32, gradient=torch.float32, seed=0):
        torch.manual_seed(seed)
        self.rule, self.n, self.d = rule, n, d
        self.x, self.g = torch.randn(n), torch.randn(n).to(gradient)
        self.state = tuple(torch.randn(n).square() if name.endswith("sq") else torch.randn(n) for name in rule.state)
        self.received = torch.randn(d, rule.messages, n).to(message)
        self.scalars = Scalars(rule.scalars(0.125, 0.9, 0.01, rho=0.5), WEIGHTS[:d], 0.5)
        self.message = message

    def passes(self):
        from fused_dlam.kernels.triton_passes import TritonPasses

        passes = TritonPasses(self.rule, "cpu", block=2048)  # half as many programs: each costs milliseconds
        passes.set(self.scalars)
        return passes

    def pack(self, passes):
        messages = torch.full((self.rule.messages, self.n + 8), GUARD, dtype=self.message)
        passes.pack(self.x, self.g, self.state, messages[:, : self.n])
        assert (messages[:, self.n :] == GUARD).all()
        return messages[:, : self.n]

    def combine(self, passes, received=None, **more):
        buffers = [torch.cat((t, torch.full((8,), GUARD))) for t in (self.x, *self.state)]
        x, *state = (t[: self.n] for t in buffers)
        passes.combine(x, self.g, tuple(state), self.received if received is None else received, **more)
        assert all((t[self.n :] == GUARD).all() for t in buffers)
        return [x, *state]

    def exact(self, own):
        """float64: the messages, the new x and state, and the size of the numbers that were added up."""
        rule, s = self.rule, self.scalars
        h = rule.H(*(float(np.float32(v)) for v in s.h))
        x, g = self.x.double(), self.g.double()
        if rule.traveled:  # from x as it lay in the type of the parameters
            g = self.x.to(self.g.dtype).double() - g
        g = g * s.grad_scale
        state = rule.State(*(t.double() for t in self.state))
        weights = torch.tensor(s.weights, dtype=torch.float32).double().view(-1, 1, 1)
        pull = (weights * (self.received.double() - own.double())).sum(0)
        new_x, new_s = rule.update.fn(x, g, state, tuple(pull), h)
        sent = rule.send.fn(x, g, state, h)
        size = max(1.0, *(float(t.abs().max()) for t in (x, g, *state, *sent, new_x, *new_s)))
        return sent, [new_x, *new_s], size
