"""`Hyper`: a hyper-parameter of a method, with its default and its bounds."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import inf, isnan
from numbers import Real
from typing import Any

#: A hyper-parameter's default: a number, or a function of (momentum, rho) or of (momentum, rho, static). rho is the
#: topology's contraction per step; static says that it has one matrix for all steps, which is symmetric.
Default = float | Callable[..., float]


@dataclass(frozen=True)
class Hyper:
    """A hyper-parameter of a method: its default and its bounds. A bound that is None does not exist.

    Where the default is a function of (momentum, rho) or (momentum, rho, static), the values "auto" and None both mean
    that function's value. Where it is a number, None means that number and "auto" is refused.

    Raises ValueError if the default is out of the bounds or no number, or if two bounds are on one side.
    """

    default: Default
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __post_init__(self):
        if None not in (self.at_least, self.above) or None not in (self.at_most, self.below):
            raise ValueError("a hyper-parameter has one lower bound at most, and one upper bound")
        if not callable(self.default) and not self._contains(self.default):
            raise ValueError(f"Invalid default: {self.default!r}, must be {self.bounds}")

    def auto(self, momentum: float, rho: float, static: bool) -> float:
        """What "auto" stands for, where the default is a function."""
        assert callable(self.default)
        return self.default(momentum, *(rho, static)[: self._asks])

    @cached_property
    def _asks(self) -> int:
        """What the default asks for beside the momentum: looked up once, not in every step."""
        return len(inspect.signature(self.default).parameters) - 1  # type: ignore[arg-type]

    def allows(self, value: Any) -> bool:
        """Whether a user may set this value. NaN, bool, tensors and strings other than "auto" are refused."""
        if value is None or (isinstance(value, str) and value == "auto" and callable(self.default)):
            return True
        return self._contains(value)

    def _contains(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        try:
            real = float(value)
        except OverflowError:  # a whole number beyond all floats
            return False
        return (
            not isnan(real)
            and (self.at_least is None or real >= self.at_least)
            and (self.above is None or real > self.above)
            and (self.at_most is None or real <= self.at_most)
            and (self.below is None or real < self.below)
        )

    @property
    def bounds(self) -> str:
        """The bounds as text, such as "'auto' or in [0, 1)", "above 0 and finite" or "a number"."""
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        opening, closing = "(" if self.at_least is None else "[", ")" if self.at_most is None else "]"
        if low is not None and high is not None and high < inf:
            text = f"in {opening}{low:g}, {high:g}{closing}"
        elif low is not None:
            text = f"{'above' if opening == '(' else '>='} {low:g}"
            text += " and finite" if self.below == inf else " (math.inf is allowed)"
        elif high is not None:
            text = f"{'below' if closing == ')' else '<='} {high:g}"
        else:
            text = "a number"
        return f"'auto' or {text}" if callable(self.default) else text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message, ". Did you mean 'momentum'?", for a name that is almost a known one; else nothing."""
    near = difflib.get_close_matches(name.lower(), list(known), 1, 0.7)
    return f". Did you mean {near[0]!r}?" if near else ""
