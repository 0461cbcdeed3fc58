"""The optimizer's check that disagreement between workers dies out, at construction and when momentum changes later."""

from __future__ import annotations

import math
from typing import Any

from ..comm.watch import log
from ..rules.rule import Rule
from ..theory.stability import REFUSED, growth, remedies, rows_for
from ..topology.topology import Topology

LARGEST_MAP = 3000  # rows of the largest dense map a certificate is computed from: about half a minute
LARGEST_AGAIN = 600  # the same between two steps of training: a quarter of a second
GRID = 200  # a momentum that changes is certified rounded up to 1/200: a cycle of any length costs a few dozen


class Certificate:
    """Refuses parameter groups that are unstable with a rule on a topology, unless `allow_unstable`.

    Raises ValueError, whatever is allowed, for a rule that knows no masses on a topology that needs them.
    """

    def __init__(self, rule: Rule, graph: Topology, allow_unstable: bool):
        rows_for(rule, graph)
        self.rule, self.graph, self.allowed = rule, graph, allow_unstable
        self.needed = graph.n > 1 and not allow_unstable
        self.told = False
        self.accepted: set[tuple] = set()  # (momentum, hyper-parameters)

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError, saying what would work, if the group's momentum and hyper-parameters are unstable."""
        if self.needed:
            random = self.graph.period is None
            self._accept(group, self._key(group, group["momentum"]), random or self._fits(LARGEST_MAP))

    def trust(self, group: dict[str, Any]) -> None:
        """Another certificate of this graph has accepted the group."""
        self.accepted.add(self._key(group, group["momentum"]))

    def recheck(self, group: dict[str, Any]) -> None:
        """The same between steps, for schedulers that cycle momentum: one look-up where nothing new was set.

        All ranks cycle alike, so all are refused at the same step, before its messages leave.
        """
        if not self.needed:
            return
        key = self._key(group, group["momentum"])
        if key in self.accepted:
            return
        momentum = key[0]
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}, must be in [0, 1)")
        above = self._key(group, math.ceil(momentum * GRID) / GRID)
        if above in self.accepted:
            return
        # A random graph's exponent takes seconds, and is known up to an error: only at construction.
        affordable = self.graph.period is not None and self._fits(LARGEST_AGAIN)
        if affordable and above[0] < 1.0 and self._growth(group, above[0])[0] < REFUSED:
            self.accepted.add(above)
        else:
            self._accept(group, key if affordable else above, affordable)

    def _accept(self, group: dict[str, Any], key: tuple, affordable: bool) -> None:
        momentum = float(key[0])
        if affordable:
            factor, error = self._growth(group, momentum)
            if factor + 2 * error >= REFUSED:
                raise ValueError(remedies(self.rule, self.graph, momentum, factor, error, **self._hyper(group)))
        elif not self.told:
            self.told = True  # once, not at every step of a cycle
            log.warning("%s over %d workers takes too long to certify at momentum %g; see consensus_growth",
                        self.graph.name, self.graph.n, momentum)  # fmt: skip
        self.accepted.add(key)

    def _fits(self, rows: int) -> bool:
        if (1 + len(self.rule.state)) * self.graph.n <= rows:
            return True
        differ = self.rule.mass and not self.graph.is_doubly_stochastic  # each worker has a map of its own
        return not differ and self.graph.modes is not None

    def _growth(self, group: dict[str, Any], momentum: float) -> tuple[float, float]:
        return growth(self.rule, self.graph, float(momentum), **self._hyper(group))

    def _key(self, group: dict[str, Any], momentum: float) -> tuple:
        return (momentum, *self._hyper(group).values())

    def _hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in self.rule.hyper}
