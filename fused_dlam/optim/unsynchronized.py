"""What `PushSum` and `PairGossip` have in common: any torch optimizer, whose workers never wait for each other.

Collective are construction, `drained`, `averaged`, `consensus_distance` and `close`: all ranks must call them equally
often. A step is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from ..comm.asynchronous import Asynchronous
from ..comm.errors import ExchangeError, calling
from ..comm.group import Alone, Group
from ..comm.place import Place, needs_process_group
from ..comm.watch import ClosedError, log
from . import options
from .averaged import Averaged, agree, beside
from .flat_parameters import FlatParameters
from .frozen import writable
from .of_inner import OfInner
from .shared import GossipOptimizer


class Unsynchronized(OfInner):
    """The inner optimizer's groups and state are this one's: schedulers, zero_grad and hooks work as on any other."""

    _box: Asynchronous  # what carries messages
    key = ""  # of this optimizer's entry in a state_dict

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup | None, timeout: float):
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name} wraps a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if isinstance(optimizer, (Unsynchronized, GossipOptimizer)):
            raise TypeError(f"{type(optimizer).__name__} averages with others already")
        if callable(getattr(optimizer, "eval", None)):
            raise TypeError(
                f"{type(optimizer).__name__} has eval(): a schedule-free optimizer keeps a second sequence of the"
                " parameters in its state, which is not averaged, and the workers' drift apart"
            )
        options.check_place(timeout, group, None)
        needs_process_group(group)
        self.inner = optimizer
        everything = self._everything()
        options.check_parameters(everything)
        self._flat = FlatParameters([p for p in everything if p.requires_grad])
        self.__setstate__({})  # what Optimizer keeps beside groups and state, which stay the inner optimizer's
        self._step, self._closed, self._averaging, self._dropped = 0, False, False, 0
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1
        device = self._flat.device
        self._group = Alone(device) if alone else Group(group, timeout, device=device, what=f"optimizer ({name})")
        shapes = [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in everything]
        self._group.agree({"the optimizer": f"{name} of {type(optimizer).__name__}", "the parameters": str(shapes)})
        with torch.no_grad():
            for p in everything:
                values = writable(p).detach().clone(memory_format=torch.contiguous_format)
                self._group.broadcast(torch.view_as_real(values) if values.is_complex() else values)
                p.copy_(values)
            self._flat.write(self._flat.read())

    def _everything(self) -> list[torch.Tensor]:
        return list({id(p): p for group in self.param_groups for p in group["params"]}.values())

    # -- the inner optimizer's ---------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises RuntimeError: messages have one form for life."""
        raise RuntimeError(f"messages of a {type(self).__name__} have one form for life: build a new one on all ranks")

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"a {type(self).__name__} holds connections and cannot be copied: copy its state_dict()")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._box!r}) of {self.inner!r}"

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # as in GossipSGD
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The inner optimizer's step, and what has come of others meanwhile. Waits for nobody.

        A step whose result is not finite is left out, and logged: the parameters stay where they were. (The inner
        optimizer's state may hold it on: see its documentation.)

        Raises RuntimeError after `close()`, within `averaged()`, and for a parameter that was frozen at construction;
        ExchangeError after a loss where on_loss="raise". All of them before anything has changed.
        """
        self._check_open("step()")
        self._flat.check(self._everything())
        with calling("optimizer.step()"), self._box.at_once() if self._group.size > 1 else nullcontext():
            return self._step_at_once(closure)

    def _step_at_once(self, closure: Callable[[], Any] | None) -> Any:
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        if self._group.size > 1:
            d = self._flat.moved()
            if not bool(d.isfinite().all()):
                d.zero_()
                self._dropped += 1
                if self._dropped & (self._dropped - 1) == 0:  # the 1st, 2nd, 4th ... time
                    log.warning("rank %d at step %d: the inner optimizer's step is not finite, and left out (no. %d)",
                                self._group.ranks[self._group.rank], self._step, self._dropped)  # fmt: skip
            self._flat.write(self._mix(d))
        self._step += 1
        return loss

    def _mix(self, d: torch.Tensor) -> torch.Tensor:
        """What the parameters are to be after this worker's step added d to them. Sends what there is to send."""
        raise NotImplementedError

    def _gather(self) -> torch.Tensor:
        """What the parameters are with all that has come."""
        raise NotImplementedError

    def _share(self) -> tuple[torch.Tensor, float]:
        """(x, mass): the mean of all workers is the sum of x over that of the masses."""
        raise NotImplementedError

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise ClosedError("this optimizer was closed, and exchanges nothing any more: build a new one")
        if self._averaging:
            raise RuntimeError(f"{call} within averaged(), where the parameters are the workers' mean: call it outside")

    @property
    def lost(self) -> set[int]:
        """The workers that died, were cut off, or left, of those that this one sends to or hears from."""
        return self._box.lost

    # -- all together ------------------------------------------------------------------------------------------------

    @contextmanager
    def drained(self) -> Iterator[None]:
        """A context in which nothing is in flight, and all that was sent has been taken in. All ranks must enter it.

        For checkpoints: `state_dict` and the parameters belong together there. See `Mailbox.drained`.
        """
        self._check_open("drained()")
        with ExitStack() as stack:
            with calling("optimizer.drained()"):
                stack.enter_context(self._box.drained())
                self._settle()
            yield

    @torch.no_grad()
    def _settle(self) -> None:
        if self._group.size > 1:
            with self._box.at_once(check=False):  # others are within it: a loss is told by the next call
                self._mixed_in(self._flat.moved())  # what the script did since the last step
                self._flat.write(self._gather())

    def _mixed_in(self, d: torch.Tensor) -> None:
        """This worker's d is added, and nothing sent."""
        raise NotImplementedError

    @contextmanager
    def averaged(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Within the context the parameters are the workers' mean; afterwards each worker has its own, bit for bit.

        Args:
            model: also averages its floating-point buffers (BatchNorm's running statistics).

        All ranks must enter it. Raises ExchangeError where a worker was lost: those that are left have no group of
        their own; what each has (`optimizer.lost`, its parameters) can be evaluated without.
        """
        with ExitStack() as back:
            with torch.no_grad(), calling("optimizer.averaged()"):
                back.enter_context(self.drained())
                self._averaging = True
                back.callback(setattr, self, "_averaging", False)
                if self._group.size > 1:
                    self._put_means(model, back)
            yield

    def _put_means(self, model: torch.nn.Module | None, back: ExitStack) -> None:
        mean = self._mean()
        place = Place(self._group, Alone(self._flat.device))
        others = {} if model is None else beside(model, {id(p) for p in self._flat.params})[0]
        agree(place, others)
        own = [p.detach().clone() for p in self._flat.params]
        back.callback(torch.no_grad()(self._flat.restore), own)
        for p, part in zip(self._flat.params, mean.split(self._flat.sizes), strict=True):
            p.copy_(part.view(p.shape))
        for tensor in others.values():
            one = Averaged(tensor)
            values = one.read()
            back.callback(torch.no_grad()(one.write), values)
            one.write(one.mean(values, place))

    def _mean(self) -> torch.Tensor:
        if self.lost:
            ranks = self._group.ranks
            error = ExchangeError(
                f"rank {ranks[self._group.rank]}: the mean of all workers cannot be had after a loss (of"
                f" {sorted(ranks[j] for j in self.lost)})"
            )
            error.rank, error.lost, error.call = ranks[self._group.rank], True, "optimizer.averaged()"
            raise error
        x, mass = self._share()
        total = torch.tensor([mass], dtype=torch.float64)
        self._group.mean(x)
        self._group.mean(total)
        return x / float(total)

    def consensus_distance(self) -> float:
        """sqrt(1/n sum_i |x_i - mean|^2) over the parameters: how far apart the workers are. All ranks must call it."""
        with calling("optimizer.consensus_distance()"), self.drained(), torch.no_grad():
            if self._group.size == 1:
                return 0.0
            apart = torch.linalg.vector_norm(self._mean().sub_(self._flat.read()), dtype=torch.float64).square()
            total = apart.reshape(1).cpu()
            self._group.mean(total)
            return math.sqrt(float(total))

    def close(self, deadline: float | None = None) -> None:
        """All ranks: takes in all that was sent, and gives back threads and connections. See `Mailbox.close`."""
        if self._closed:
            return
        self._check_open("close()")
        try:
            self._box.close(deadline)
        finally:
            self._closed = True
            self._settle()
            self._group.close()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with what this worker has of the average, under the class's `key`.

        Call it within `drained()` on all ranks, else what is in flight is in no checkpoint: that is logged.
        """
        if self._group.size > 1 and not (self._box.inside or self._closed):
            log.warning("rank %d: state_dict() outside of drained(): what is in flight will be missing in it",
                        self._group.ranks[self._group.rank])  # fmt: skip
        # One worker alone mixes nothing: its parameters are all there is.
        x, mass = self._share() if self._group.size > 1 else (self._flat.read(), 1.0)
        return {**self.inner.state_dict(), self.key: {"x": x, "mass": mass, "step": self._step}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this worker, or one of the inner optimizer alone, which goes on from the parameters.

        On all ranks: after construction, or within `drained()`. Parameters get the checkpoint's values.

        Raises ValueError for a checkpoint of another number of parameters, before anything has changed.
        """
        self._check_open("load_state_dict()")
        own = state_dict.get(self.key)
        numbers = sum(self._flat.sizes)
        if own is not None and (own["x"].numel() != numbers or not own["mass"] > 0):
            raise ValueError(
                f"the checkpoint has {own['x'].numel()} numbers in its parameters and mass {own['mass']}, this"
                f" optimizer {numbers} and a mass above 0: it is one of another model"
            )
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != self.key})
        if own is None:
            own = {"x": self._flat.read(), "mass": 1.0, "step": 0}
        self._step = int(own["step"])
        x, mass = own["x"].to(self._flat.device, self._flat.dtype), float(own["mass"])
        self._flat.write(self._restore(x, mass) if self._group.size > 1 else x / mass)

    def _restore(self, x: torch.Tensor, mass: float) -> torch.Tensor:
        """Goes on from a checkpoint's values; returns the parameters'."""
        raise NotImplementedError
