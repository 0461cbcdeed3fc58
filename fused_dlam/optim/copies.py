"""`GossipSGD`'s checkpoints and copies: what torch's optimizers do with `load_state_dict`, deepcopy and pickle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import Optimizer

from ..comm.errors import calling
from ..comm.place import Place, alone
from ..rules.rule import Rule
from ..topology import Topology
from .counter import Counter
from .kept_state import reclaim
from .local_steps import LocalSteps
from .options import Options
from .shared import GossipOptimizer
from .state_dict import by_parameter, loading, restore


class Copies(GossipOptimizer):
    """The part of a `GossipSGD` that is loaded and copied."""

    _chosen: tuple[Rule, Topology, Options]
    _choose: Callable[[Rule, Topology, Options, bool], None]
    _start: Callable[[Place], None]
    _counter: Counter
    _local_steps: LocalSteps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this method and topology, or one of `torch.optim.SGD`. On all ranks.

        What `consensus_state_dict` returned loads on any topology.

        Raises ValueError for a checkpoint of another method or topology.
        """
        self._check_own_values("load_state_dict()")
        with calling("optimizer.load_state_dict()"), loading(self, self._engine) as loaded:
            super().load_state_dict(state_dict)
        saved = by_parameter(loaded, self.param_groups)
        self._counter.restore(lambda slot: not saved[slot.p])
        self._counter.note()
        self._local_steps.forget()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        can_work_on = self._running is not None and self._running.place.alone
        return {**state, "_chosen": self._chosen} if can_work_on else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called on a copied or unpickled optimizer, and by torch's load_state_dict in its middle."""
        before = [dict(group) for group in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        for group, old in zip(self.param_groups, before, strict=False):
            for name, value in old.items():
                group.setdefault(name, value)  # a checkpoint of torch.optim.SGD, or of the mean, lacks some
            group["memory"] = dict(group["memory"])
        if "_chosen" in state:
            rule, graph, chosen = state["_chosen"]
            self._choose(rule, graph, chosen, True)
            saved = {p: self.state.get(p, {}) for group in self.param_groups for p in group["params"]}
            device = next(iter(saved)).device
            self._start(alone(device))
            restore(saved, self, self._engine)
            self._counter.restore()


def reclaimed(optimizer: Optimizer) -> None:
    """Before a checkpoint: entries of the state that a script took away are there again, as at the start."""
    if isinstance(optimizer, Copies) and optimizer._running is not None:
        optimizer._local_steps.check_none("state_dict()")
        reclaim(optimizer.state, optimizer._running)
