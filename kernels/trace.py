"""A rule's equations as a graph: the text runs once on symbols, and every + - * / and sqrt becomes a node.

`replay.py` turns the graph into torch operations. `gate/floor.py` counts the buffers at its ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ..rules.rule import Rule, named

Guard = Literal["", "before", "after"]


class Equations(NamedTuple):
    """What a graph depends on. Two rules with the same text and the same names share it."""

    send: Callable
    update: Callable
    state: tuple[str, ...]
    fields: tuple[str, ...]  # of h
    messages: int
    halfway: bool  # the message is h.theta (x + send)
    traveled: bool  # g is x less what is in its buffer

    @classmethod
    def of(cls, rule: Rule) -> Equations:
        return cls(
            rule.whole.fn, rule.update.fn, rule.state, rule.H._fields, rule.messages, rule.halfway, rule.traveled
        )


class Value:
    """A node of the graph: a tensor, or a scalar as Python source.

    A tensor is (op, operands, scalar), and equal triples are the same object. A scalar's source refers to `h[k]`, to
    the weights `w[j]` and to the gradient's `scale`. Three rewritings look at nothing but the form of a node:
    s * (t * a) -> (s * t) * a with a product of scalars, a + s * b -> one operation, a - s * b -> a + (-s) * b (exact).
    """

    def __init__(self, table: dict, op: str, operands: tuple[Value, ...] = (), scalar: str = ""):
        self.table, self.op, self.operands, self.scalar = table, op, operands, scalar

    def new(self, op: str, *operands: Value, scalar: str = "") -> Value:
        key = (op, operands, scalar)
        if key not in self.table:
            self.table[key] = Value(self.table, *key)
        return self.table[key]

    def lift(self, other: Any) -> Value:
        return other if isinstance(other, Value) else Value(self.table, "scalar", scalar=repr(float(other)))

    def plus(self, b: Value, minus: str = "") -> Value:
        """self + b, or self - b with minus="-"."""
        if self.op == b.op == "scalar":
            return self.new("scalar", scalar=f"({self.scalar} {minus or '+'} {b.scalar})")
        if self.op == "scalar":  # s - b = -b + s
            return self.new("shift", -b if minus else b, scalar=self.scalar)
        if b.op == "scalar":
            return self.new("shift", self, scalar=minus + b.scalar)
        if b.op == "scale":
            return self.new("add", self, b.operands[0], scalar=minus + b.scalar)
        if self.op == "scale" and not minus:
            return self.new("add", b, self.operands[0], scalar=self.scalar)
        return self.new("add", self, b, scalar=f"{minus}1")

    def times(self, b: Value) -> Value:
        a, b = (b, self) if self.op == "scalar" else (self, b)
        if b.op != "scalar":
            return self.new("mul", a, b)
        if a.op == "scalar":
            return self.new("scalar", scalar=f"({a.scalar} * {b.scalar})")
        if a.op == "scale":
            return self.new("scale", a.operands[0], scalar=f"({a.scalar} * {b.scalar})")
        return self.new("scale", a, scalar=b.scalar)

    def over(self, b: Value) -> Value:
        if self.op == b.op == "scalar":
            return self.new("scalar", scalar=f"({self.scalar} / {b.scalar})")
        if b.op == "scalar":
            return self.new("part", self, scalar=b.scalar)
        return self.new("inverse", b, scalar=self.scalar) if self.op == "scalar" else self.new("div", self, b)

    def __add__(self, b: Any) -> Value:
        return self.plus(self.lift(b))

    __radd__ = __add__

    def __sub__(self, b: Any) -> Value:
        return self.plus(self.lift(b), "-")

    def __rsub__(self, b: Any) -> Value:
        return self.lift(b).plus(self, "-")

    def __mul__(self, b: Any) -> Value:
        return self.times(self.lift(b))

    __rmul__ = __mul__

    def __truediv__(self, b: Any) -> Value:
        return self.over(self.lift(b))

    def __rtruediv__(self, b: Any) -> Value:
        return self.lift(b).over(self)

    def __neg__(self) -> Value:
        return self.times(self.lift(-1.0))

    def finite(self) -> Value:
        """Every element that is infinite or NaN replaced by 0."""
        return self.new("finite", self)

    def sqrt(self) -> Value:
        return self.new("scalar", scalar=f"{self.scalar} ** 0.5") if self.op == "scalar" else self.new("sqrt", self)


def trace(
    equations: Equations,
    d: int | None,
    *,
    cast_g: bool = False,
    cast_wire: bool = False,
    scaled: bool = True,
    guard: Guard = "",
    low: bool = False,
) -> list[tuple[str, Value]]:
    """The new value of every buffer that a pass writes, by the buffer's name, in the order of the text.

    Buffers are called x, g, low, s0, s1, ... for the state and r0, r1, ... for the messages.

    Args:
        d: None for `pack`; for `combine`, from how many neighbors messages came.
        cast_g, cast_wire: whether gradients and messages have another type than x.
        scaled: whether the gradient's scale is another number than 1.
        guard: what is not finite becomes 0 in the difference to each message, and in the gradient before or after it is
            scaled. Empty: nowhere.
        low: whether there is a buffer of 16-bit parameters, which x follows where they were written.
    """
    send, update, state, fields, messages, halfway, traveled = equations
    root = Value({}, "root")

    def scalar(source: str) -> Value:
        return root.new("scalar", scalar=source)

    def buffer(name: str, cast: bool = False) -> Value:
        leaf = root.new("buffer", scalar=name)
        return root.new("copy", leaf) if cast else leaf

    x, g = buffer("x"), buffer("g", cast_g)
    if low:
        x = root.new("follow", x, buffer("low"))
    if traveled:  # from x as the inner optimizer found it: rounded to the type of the parameters
        g = (root.new("narrowed", x, root.new("buffer", scalar="g")) if cast_g else x) - g
    if guard == "before":
        g = g.finite()
    if scaled:
        g = g * scalar("scale")
    if guard == "after":
        g = g.finite()
    s = named("State", state)(*(buffer(f"s{k}") for k in range(len(state))))
    h = named("H", fields)(*(scalar(f"h[{k}]") for k in range(len(fields))))
    own = [root.lift(h.theta * (x + y) if halfway else y) for y in send(x, g, s, h)]
    if d is None:
        return [(f"r{k}", Value(root.table, "copy", (y,)) if cast_wire else y) for k, y in enumerate(own)]
    pull = [scalar("0.0")] * messages
    for k, y in enumerate(own if d else ()):
        # sum_k w_k (r_k - q). q is the own message as it was sent: rounded to the type of the messages.
        q = root.new("round", y) if cast_wire else y
        for j in range(d):
            r = buffer(f"r{j * messages + k}", cast_wire)
            # A message that is a product was rounded when it was sent: it is no part of the subtraction.
            d_jk = r.new("add", r, q, scalar="-1") if q.op == "scale" else r - q
            part = scalar(f"w[{j}]") * (d_jk.finite() if guard else d_jk)
            pull[k] = pull[k] + part if j else part
    new_x, new_s = update(x, g, s, tuple(pull), h)
    return [("x", root.lift(new_x)), *((f"s{k}", root.lift(v)) for k, v in enumerate(new_s))]
