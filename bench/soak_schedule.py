"""What befalls a run of bench/soak.py: drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

MODES = ("kill", "stop", "delay", "join")


@dataclass
class Fault:
    """One thing that happens to one worker.

    kind: "kill", "stop" and "cut" (its link) for good, "delay" for a while below the timeout.
    step: the worker's own at which it is due, plus `after` seconds; None: while another worker recovers.
    """

    kind: str
    worker: int
    step: int | None
    after: float
    due: float | None = field(default=None, compare=False)

    def __str__(self) -> str:
        at = "in recovery" if self.step is None else f"at {self.step}"
        return f"{self.kind} {self.worker} {at} +{self.after * 1000:.0f} ms"


@dataclass
class Schedule:
    seed: int
    optimizer: str
    faults: list[Fault]
    joins: bool  # whether a newcomer is started once the first worker is lost


def draw(seed: int, n: int, steps: int, modes: tuple[str, ...], kinds: tuple[str, ...]) -> Schedule:
    """One to three workers are lost, the first at a random step, the others at theirs, with it, or in its recovery."""
    dice = random.Random(seed)
    optimizer = dice.choice(kinds)
    per_machine = 2 if optimizer == "hierarchical" else 1
    count = dice.choice([1, 2, 2, 3, 3]) if per_machine == 1 else 1
    faults: list[Fault] = []
    for worker in dice.sample(range(n), count):
        kind = dice.choice([mode for mode in modes if mode != "join"] or ["kill"])
        when = "step" if not faults else dice.choice(["step", "same", "recovery"])
        if when == "same":
            fault = Fault(kind, worker, faults[0].step, faults[0].after)
        elif when == "recovery":
            fault = Fault(kind, worker, None, dice.uniform(0, 0.3))
        else:
            fault = Fault(kind, worker, dice.randrange(2, max(3, steps - 10)), dice.uniform(0, 0.05))
        faults.append(fault)
    return Schedule(seed, optimizer, faults, "join" in modes and dice.random() < 0.5 and per_machine == 1)


def lost(schedule: Schedule, n: int, struck: set[int]) -> set[int]:
    """Who does not come to the end, of those struck for good: a machine goes as one."""
    if schedule.optimizer == "hierarchical":
        return {i for i in range(n) if {i, i ^ 1} & struck}
    return struck
