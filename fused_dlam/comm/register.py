"""What stands in the store about the workers: what they say and agree on, and what a launcher reads of it."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch.distributed as dist

from .beacon import Address, refuses
from .errors import ExchangeError

KEYS = "fused_dlam/members/"  # in the launcher's store; then how often the launcher had started all anew
PROCESS = "FUSED_DLAM_PROCESS"  # under which name the launcher has started this process
LEFT = "left/"  # then such a name: of a process that ended, or is about to, because the others went on without it


class Excluded(ExchangeError):
    """The others went on without this worker, which was silent for longer than `timeout`."""


class RunEnded(ExchangeError):
    """Fewer workers are left than `min_workers`, or the store is gone."""


class Arrival(NamedTuple):
    """What a worker says when it gives up its group."""

    number: int
    address: Address
    step: int  # the one that it does next
    calls: int  # how many calls outside of steps, which all make together, have ended for it
    has_result: bool = False  # of the call that it is in
    in_call: bool = False  # or not in a step, as newcomers cannot be either
    accuses: tuple[int, ...] = ()  # the workers for which it has waited `timeout` seconds in vain
    after: int = 0  # the step at which it stands once the call that it is in is done: that may load a checkpoint
    taken: int = 0  # in rounds: how many steps of its round it has taken


class View(NamedTuple):
    """What was agreed on."""

    generation: int
    members: tuple[int, ...]  # numbers, in the order of their ranks
    new: tuple[int, ...]  # those of them that need a copy of the state
    step: int  # from which all go on
    arrivals: tuple[Arrival, ...]  # of the members that are not new
    asked: bool = False  # whether somebody waits, who could not be let in: there was a call, not a step

    def rank(self, number: int) -> int:
        return self.members.index(number)

    @property
    def taken(self) -> int:
        """In rounds: after how many steps of that round all go on. Where some are in a call of all workers, the others
        come to it by themselves."""
        if any(arrival.in_call for arrival in self.arrivals):
            return 0
        return max((arrival.taken for arrival in self.arrivals if arrival.step == self.step), default=0)

    def is_behind(self, arrival: Arrival) -> bool:
        return (arrival.after, arrival.taken) < (self.step, self.taken)


def somebody_trains(store: dist.Store) -> bool | None:
    """Whether a member may be alive, and let others in. None: training has not begun."""
    if not store.check(["n"]):
        return None
    g = int(store.add("generation", 0))
    members = json.loads(store.get(f"{g}/members"))[0] if g else range(int(store.get("n")))
    return not all(refuses(address_of(store, i)) for i in members)


def who_came(store: dist.Store) -> dict[str, int]:
    """The numbers of those that were let in, by the names of their processes: for whoever speaks of them."""
    lines = store.get("came").decode().splitlines() if store.check(["came"]) else []
    return {name: int(number) for name, number in map(str.split, lines)}


def was_left(store: dist.Store, name: str) -> bool:
    """Whether the process of this name has ended because the others had gone on without it, or too few were left."""
    return store.check([LEFT + name])


def address_of(store: dist.Store, number: int) -> Address:
    host, port = json.loads(store.get(f"address/{number}"))
    return host, port


def arrival_of(line: list) -> Arrival:
    number, address, step, calls, has_result, in_call, accuses, after, taken = line
    return Arrival(number, tuple(address), step, calls, has_result, in_call, tuple(accuses), after, taken)
