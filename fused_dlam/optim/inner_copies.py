"""`Gossip`'s checkpoints: the inner optimizer's, with the exchange's step and master values."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ..comm.errors import calling
from ..engine.buckets import Bucket
from ..engine.slot import Slot
from .loaded_values import WORKER, check_everywhere, whose
from .outer_steps import forget_rounds
from .rounds import MEMORY, OUTER, Rounds
from .shared import GossipOptimizer
from .state_dict import numbers, restore_copies, restore_memories

OWN = "gossip_"  # how names begin of what is not the inner optimizer's


class InnerCopies(GossipOptimizer):
    """The part of a `Gossip` that is saved and loaded."""

    inner: Optimizer
    _entries: dict[str, Any]
    _rounds: Rounds | None
    _anew: bool
    _stepped: int | None
    _loss: Any

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Gossip holds a process group and cannot be copied: copy its state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with the exchange's step, for 16-bit parameters master values, with compress= what is
        remembered of messages, and of an outer method x, its state and how far its round is."""
        for b in self._engine.buckets:
            b.absorb()
        state_dict = self.inner.state_dict()
        state = dict(state_dict["state"])
        for key, (b, slot) in self._slots(state_dict).items():
            if b.anchored:
                own = dict(self._engine.buffers(b))
            else:
                own = {} if b.compressed is None else dict(b.compressed.kept)
                if b.low is not None and self._engine.place.workers.size > 1:
                    own["master"] = b.x
            if own:
                shown = {f"{OWN}{name}": slot.stateful(buffer).clone() for name, buffer in own.items()}
                state[key] = {**state.get(key, {}), **shown}
        groups = [
            {k: [list(pair) for pair in numbers(v).items()] if k == MEMORY else v for k, v in group.items()}
            | whose(self._engine)
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this topology, or one of the inner optimizer alone. On all ranks.

        What `consensus_state_dict` returned loads on any topology. Raises ValueError for one of another topology.
        """
        self._check_own_values("load_state_dict()")
        with calling("optimizer.load_state_dict()"):
            check_everywhere(self, state_dict)
        before = [
            {k: g[k] for k in g if k in self._entries or (k.startswith(OUTER) and k != MEMORY)}
            for g in self.param_groups
        ]
        step = self._step
        state = {
            key: {k: v for k, v in s.items() if not (isinstance(k, str) and k.startswith(OWN))}
            if isinstance(s, dict)
            else s
            for key, s in state_dict["state"].items()
        }
        self.inner.load_state_dict({**state_dict, "state": {k: s for k, s in state.items() if not _empty(s)}})
        for group, old in zip(self.param_groups, before, strict=True):
            group.pop(WORKER, None)
            if self._rounds is None:
                forget_rounds(group)
            for name, value in old.items():
                group.setdefault(name, value)
        self._engine.forget(step)
        self._stepped = self._loss = None
        saved = {slot: state_dict["state"].get(key, {}) for key, (_, slot) in self._slots(state_dict).items()}
        if self._rounds is not None:
            # What all-reduce averages begins at the mean of what is loaded, unless that is the middle of a round.
            self._anew = not self._rounds.load(self.param_groups, self._engine, lambda slot: saved[slot])
        with torch.no_grad():
            for b in self._engine.buckets if self._rounds is None else ():
                restore_copies(b, lambda slot: saved[slot].get(f"{OWN}master"))
            restore_memories(self._engine, lambda slot: saved[slot], OWN)

    def _slots(self, state_dict: dict[str, Any]) -> dict[Any, tuple[Bucket, Slot]]:
        """(bucket, slot) of a checkpoint's parameters, by their numbers in it."""
        places = {slot.p: (b, slot) for b in self._engine.buckets for slot in b.slots}
        return {
            key: places[p]
            for theirs, group in zip(state_dict["param_groups"], self.param_groups, strict=True)
            for key, p in zip(theirs["params"], group["params"], strict=True)
            if p in places
        }

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        """Hooks of `state_dict` and `load_state_dict` are the inner optimizer's, which they are given."""
        return self.inner.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.inner.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.inner.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.inner.register_load_state_dict_post_hook(hook, prepend)


def _empty(state: Any) -> bool:
    """Whether a parameter's state has no entry: such a one was made for the message's master alone."""
    return isinstance(state, dict) and not state
