"""What has come to a mailbox and was not collected."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from .letter import Letter, Values, add
from .line import Head, Line


class Message(NamedTuple):
    """The last one of a source."""

    tensor: Values  # a copy
    mass: float
    step: int  # of the source, when it sent this
    age: float  # seconds since it came


class Inbox:
    """What has come and was not collected. The threads of a post put it here."""

    def __init__(self, letter: Letter):
        self.letter, self.lock = letter, threading.Lock()
        self.total: torch.Tensor | None = None  # None: nothing
        self.mass = 0.0
        self.last: dict[int, tuple[Head, torch.Tensor]] = {}
        self._kept: set[int] = set()  # of which ranks that is a copy

    def came(self, line: Line, head: Head, values: torch.Tensor) -> None:
        with self.lock:
            if not line.silent:
                self.last[line.peer] = head, values
            elif line.peer in self.last and line.peer not in self._kept:  # its place is the next message's
                self._kept.add(line.peer)
                of_last, its_values = self.last[line.peer]
                self.last[line.peer] = of_last, its_values.clone()

    def read(self, line: Line, head: Head, values: torch.Tensor) -> None:
        if line.silent:
            return
        with self.lock:
            if self.total is None:
                self.total = self.letter.host(self.letter.wide)
                self.total.zero_()
            add(self.total, values)
            self.mass += head.mass

    def take(self) -> tuple[torch.Tensor | None, float]:
        with self.lock:
            total, mass = self.total, self.mass
            self.total, self.mass = None, 0.0
        return total, mass
