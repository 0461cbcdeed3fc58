"""The floor: what a pass must read and write, traced from the rule's own equations.

The equations run once on values that only remember which inputs they were computed from. An input that reaches no
result need not be read: `awc-dmsgd` packs x alone, and DSGD's update never reads a momentum.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ...rules.rule import Rule

SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class Traced:
    """A value that remembers its inputs through + - * / and sqrt, and the divisions on its way."""

    def __init__(self, *inputs: str, divisions: frozenset = frozenset()):
        self.inputs, self.divisions = frozenset(inputs), divisions

    def _joined(self, other):
        divisions = self.divisions | getattr(other, "divisions", frozenset())
        return Traced(*self.inputs, *getattr(other, "inputs", ()), divisions=divisions)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _joined

    def __truediv__(self, other):
        quotient = self._joined(other)
        # Equal divisions in send and update are one in the kernel; told apart by what goes into them.
        quotient.divisions |= {(self.inputs, getattr(other, "inputs", frozenset()))}
        return quotient

    __rtruediv__ = __truediv__

    def __neg__(self):
        return self

    sqrt = __neg__


class Traffic(NamedTuple):
    """Elements a pass moves for each parameter, by the type of the buffer, and the scalars it reads."""

    loads: Counter  # type -> buffers read
    stores: Counter  # type -> buffers written
    scalars: int
    divisions: int = 0  # for each parameter

    @property
    def bytes(self) -> int:
        """Bytes moved per parameter. Scalars are read once for each program and stay in cache: not counted."""
        return sum(SIZE[t] * n for t, n in (*self.loads.items(), *self.stores.items()))


def pack_floor(rule: Rule, gradient: str, message: str) -> Traffic:
    sent, _, divisions = _trace(rule)
    inputs = frozenset().union(*sent)
    return Traffic(_buffers(inputs, gradient), Counter({message: rule.messages}), _scalars(inputs), divisions)


def combine_floor(rule: Rule, gradient: str, message: str, d: int, emit: bool = False) -> Traffic:
    """x and every state buffer are written; `emit` also writes x in the messages' type."""
    sent, inputs, divisions = _trace(rule)
    pulls = [m for m in range(rule.messages) if f"pull {m}" in inputs and d]
    inputs = inputs.union(*(sent[m] for m in pulls))  # a pull needs the own message, recomputed from its inputs
    loads = _buffers(inputs, gradient) + Counter({message: d * len(pulls)})
    stores = Counter({"fp32": 1 + len(rule.state)}) + Counter({message: int(emit)})
    return Traffic(loads, stores, _scalars(inputs) + (d if pulls else 0), divisions)


def _trace(rule: Rule):
    """The inputs of each message, those of all results of the update together, and the number of divisions."""
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
    results = (*sent, new_x, *new_s)
    divisions = frozenset().union(*(getattr(v, "divisions", frozenset()) for v in results))
    return [_inputs(y) for y in sent], frozenset().union(*map(_inputs, (new_x, *new_s))), len(divisions)


def _inputs(value):
    return getattr(value, "inputs", frozenset())


def _buffers(inputs, gradient):
    state = sum(name.startswith("state ") for name in inputs)
    return Counter({"fp32": ("x" in inputs) + state}) + Counter({gradient: int("g" in inputs)})


def _scalars(inputs):
    return ("g" in inputs) + sum(name.startswith("scalar ") for name in inputs)  # g has its scale
