"""A method is two equations: what a worker sends, and how it updates once its neighbors have pulled on it.

`Rule` holds the two equations, the names of the state buffers, and the hyper-parameters. Everything
else about a method (kernels, CPU passes, simulator, certificate, gate) is derived from this one object.
"""

from __future__ import annotations

import importlib
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .hyper import Default, Hyper, did_you_mean
from .jit import jit
from .scalars import Scalar, among

SCHEDULES = ("atc", "midpoint", "awc")

COMMON = ("lr", "momentum", "weight_decay")
MASSES = ("mass", "next_mass", "inverse_mass", "inverse_next_mass")
# An optimizer keeps hyper-parameters in its parameter groups, beside these entries.
RESERVED = (*COMMON, *MASSES, "params", "method", "topology", "schedule", "step", "memory", "maximize", "layers")


@jit
def send_parameter(x, g, s, h):
    """The message of the adapt-while-communicating schedule: x itself."""
    return (x,)


class Halfway:
    """The message of the midpoint schedule, (x + y)/2 where y is that of adapt then combine.

    It has the `fn` of an equation. What compiles equations takes that of y, `Rule.whole`, and adds the half itself.
    """

    def __init__(self, whole: Any):
        self.whole = whole

    def fn(self, x, g, s, h):
        return (h.theta * (x + self.whole.fn(x, g, s, h)[0]),)


class Rule:
    """A decentralized method, written once as two element-wise functions with + - * / and `.sqrt()` only.

        send(x, g, s, h)          -> tuple of messages
        update(x, g, s, pull, h)  -> x', tuple of new state buffers

    x is the parameter and g the gradient. s is a named tuple of this worker's state buffers, which all start at zero.
    h is a named tuple of scalars. pull has one value per message: pull[k] = sum_j W[i, j] (message k of j - my message
    k). So `message + pull` is the weighted average when the weights of a row sum to one. Both functions are decorated
    with `fused_dlam.jit`. They may use their arguments and nothing else: no other functions, and no Python constants,
    because a constant would change the precision in compiled code.

    Args:
        name: the method's name, as users and checkpoints see it.
        send, update: the two equations.
        state: names of the state buffers, e.g. "momentum_buffer" (what `torch.optim.SGD` calls it).
        hyper: hyper-parameters beyond lr, momentum and weight_decay, by name. Each is a `Hyper`, or a default alone (a
            number or a function of (momentum, rho) or (momentum, rho, static)), which then has no bounds. They are
            fields of h.
        derive: `derive(h, memory) -> dict` adds scalars to h that the host computes once per step, such as a guarded
            1/lr. `h` is a dict. `memory` is a dict of floats that outlives the step and is saved in checkpoints.
            Where lr is a tensor on a GPU, h["lr"] and what is kept of it are 0-d float64 tensors there. + - * / and
            the functions of `rules.scalars` leave them there; `max`, `if` and `float` work, but wait for the GPU.
        average: "neighbors" for gossip. "gradient" averages the gradient over all workers by all-reduce before
            `update`; then send must return the gradient.
        centered: state buffers whose mean over the workers is zero by definition, like an integral of pulls. A
            checkpoint for another number of workers starts them from zero.
        counts: the entry of `memory` in which `derive` counts steps, if it does. A parameter whose gradients came
            later than its group's then has bias corrections of its own: see `scalars_at`.
        mass: which of the worker's masses the method reads (topology/mass.py): "mass", w before the step, "next_mass",
            after it, "inverse_mass", 1/w, "inverse_next_mass". They are fields of h, and there for `derive`; one each
            where the graph is doubly stochastic. Only such methods run where columns alone sum to one. What they
            average is x / w, with rows that sum to one, and their schedule is "atc".
        rounds: `derive` also finds h["exchanges"], whether anybody hears from anybody in this step. For methods with
            local steps, which do something of their own when a round of them ends.
        schedule: the method's own, which an optimizer takes with schedule="auto": see `under`. "auto": "atc", or "awc"
            where the message is x itself. `send` is the message of "atc" in any case.

    Raises TypeError if an equation is not decorated with `jit`. Raises ValueError if the results of an equation have
    the wrong form, if a hyper-parameter has a name that a parameter group needs for something else, or if `derive` does
    not count in `counts`.
    """

    def __init__(
        self,
        name: str,
        send: Any,
        update: Any,
        state: tuple[str, ...] = (),
        hyper: Mapping[str, Hyper | Default] | None = None,
        derive: Callable[[dict, dict], dict] | None = None,
        average: str = "neighbors",
        centered: tuple[str, ...] = (),
        counts: str | None = None,
        schedule: str = "auto",
        mass: Iterable[str] = (),
        rounds: bool = False,
    ):
        for what, function in (("send", send), ("update", update)):
            if not callable(getattr(function, "fn", None)):
                raise TypeError(f"rule {name!r}: {what} must be decorated with @fused_dlam.jit")
        if average not in ("neighbors", "gradient"):
            raise ValueError(f"rule {name!r}: average must be 'neighbors' or 'gradient', not {average!r}")
        self.name, self.update = name, update
        self.average, self._send = average, send
        self.state = tuple(state)
        self.centered = tuple(centered)
        if not set(self.centered) <= set(self.state):
            raise ValueError(f"rule {name!r}: centered names {self.centered}, but its state is {self.state}")
        self.mass = tuple(mass)
        if not set(self.mass) <= set(MASSES):
            raise ValueError(f"rule {name!r}: mass names {self.mass}, but there are {MASSES}")
        taken = [key for key in hyper or () if key in RESERVED]
        if taken:
            raise ValueError(f"rule {name!r}: no hyper-parameter may be called {taken[0]!r}; the optimizer uses that")
        self.hyper = {key: h if isinstance(h, Hyper) else Hyper(h) for key, h in (hyper or {}).items()}
        self.derive, self.counts, self.rounds = derive, counts, rounds
        self.schedule = "awc" if send is send_parameter else "atc"
        self.traveled = False
        self._try()
        if schedule != "auto":
            self._follow(schedule)

    def _try(self) -> None:
        """Evaluates both equations on single numbers: tells the number of messages, and finds mistakes of form."""
        self.State = named("State", self.state)
        memory: dict[str, Any] = {}
        values = self._values(lr=1.0, momentum=0.5, weight_decay=0.0, rho=0.5, hyper={}, memory=memory)
        if self.counts is not None and memory.get(self.counts) != 1:
            raise ValueError(
                f"rule {self.name!r}: counts={self.counts!r}, but derive leaves memory = {memory} after one step: it"
                f" must count steps in memory[{self.counts!r}]"
            )
        if "theta" in values:
            raise ValueError(f"rule {self.name!r}: theta is the schedule's, see `under`: call it something else")
        self.H = named("H", tuple(values))
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        h, s = self.H(**values), self.State(*(zero for _ in self.state))
        messages = self._send.fn(one, zero, s, h)
        if not isinstance(messages, tuple) or not messages:
            raise ValueError(f"rule {self.name!r}: send must return a non-empty tuple of messages, not {messages!r}")
        self.messages = len(messages)
        # A message such as x - lr g equals x where g and the state are zero. Such a message may be replaced by x.
        self._sends_parameters = bool(messages[0] == 1.0)
        result = self.update.fn(one, zero, s, (zero,) * self.messages, h)
        buffers = result[1] if isinstance(result, tuple) and len(result) == 2 else None
        if not isinstance(buffers, tuple) or len(buffers) != len(self.state):
            raise ValueError(f"rule {self.name!r}: update must return x', (one value for each of {self.state})")

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

    def _values(
        self, lr, momentum, weight_decay, rho, hyper, memory, static=False, exchanges=True, mass=None
    ) -> dict[str, Any]:
        values: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        if self.mass:
            w, after = (1.0, 1.0) if mass is None else mass
            known = dict(zip(MASSES, (w, after, 1.0 / w, 1.0 / after), strict=True))
            values.update({name: known[name] for name in self.mass})
        for name, value in self.defaults(hyper).items():
            values[name] = self.hyper[name].auto(momentum, rho, static) if value == "auto" else float(value)
        if self.derive is not None:
            values.update(self.derive({**values, "exchanges": exchanges} if self.rounds else values, memory))
        if self.halfway:
            values["theta"] = 0.5
        return values

    def scalars(
        self,
        lr: Scalar,
        momentum: float,
        weight_decay: float,
        rho: float = 0.0,
        hyper=None,
        memory=None,
        static: bool = False,
        exchanges: bool = True,
        mass: tuple[Any, Any] | None = None,
    ) -> Any:
        """h for one step. `memory` is updated in place: call this once per step. rho, static: see `Default`.

        exchanges: whether this step's matrix has neighbors (`topology.exchanges`); counts where the rule has `rounds`.
        mass: the worker's before and after the step (or arrays of all workers' masses); None: one each. It counts where
        the rule reads masses.
        """
        memory = {} if memory is None else memory
        values = self._values(lr, momentum, weight_decay, rho, hyper or {}, memory, static, exchanges, mass)
        return self.H(**values)

    def scalars_at(
        self,
        count: Scalar,
        lr: Scalar,
        momentum: float,
        weight_decay: float,
        rho: float = 0.0,
        hyper=None,
        memory=None,
        static: bool = False,
        mass: tuple[Any, Any] | None = None,
        exchanges: bool = True,
    ) -> Any:
        """h for a parameter that has taken `count` steps before this one; `memory` is left as it is.

        Only for rules with `counts`. The rest of `memory` counts as it is given: as it was before this step.
        """
        if self.counts is None:
            raise ValueError(f"rule {self.name!r} counts no steps")
        memory = {**(memory or {}), self.counts: count}
        return self.scalars(lr, momentum, weight_decay, rho, hyper, memory, static, exchanges, mass)

    def defaults(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a parameter group: a value for every hyper-parameter, a number or "auto"."""
        values = {name: "auto" if callable(h.default) else h.default for name, h in self.hyper.items()}
        return values | {name: hyper[name] for name in values if hyper.get(name) is not None}

    def check_hyper(self, values: Mapping[str, Any], options: Iterable[str] = ()) -> None:
        """Raises TypeError for a hyper-parameter this method does not have, ValueError for a value out of bounds.

        options: what else the caller would have taken by name, and may have been meant.
        """
        for name in values:
            if name not in self.hyper:
                known = (*COMMON, *self.hyper)
                meant = did_you_mean(name, (*known, *options))
                raise TypeError(
                    f"method {self.name!r} has no hyper-parameter {name!r}; it has {', '.join(known)}{meant}"
                )
        for name, value in values.items():
            if not self.hyper[name].allows(value):
                raise ValueError(f"Invalid {name}: {value!r}, must be {self.hyper[name].bounds}")

    def under(self, schedule: str) -> Rule:
        """This rule with the message of a schedule; the update stays. One family: the message is x + theta d.

            atc        theta = 1     adapt then combine: y = x + d, the rule's `send`
            midpoint   theta = 1/2   (x + y)/2: x' = W (x + d/2) + d/2
            awc        theta = 0     adapt while communicating: x, which is there before d

        d is the worker's own step. "auto" is the method's own schedule.

        Raises ValueError for other names, and for rules whose message is not one value in the place of the parameters.
        """
        check_schedule(schedule)
        if schedule in ("auto", self.schedule):
            return self
        other = self._copy()
        other._follow(schedule)
        return other

    def outer(self) -> Rule:
        """This rule around an inner optimizer: passes are given, for g, the parameters y to which that came from x, and
        g = x - y."""
        other = self._copy()
        other.traveled = True
        return other

    def _copy(self) -> Rule:
        other = object.__new__(type(self))  # copy.copy would take the way of pickle, and return this one
        vars(other).update(vars(self))
        return other

    def _follow(self, schedule: str) -> None:
        check_schedule(schedule)
        if self.average != "neighbors" or self.messages != 1 or not self._sends_parameters or self.mass:
            raise ValueError(
                f"schedule={schedule!r} needs a method with one message in the place of the parameters, and without"
                f" masses, which are others once x is sent; {self.name!r} is not one. Use schedule='atc'."
            )
        if self._send is send_parameter:
            raise ValueError(f"method {self.name!r} sends x itself: its schedule is 'awc', not {schedule!r}")
        self.schedule = schedule
        fields = tuple(f for f in self.H._fields if f != "theta")
        self.H = named("H", (*fields, "theta") if self.halfway else fields)

    @property
    def send(self) -> Any:
        """The equation of the messages; `send.fn(x, g, s, h)` are the messages."""
        return Halfway(self.whole) if self.halfway else self.whole

    @property
    def whole(self) -> Any:
        """The equation to compile: of y where `halfway`, for the message is then h.theta (x + y)."""
        return send_parameter if self.schedule == "awc" else self._send

    @property
    def halfway(self) -> bool:
        return self.schedule == "midpoint"


def check_schedule(schedule: Any) -> None:
    """Raises ValueError for what is no schedule."""
    if not among(schedule, (*SCHEDULES, "auto")):
        raise ValueError(f"Invalid schedule: {schedule!r}, must be 'auto', 'atc', 'midpoint' or 'awc'")


def _find(module: str, name: str) -> Rule:
    return getattr(importlib.import_module(module), name)


def named(name: str, fields: tuple[str, ...]) -> Any:
    """A named tuple class whose fields are known only now."""
    return namedtuple(name, fields)  # type: ignore[misc]
