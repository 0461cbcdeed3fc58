"""The graph for each number of workers: what a run goes on with when some are lost, or come.

The same family, where it exists for that number and the method is stable on it; else the first of `SUBSTITUTES` that
does. The rule depends on the number alone, so all workers take the same graph without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import topology as topologies
from ..comm.watch import log
from ..rules.averaging import mix
from ..rules.rule import Rule
from ..theory.stability import rows_for
from ..topology import Topology, TopologyLike
from .certificate import Certificate

SUBSTITUTES = ("one-peer-exponential", "symmetric-exponential", "ring", "full")


class Succession:
    """Args:
    family: what the user chose, for any number of workers.
    rule: the method, which must be stable unless allow_unstable; None: whatever brings the workers together will do.
    groups: the parameter groups, as they are now.
    suits: raises ValueError for a graph that something else does not go with, as a codec.
    """

    def __init__(
        self,
        family: TopologyLike,
        rule: Rule | None,
        allow_unstable: bool = False,
        groups: Callable[[], list[dict[str, Any]]] = list,
        suits: Callable[[Topology], object] = bool,
    ):
        if isinstance(family, Topology):
            raise ValueError(
                f"topology {family.name!r} is for {family.n} workers alone: with on_failure='continue' their number"
                " changes. Pass a name, or a function of the number of workers"
            )
        self.family, self.rule, self.allow_unstable, self.groups = family, rule, allow_unstable, groups
        self.suits = suits
        self._failed: set[int] = set()  # numbers of workers for which the user's function failed, which was said

    def look_ahead(self, n: int) -> None:
        """At construction: says what one worker less would mean. Raises ValueError if there is no graph for it."""
        graph = self(n - 1) if n > 1 else None
        own = self._of(self.family, n - 1) if graph is not None else None
        if graph is not None and own is None:
            log.info("with %d workers, one less than now, the graph would be %s", n - 1, graph.name)

    def __call__(self, n: int) -> Topology:
        for family in (self.family, *SUBSTITUTES):
            graph = self._of(family, n)
            if graph is not None:
                return graph
        raise ValueError(f"there is no graph for {n} workers on which this method is stable")

    def _of(self, family: TopologyLike, n: int) -> Topology | None:
        try:
            graph = topologies.get(family, n)
        except ValueError:  # the family's own way to say that it has none
            return None
        except Exception as error:  # a function of the user's, in the middle of a recovery: training goes on
            if n not in self._failed:
                self._failed.add(n)
                log.warning(
                    "the function given as topology has no graph for %d workers (%s: %s): another one is taken",
                    n, type(error).__name__, error,
                )  # fmt: skip
            return None
        try:
            self.suits(graph)
            if self.rule is None:
                rows_for(mix, graph)
                return graph if graph.n == 1 or graph.rho < 1 - 1e-9 else None
            certificate = Certificate(self.rule, graph, self.allow_unstable)
            for group in self.groups():
                certificate.check(group)
        except ValueError:
            return None
        return graph
