"""The floor: what a pass must read and write, counted at the ends of the graph of the rule's own equations.

An input that reaches no result need not be read: `awc-dmsgd` packs x alone, and DSGD's update never reads a momentum.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from ...rules.rule import Rule
from ..trace import Equations, Value, trace

SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


class Traffic(NamedTuple):
    """Elements that a pass moves for each parameter, by the type of the buffer, and the scalars that it reads."""

    loads: Counter  # type -> buffers read
    stores: Counter  # type -> buffers written
    scalars: int
    divisions: int = 0  # for each parameter

    @property
    def bytes(self) -> int:
        """Bytes moved per parameter. Scalars do not count: each program reads them once, and they stay in the cache."""
        return sum(SIZE[t] * n for t, n in (*self.loads.items(), *self.stores.items()))


def pack_floor(rule: Rule, gradient: str, message: str, low: bool = False) -> Traffic:
    """low: x follows parameters in the messages' type."""
    return _traffic(rule, None, gradient, message, Counter({message: rule.messages}), low)


def combine_floor(rule: Rule, gradient: str, message: str, d: int, emit: bool = False, low: bool = False) -> Traffic:
    """x and every state buffer are written; `emit` also writes x in the messages' type."""
    stores = Counter({"fp32": 1 + len(rule.state)}) + Counter({message: int(emit)})
    return _traffic(rule, d, gradient, message, stores, low)


def _traffic(rule: Rule, d: int | None, gradient: str, message: str, stores: Counter, low: bool) -> Traffic:
    try:
        results = trace(Equations.of(rule), d, guard="after", low=low)
    except TypeError as error:
        raise TypeError(
            f"the equations of {rule.name!r} may use + - * / and .sqrt() and nothing else: {error}"
        ) from error
    nodes: set[Value] = set()
    ahead = [value for _, value in results]
    while ahead:
        node = ahead.pop()
        if node not in nodes:
            nodes.add(node)
            ahead += node.operands
    loads: Counter[str] = Counter()
    scalars: set[str] = set()
    for node in nodes:
        if node.op == "buffer":
            loads[{"g": gradient, "r": message, "l": message}.get(node.scalar[0], "fp32")] += 1
        else:
            scalars.update(re.findall(r"[hw]\[\d+\]|scale", node.scalar))
    return Traffic(loads, stores, len(scalars), sum(node.op in ("div", "part", "inverse") for node in nodes))
