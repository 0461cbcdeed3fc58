"""What a dashboard draws of a run: after a step, one dictionary of plain numbers for whatever callable takes one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from ..comm.errors import calling

if TYPE_CHECKING:
    from ..engine.engine import Engine

Callback = Callable[[dict[str, float]], Any]


class Tracked:
    """The part of an optimizer that tells of its steps."""

    if TYPE_CHECKING:
        param_groups: list[dict[str, Any]]
        _joining: bool
        _step: int

        @property
        def _engine(self) -> Engine: ...
        @property
        def _just_came(self) -> bool: ...
        @property
        def bytes_sent(self) -> int: ...
        @property
        def messages_sent(self) -> int: ...
        @property
        def members(self) -> tuple[int, ...]: ...
        @property
        def steps_done(self) -> int: ...
        def consensus_distance(self) -> float: ...
        def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle: ...
        def _check_connected(self) -> None: ...
        def _together(self, call: Callable[[], Any]) -> Any: ...

    def track(self, callback: Callback | None, every: int = 1, consensus_every: int = 0) -> RemovableHandle:
        """Gives `callback` a dictionary of plain numbers after each step().

            {"step": 400, "exchanges": 400, "lr": 0.1, "seconds": 0.21, "waiting": 0.03, "bytes_sent": 160000000, ...}

        step                 `steps_done`: 1 after the first step; it goes on where a checkpoint was loaded
        exchanges            fewer where `Gossip` has rounds of several steps
        lr, lr_1, ...        the learning rate of each parameter group in this step; so outer_lr, where there is one
        seconds              since the last dictionary; in the first one since `track`
        waiting              seconds of them in which this rank waited for others, in steps. See `waits`
        bytes_sent, messages_sent    of this rank since construction, as the properties of these names
        workers              how many take part
        consensus_distance   of the step, where it is due

        What is not known is left out: `waiting` over NCCL, the rate where it is a GPU's tensor, for which the host
        would wait. Nothing here waits for a GPU, but the consensus distance.

        Args:
            callback: called on this rank, in the thread that calls step(). None tells nobody: for ranks that only take
                part in measuring the distance.
            every: steps from one dictionary to the next. May differ between ranks.
            consensus_every: exchanges from one `consensus_distance` to the next, an exact average over all workers; 0
                measures none. Steps with one have a dictionary whatever `every` is. With it all ranks must call
                `track`, with the same number. Within `join`, where ranks may be through, it is left out.

        Returns a handle: `handle.remove()` ends it. Several may be there at once.

        An exception of the callback's is raised by that rank's step(), which is complete then on all ranks: who catches
        it goes on. What was being tracked is not told again.

        Raises TypeError or ValueError for what is no callable or no such number, and on all ranks if they do not agree
        on `consensus_every`.
        """
        if callback is not None and not callable(callback):
            raise TypeError(f"track() calls what it is given, and a {type(callback).__name__} cannot be called")
        for name, number, least in (("every", every, 1), ("consensus_every", consensus_every, 0)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} must be a whole number of steps, not {number!r}")
            if number < least:
                raise ValueError(f"{name} must be at least {least}, not {number}")
        self._check_connected()
        if consensus_every and not self._just_came:  # else the others have agreed already
            with calling("optimizer.track()"):
                self._together(lambda: self._engine.place.agree({"consensus_every of track()": str(consensus_every)}))
        return self.register_step_post_hook(Tracker(self, callback, every, consensus_every))


class Tracker:
    """One `track`: a hook that torch calls when a step has ended without an error."""

    def __init__(self, optimizer: Tracked, callback: Callback | None, every: int, consensus_every: int):
        self.callback, self.every, self.consensus_every = callback, every, consensus_every
        self._since = time.monotonic()
        self._ledger = optimizer._engine.place.workers.ledger
        self._waited = self._ledger.in_steps

    def __call__(self, optimizer: Tracked, args: Any, kwargs: Mapping[str, Any]) -> None:
        step = optimizer.steps_done
        measures = self._is_due(optimizer)
        tells = self.callback is not None and (measures or step % self.every == 0)
        numbers = self._numbers(optimizer, step) if tells else {}
        if measures:  # whether this rank tells of it or not
            numbers["consensus_distance"] = optimizer.consensus_distance()
        if tells and self.callback is not None:  # last: an exception of its leaves nothing undone
            self.callback(numbers)

    def _is_due(self, optimizer: Tracked) -> bool:
        """Whether all ranks measure now. It is by exchanges that they go alike: in a round each may take as many steps
        as it likes, and within `join` some take none."""
        if self.consensus_every == 0 or optimizer._joining or optimizer.param_groups[0].get("gossip_taken"):
            return False
        return optimizer._step % self.consensus_every == 0

    def _numbers(self, optimizer: Tracked, step: int) -> dict[str, float]:
        now, ledger = time.monotonic(), optimizer._engine.place.workers.ledger
        if ledger is not self._ledger:  # other workers, whose waits are counted anew
            self._ledger, self._waited = ledger, 0.0
        numbers: dict[str, float] = {"step": step, "exchanges": optimizer._step, **rates(optimizer.param_groups)}
        numbers["seconds"], self._since = now - self._since, now
        if ledger.measured:
            numbers["waiting"], self._waited = ledger.in_steps - self._waited, ledger.in_steps
        numbers["bytes_sent"], numbers["messages_sent"] = optimizer.bytes_sent, optimizer.messages_sent
        numbers["workers"] = len(optimizer.members)
        return numbers


def rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rates that the host knows."""
    return {
        f"{name}_{i}" if i else name: float(group[name])
        for i, group in enumerate(groups)
        for name in ("lr", "outer_lr")
        if name in group and not (isinstance(group[name], torch.Tensor) and group[name].device.type != "cpu")
    }
