"""Who knows what has happened: vector clocks of streams, transports and host threads, and who touched which bytes.

Two accesses of the same bytes, one of them a write, race unless one happened before the other: unless whoever comes
second knows, through a chain of waits, that the first has ended. Whether they met in this run does not matter, so a
race that would show once in a thousand runs on a GPU shows here every time.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch


class Agent:
    """Something that does one thing after another: a stream, a host thread, a transport's operation."""

    def __init__(self, name: str, knows: dict[Agent, int] | None = None):
        self.name = name
        self.clock: dict[Agent, int] = dict(knows or {})  # of every agent, how many of its actions are known to be over

    def __repr__(self) -> str:
        return self.name

    def learn(self, clock: dict[Agent, int]) -> None:
        for agent, time in clock.items():
            if self.clock.get(agent, 0) < time:
                self.clock[agent] = time

    def tick(self) -> int:
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]


class Access(NamedTuple):
    agent: Agent
    time: int
    start: int  # bytes
    stop: int
    write: bool
    what: str

    def known_to(self, agent: Agent) -> bool:
        return agent.clock.get(self.agent, 0) >= self.time


class Memory:
    """One allocation and its accesses that may still matter."""

    def __init__(self, label: str, device: object, pool: object, inherited: list[Access]):
        self.label, self.device = label, device  # the line that allocated it
        self.pool = pool  # what may take its place once it is freed
        self.pinned = False
        self.recorded: set[Agent] = set()  # streams of record_stream: it is not given out again before they are done
        self.accesses = list(inherited)
        self.said: list[int] = []  # the numbers in the header of the message that the transport has written here

    def touch(self, agent: Agent, start: int, stop: int, write: bool, what: str, races: Counter) -> None:
        kept = []
        for old in self.accesses:
            if old.start < stop and start < old.stop:
                if not old.known_to(agent) and (write or old.write):
                    races[f"memory of {self.label}: {old.what} on {old.agent} | {what} on {agent}"] += 1
                # What comes after this access, and so after the old one, need not be compared with the old one.
                if start <= old.start and old.stop <= stop and (write or (old.agent is agent and not old.write)):
                    continue
            kept.append(old)
        kept.append(Access(agent, agent.clock[agent], start, stop, write, what))
        self.accesses = kept

    def left_behind(self) -> list[Access]:
        """What whoever gets this memory next has to come after."""
        return [a._replace(start=0, stop=1 << 60) for a in self.accesses if a.agent not in self.recorded]


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_in(v)]
    return []


def span(t: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage between the first and the last that a tensor may touch."""
    if not t.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    start = t.storage_offset() * t.element_size()
    return start, start + (last + 1) * t.element_size()
