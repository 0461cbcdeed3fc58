"""The cases of the gate: every pass of a rule that an optimizer runs, by the types and the number of messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...rules.rule import Rule
from .floor import Traffic, combine_floor, pack_floor

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DEGREES = (1, 2, 3, 6)
TYPES = [(message, gradient) for message in ("fp32", "bf16") for gradient in ("fp32", "bf16")]


class Case(NamedTuple):
    """One row of the table."""

    rule: Rule
    schedule: str  # "atc", "midpoint", "awc"
    # "pack", "combine"; "emit": combine that also writes x in the messages' type; "follow", "packlow": combine and pack
    # that also read x in that type, which combine writes; "skips": combine that reads a flag.
    pass_: str
    message: str
    gradient: str
    d: int

    @property
    def key(self) -> tuple[str, ...]:
        return (self.rule.name, self.schedule, self.pass_, self.message, self.gradient, str(self.d))

    @property
    def packs(self) -> bool:
        return self.pass_ in ("pack", "packlow")

    @property
    def follows(self) -> bool:
        """Whether it reads parameters of the messages' type, in whose place x is the master."""
        return self.pass_ in ("follow", "packlow")

    @property
    def floor(self) -> Traffic:
        if self.packs:
            floor = pack_floor(self.rule, self.gradient, self.message, self.follows)
        else:
            emits = self.pass_ in ("emit", "follow")
            floor = combine_floor(self.rule, self.gradient, self.message, self.d, emits, self.follows)
        return floor._replace(scalars=floor.scalars + (self.pass_ == "skips"))

    def ceiling(self, architecture: str) -> int:
        """Registers allowed for each thread, 64, 80 or 96: an SM's 65,536 then last for 1024, 768 or 640 threads.

        ptxas took at most 60 with up to 3 received messages and 66 with more, on sm_100 72 and 78. With a division it
        took 71 (AdamW at d = 3 on sm_80), and with ten scalars or more, which lie in registers too, 72 (MI-DmSGD). With
        a third state buffer it took 86, and 110 with 6 received messages (MI-AdamW on sm_100). With 13 scalars, and
        two messages from each of 6 neighbors, it takes 116 to keep the rows in flight (Push-DIGing).
        """
        more = 16 * (len(self.rule.state) > 2)
        if self.d * self.rule.messages > 3:
            return 96 + more + 20 * (self.d * self.rule.messages > 6 and self.floor.scalars > 12)
        return more + (80 if architecture == "sm_100" or self.floor.divisions or self.floor.scalars > 9 else 64)


def cases(rule: Rule, degrees: Sequence[int] = DEGREES, types: Sequence[tuple[str, str]] = TYPES) -> Iterator[Case]:
    """Every pass of a rule, under its own schedule and under "awc" if it has that.

    Where x itself is the message and has its type, x is sent as it lies: no pass packs it or emits it.
    """
    if rule.average == "gradient":  # the optimizer averages gradients itself and combines with no neighbors
        degrees = (0, *degrees)
    for m, g in types:
        yield Case(rule, rule.schedule, "pack", m, g, 0)
        for d in degrees:
            yield Case(rule, rule.schedule, "combine", m, g, d)
    try:
        awc = rule.under("awc")
    except ValueError:
        return
    for m, g in types:
        for d in degrees:
            if awc is not rule:
                yield Case(awc, "awc", "combine", m, g, d)
            if m != "fp32":
                yield Case(awc, "awc", "emit", m, g, d)
