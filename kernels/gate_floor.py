"""The floor: what a pass must read and write, traced from the rule's own equations.

The equations run once on values that only remember which inputs they were computed from. An input that reaches no
result need not be read: `awc-dmsgd` packs x alone, and DSGD's update never reads a momentum.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from .rule import Rule

SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class Traced:
    """A value that remembers its inputs through + - * / and sqrt."""

    def __init__(self, *inputs: str):
        self.inputs = frozenset(inputs)

    def _joined(self, other):
        return Traced(*self.inputs, *getattr(other, "inputs", ()))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _joined

    def __neg__(self):
        return self

    sqrt = __neg__


class Traffic(NamedTuple):
    """Elements a pass moves for each parameter, by the type of the buffer, and the scalars it reads."""

    loads: Counter  # type -> buffers read
    stores: Counter  # type -> buffers written
    scalars: int

    @property
    def bytes(self) -> int:
        """Bytes moved per parameter. Scalars are read once for each program and stay in cache: not counted."""
        return sum(SIZE[t] * n for t, n in (*self.loads.items(), *self.stores.items()))


def pack_floor(rule: Rule, gradient: str, message: str) -> Traffic:
    sent, _ = _trace(rule)
    inputs = frozenset().union(*sent)
    return Traffic(_buffers(inputs, gradient), Counter({message: rule.messages}), _scalars(inputs))


def combine_floor(rule: Rule, gradient: str, message: str, d: int, emit: bool = False) -> Traffic:
    """x and every state buffer are written; `emit` also writes the next message."""
    sent, inputs = _trace(rule)
    pulls = [m for m in range(rule.messages) if f"pull {m}" in inputs and d]
    inputs = inputs.union(*(sent[m] for m in pulls))  # a pull needs the own message, recomputed from its inputs
    loads = _buffers(inputs, gradient) + Counter({message: d * len(pulls)})
    stores = Counter({"fp32": 1 + len(rule.state)}) + Counter({message: int(emit)})
    return Traffic(loads, stores, _scalars(inputs) + (d if pulls else 0))


def _trace(rule: Rule):
    """The inputs of each message, and of all results of the update together."""
    x, g = Traced("x"), Traced("g")
    s = rule.State(*(Traced(f"state {name}") for name in rule.state))
    h = rule.H(*(Traced(f"scalar {name}") for name in rule.H._fields))
    try:
        sent = rule.send.fn(x, g, s, h)
        new_x, new_s = rule.update.fn(x, g, s, tuple(Traced(f"pull {m}") for m in range(rule.messages)), h)
    except TypeError as error:
        raise TypeError(
            f"the equations of {rule.name!r} may use + - * / and .sqrt() and nothing else: {error}"
        ) from error
    return [_inputs(y) for y in sent], frozenset().union(*map(_inputs, (new_x, *new_s)))


def _inputs(value):
    return getattr(value, "inputs", frozenset())


def _buffers(inputs, gradient):
    state = sum(name.startswith("state ") for name in inputs)
    return Counter({"fp32": ("x" in inputs) + state}) + Counter({gradient: int("g" in inputs)})


def _scalars(inputs):
    return ("g" in inputs) + sum(name.startswith("scalar ") for name in inputs)  # g has its scale
