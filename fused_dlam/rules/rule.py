"""A method is two equations: what a worker sends, and how it updates once its neighbors have pulled on it."""

from __future__ import annotations

import importlib
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .jit import jit
from .scalars import Scalar

#: A hyper-parameter's default: a number, or a function of (momentum, rho) with rho the topology's contraction per step.
Default = float | Callable[[float, float], float]

COMMON = ("lr", "momentum", "weight_decay")


@jit
def send_parameter(x, g, s, h):
    """The message of the adapt-while-communicating schedule: x itself."""
    return (x,)


class Rule:
    """A decentralized method, written once as two element-wise functions with + - * / and `.sqrt()` only.

        send(x, g, s, h)          -> tuple of messages
        update(x, g, s, pull, h)  -> x', tuple of new state buffers

    x is the parameter, g the gradient, s a named tuple of this worker's state buffers (all start at zero), h a named
    tuple of scalars, and pull one value per message: pull[k] = sum_j W[i, j] (message k of j - my message k), so that
    `message + pull` is the weighted average when the weights of a row sum to one. Both functions are decorated with
    `fused_dlam.jit` and may use nothing but their arguments: no Python constants (a constant would change the
    precision in compiled code), no other functions.

    Args:
        name: the method's name, as users and checkpoints see it.
        send, update: the two equations.
        state: names of the state buffers, e.g. "momentum_buffer" (what `torch.optim.SGD` calls it).
        hyper: hyper-parameters beyond lr, momentum and weight_decay, with defaults; a default may be a function of
            (momentum, rho). They are fields of h.
        derive: `derive(h, memory) -> dict` adds scalars to h that the host computes once per step, such as 1/lr with
            a guard; `h` is a dict, `memory` a dict of floats that outlives the step and is saved in checkpoints. Where
            lr is a tensor on a GPU, h["lr"] and what is kept of it are 0-d float64 tensors there: + - * / and the
            functions of `kernels.scalars` leave them there; `max`, `if` and `float` work, but wait for the GPU.
        average: "neighbors" for gossip; "gradient" averages the gradient over all workers by all-reduce before
            `update` (then send must return the gradient).
        centered: state buffers whose mean over the workers is zero by definition, like an integral of pulls; a
            checkpoint for another number of workers starts them from zero.

    Raises TypeError if an equation is not decorated with `jit`, ValueError if its results have the wrong form.
    """

    def __init__(
        self,
        name: str,
        send: Any,
        update: Any,
        state: tuple[str, ...] = (),
        hyper: Mapping[str, Default] | None = None,
        derive: Callable[[dict, dict], dict] | None = None,
        average: str = "neighbors",
        centered: tuple[str, ...] = (),
    ):
        for what, function in (("send", send), ("update", update)):
            if not callable(getattr(function, "fn", None)):
                raise TypeError(f"rule {name!r}: {what} must be decorated with @fused_dlam.jit")
        if average not in ("neighbors", "gradient"):
            raise ValueError(f"rule {name!r}: average must be 'neighbors' or 'gradient', not {average!r}")
        self.name, self.send, self.update, self.average = name, send, update, average
        self.state = tuple(state)
        self.centered = tuple(centered)
        if not set(self.centered) <= set(self.state):
            raise ValueError(f"rule {name!r}: centered names {self.centered}, but its state is {self.state}")
        self.hyper = dict(hyper or {})
        self.derive = derive
        self.State = named("State", self.state)
        values = self._values(lr=1.0, momentum=0.5, weight_decay=0.0, rho=0.5, hyper={}, memory={})
        self.H = named("H", tuple(values))
        # One trial on single numbers tells the number of messages, and that the equations have the promised form.
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        h, s = self.H(**values), self.State(*(zero for _ in self.state))
        messages = send.fn(one, zero, s, h)
        if not isinstance(messages, tuple) or not messages:
            raise ValueError(f"rule {name!r}: send must return a non-empty tuple of messages, not {messages!r}")
        self.messages = len(messages)
        self._sends_x = bool(messages[0] == 1.0)
        result = update.fn(one, zero, s, (zero,) * self.messages, h)
        buffers = result[1] if isinstance(result, tuple) and len(result) == 2 else None
        if not isinstance(buffers, tuple) or len(buffers) != len(self.state):
            raise ValueError(f"rule {name!r}: update must return x', (one value for each of {self.state})")

    def __repr__(self) -> str:
        return f"Rule({self.name!r}, state={self.state}, messages={self.messages})"

    def __reduce__(self):
        """Rules travel to other processes by name: as a variable of the module that holds their equations."""
        module = sys.modules[self.update.fn.__module__]
        for name, value in vars(module).items():
            if value is self:
                return _find, (module.__name__, name)
        raise TypeError(f"rule {self.name!r} must be a variable of module {module.__name__!r} to be pickled")

    def __deepcopy__(self, memo: dict) -> Rule:
        return self

    def _values(self, lr, momentum, weight_decay, rho, hyper, memory) -> dict[str, Any]:
        values: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        for name, default in self.hyper.items():
            value = hyper.get(name)
            if value is None or value == "auto":
                value = default(momentum, rho) if callable(default) else default
            values[name] = value
        if self.derive is not None:
            values.update(self.derive(values, memory))
        return values

    def scalars(
        self, lr: Scalar, momentum: float, weight_decay: float, rho: float = 0.0, hyper=None, memory=None
    ) -> Any:
        """h for one step. `memory` is updated in place: call this once per step."""
        return self.H(**self._values(lr, momentum, weight_decay, rho, hyper or {}, {} if memory is None else memory))

    def check_hyper(self, hyper: Mapping[str, Any]) -> None:
        """Raises TypeError for a hyper-parameter this method does not have."""
        for name in hyper:
            if name not in self.hyper:
                known = ", ".join((*COMMON, *self.hyper))
                raise TypeError(f"method {self.name!r} has no hyper-parameter {name!r}; it has {known}")

    def adapt_while_communicating(self) -> Rule:
        """This rule under the AWC schedule: the message is x itself, the update is unchanged.

        Raises ValueError for rules whose message is not one parameter-like value.
        """
        if self.average != "neighbors" or self.messages != 1 or not self._sends_x:
            raise ValueError(
                f"schedule='awc' needs a method with one message in the place of the parameters; {self.name!r} is not"
                " one. Use schedule='atc'."
            )
        if self.send is send_parameter:
            return self
        return Rule(self.name, send_parameter, self.update, self.state, self.hyper, self.derive, centered=self.centered)


def _find(module: str, name: str) -> Rule:
    return getattr(importlib.import_module(module), name)


def named(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple class whose fields are known only now."""
    return namedtuple(name, fields)  # type: ignore[misc]
