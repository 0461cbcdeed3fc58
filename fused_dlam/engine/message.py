"""What a worker sends: one value, from which follows when it may leave."""

from __future__ import annotations

from enum import Enum

from ..rules.rule import Rule, send_parameter


class Message(Enum):
    """What a worker sends in a step."""

    GRADIENT = "its gradient, averaged over all workers by all-reduce"
    PACKED = "what the rule's `send` makes of x, the gradient and the state (schedules atc and midpoint)"
    PARAMETERS = "x itself, before this step's gradient is there (schedule awc)"
    STEPPED = "x itself, after an inner optimizer has stepped it (Gossip, atc)"
    COPY = "a copy of x, while an inner optimizer steps x (Gossip, awc)"
    HALFWAY = "the middle of x before and after the inner optimizer's step (Gossip, midpoint)"

    @property
    def is_x(self) -> bool:
        """Whether it is x, so that no equation makes it."""
        return self in (Message.PARAMETERS, Message.STEPPED, Message.COPY)

    @property
    def needs_gradient(self) -> bool:
        """Whether this step's gradient is in it. Else it is x, or what an inner optimizer has made of x."""
        return self in (Message.GRADIENT, Message.PACKED)

    @property
    def leaves_early(self) -> bool:
        """Whether it may leave when the last step ends."""
        return self in (Message.PARAMETERS, Message.COPY)

    @property
    def only_averages(self) -> bool:
        """Whether x is stepped by somebody else, and only averaged here."""
        return self in (Message.STEPPED, Message.COPY, Message.HALFWAY)


def message_of(rule: Rule) -> Message:
    """What a rule of its own sends."""
    if rule.average == "gradient":
        return Message.GRADIENT
    return Message.PARAMETERS if rule.send is send_parameter else Message.PACKED
