"""One small launch of a rule's passes, and how far it is from what float64 makes of the same numbers.

The cases are those that the section `compile` builds and the section `kernels` checks: one list, so that nothing is
built while something else is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fused_dlam import rules
from fused_dlam.kernels.gate.floor import pack_floor
from fused_dlam.kernels.triton_passes import TritonPasses
from fused_dlam.rules.averaging import mix, mix_ahead
from fused_dlam.rules.rule import Rule
from fused_dlam.rules.scalars import Scalars

from .device import DEVICE, SMOKE

AWC = tuple(n for n in ("decentlam", "pc-dmsgd", "mi-dmsgd", "nesterov-pc-dmsgd", "adamw") if n in rules.ALL)
#: Types of gradient and messages.
PAIRS = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"))
#: Of each (length, offset) Triton builds a kernel of its own but for 127, 1025 and 40,003: filled blocks, a mask, one
#: element (a constant then), and addresses that are no multiple of 16.
LENGTHS = ((4096, 0), (127, 0), (1025, 0), (40_003, 0))
ODD = ((1, 0), (1031, 1))
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a unit in the last place
GUARD = 16  # elements around a buffer that must stay as they are


class Case(NamedTuple):
    name: str
    d: int
    grad: str
    wire: str

    @property
    def rule(self) -> Rule:
        name, _, schedule = self.name.partition(" ")
        rule = {"mix": mix, "mix-ahead": mix_ahead}.get(name) or rules.ALL[name]
        return rule.under("awc") if schedule else rule

    def lengths(self) -> tuple[tuple[int, int], ...]:
        return LENGTHS + (ODD if self.d == 1 and self.grad == "float32" else ())


def cases() -> Iterator[Case]:
    """Every rule; all numbers of neighbors with full and half messages, one with half gradients."""
    for name in (*rules.ALL, "mix", "mix-ahead", *(f"{n} awc" for n in AWC)):
        for grad, wire in PAIRS:
            for d in (0, 1, 2, 3, 5) if grad == "float32" else (1,):
                if d or wire == "float32":  # without neighbors there is no message in combine
                    yield Case(name, d, grad, wire)


class Trial:
    """Random buffers of one case. Second moments are squares, as an optimizer's are: a negative one has no root."""

    def __init__(self, case: Case, n: int, offset: int = 0, seed: int = 0):
        self.case, self.rule, self.n, self.offset = case, case.rule, n, offset
        self._generator = torch.Generator(device=DEVICE).manual_seed(1000 * n + seed)
        self._whole: list[torch.Tensor] = []
        grad, wire, d = getattr(torch, case.grad), getattr(torch, case.wire), case.d
        self.x, self.g = self.draw(), self.draw(grad)
        self.state = tuple(self.draw(square=name.endswith("_sq")) for name in self.rule.state)
        self.messages = tuple(self.draw(wire) for _ in range(self.rule.messages))
        self.received = tuple(tuple(self.draw(wire) for _ in range(self.rule.messages)) for _ in range(d))
        # What the rule need not be given: a rate and a scale whose products are exact, weights that are not equal.
        weights = tuple(0.6 * 2 * (k + 1) / (d * (d + 1)) for k in range(d))
        self.scalars = Scalars(self.rule.scalars(0.125, 0.9, 0.01, 0.5), weights, 0.5)
        self.fused = TritonPasses(self.rule, DEVICE)
        self.fused.set(self.scalars)

    def draw(self, dtype: torch.dtype = torch.float32, square: bool = False) -> torch.Tensor:
        whole = torch.full((self.offset + self.n + GUARD,), 7.0, dtype=dtype, device=DEVICE)
        inside = whole[self.offset : self.offset + self.n]
        values = torch.randn(self.n, generator=self._generator, device=DEVICE)
        inside.copy_(values.square() if square else values)
        self._whole.append(whole)
        return inside

    def pack(self) -> None:
        self.fused.pack(self.x, self.g, self.state, self.messages)

    def combine(self, copies: tuple[torch.Tensor, ...] = ()) -> None:
        self.fused.combine(self.x, self.g, self.state, self.received, **({"copies": copies} if copies else {}))

    @property
    def limits(self) -> tuple[float, float]:
        """Roundings of float32 that messages and results may be off by: more where there is a division or a root."""
        divides = pack_floor(self.rule, "fp32", "fp32").divisions > 0
        return (8.0, 10.0) if divides else (2.0, 6.0)

    def errors(self) -> tuple[float, float, bool]:
        """(messages, results, nothing else written): what is off, as a share of the limit.

        A message may be off by the roundings of float32 and one to its own type; the interpreter cuts bfloat16 off
        where a GPU rounds to nearest. The pull is taken of the message as it was sent: had combine recomputed
        another, results would be off by a step of bfloat16.
        """
        double, s = torch.float64, self.scalars
        h = self.rule.H(*(float(torch.tensor(v, dtype=torch.float32)) for v in s.h))
        w = [float(torch.tensor(v, dtype=torch.float32)) for v in s.weights]
        x, g = self.x.to(double), self.g.to(double) * s.grad_scale
        state = self.rule.State(*(t.to(double) for t in self.state))
        sent = self.rule.send.fn(x, g, state, h)
        self.pack()
        q = [m.to(double) for m in self.messages]
        rows = [[r.to(double) for r in row] for row in self.received]
        zero = torch.zeros_like(x)
        pull = tuple(sum((w[j] * (rows[j][m] - q[m]) for j in range(len(w))), zero) for m in range(len(q)))
        new_x, new_state = self.rule.update.fn(x, g, state, pull, h)
        self.combine()
        wanted = (new_x, *new_state)
        size = max(1.0, *(float(t.abs().max()) for t in (x, g, *state, *sent, *wanted)))
        message, result = self.limits
        unit = UNIT[self.case.wire] * (2.0 if SMOKE else 1.0)
        off = []
        for got, y in zip(q, sent, strict=True):
            allowed = message * UNIT["float32"] * size + (unit * y.abs() if self.case.wire != "float32" else 0.0)
            off.append(float(((got - y).abs() / allowed).max()))
        ends = [
            float((got.to(double) - y).abs().max()) / (result * UNIT["float32"] * size)
            for got, y in zip((self.x, *self.state), wanted, strict=True)
        ]
        return max(off), max(ends), self.untouched()

    def untouched(self) -> bool:
        """Whether what lies around the buffers is as it was."""
        end = self.offset + self.n
        return all(bool((t[: self.offset] == 7).all() and (t[end:] == 7).all()) for t in self._whole)
