"""`Gossip`: any torch optimizer, its workers averaging with a few neighbors instead of all-reducing gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from .. import topology as topologies
from ..comm import sharded
from ..comm.place import layout
from ..engine.engine import Engine
from ..engine.flight import AVERAGING, OPEN
from ..engine.health import Health
from ..engine.message import Message
from ..engine.step_allowed import check_step_allowed
from ..layers.compression import Codec
from ..rules.averaging import mix, mix_ahead, mix_halfway
from ..rules.scalars import Scalars
from ..theory.stability import rows_for
from ..topology import Topology, TopologyLike
from . import mixed_precision, options
from .frozen import Frozen
from .inner_copies import InnerCopies
from .of_inner import OfInner
from .old_names import translate
from .options import Options
from .shared import GossipOptimizer
from .succession import Succession
from .survival import Members, Survival, enter

AVERAGING_RULES = {
    "atc": (mix, Message.STEPPED),
    "midpoint": (mix_halfway, Message.HALFWAY),
    "awc": (mix_ahead, Message.COPY),
}


class Gossip(InnerCopies, OfInner, GossipOptimizer):  # type: ignore[override]
    """Makes an optimizer decentralized: each `step` is the inner optimizer's step and an average with neighbors.

        atc       x' = W (x + d)          d the inner optimizer's step at x: adapt, then combine
        midpoint  x' = W (x + d/2) + d/2  the middle of the step is sent
        awc       x' = W x + d            x is sent when the last step ends, behind the next forward and backward pass

    (Chen and Sayed, "Diffusion adaptation strategies for distributed optimization and learning over networks", 2012;
    midpoint is ours, see fused_dlam/theory/README.md: with momentum it keeps all-reduce's range of learning rates.)
    With `torch.optim.SGD` atc is DmSGD. What is averaged are the parameters; the inner optimizer's state (momentum,
    second moments) stays each worker's own. Use it wherever an optimizer is used, learning rate schedulers included.
    It moves the parameters into flat buffers, as `GossipSGD` does, and broadcasts rank 0's.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built, over a model on its device and not wrapped in DDP. It
            may do what it likes in its step but replace a parameter.
        topology, schedule, group, hierarchical, comm_dtype, fused, bucket_mb, timeout, on_failure, min_workers,
            admit_every, on_members_changed, compress: as in `GossipSGD`. With hierarchical= gradients are averaged
            inside a machine before the inner step. No message leaves before the backward pass is over, so there is no
            overlap=.

    Raises TypeError or ValueError for bad input, also if the topology never brings its workers together, before
    anything is sent; `fused_dlam.ExchangeError` if a peer does not answer in time.

    16-bit parameters get a float32 master that takes over what the inner optimizer did to them and is averaged, so
    that averaging rounds nothing away; what the inner optimizer rounds stays rounded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        topology: TopologyLike = "one-peer-exponential",
        schedule: str = "atc",
        group: dist.ProcessGroup | None = None,
        *,
        hierarchical: Any = None,
        comm_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        bucket_mb: float | None = None,
        timeout: float = 600.0,
        on_failure: str = "raise",
        min_workers: int = 1,
        admit_every: int = 100,
        on_members_changed: Callable[[Members], Any] | None = None,
        compress: str | Codec | None = None,
        **old: Any,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Gossip wraps a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if isinstance(optimizer, GossipOptimizer):
            raise TypeError(f"{type(optimizer).__name__} gossips already")
        topology, _, _ = translate(old, topology)
        if old:
            raise TypeError(f"Gossip.__init__() got an unexpected keyword argument {next(iter(old))!r}")
        schedule = "atc" if schedule == "auto" else schedule
        self._options = Options(schedule, False, None, (), comm_dtype, fused, bucket_mb, compress=compress)
        options.check_place(timeout, group, hierarchical)
        survival = Survival(on_failure, min_workers, admit_every, on_members_changed)
        rule, message = AVERAGING_RULES[schedule]
        membership, self._comes = enter(survival, timeout, group, hierarchical, rule, fused)
        where = layout(group, hierarchical)
        suits = partial(self._options.check_compression, rule)
        graphs = None if membership is None else Succession(topology, None, suits=suits)
        graph = graphs(where.size) if graphs and self._comes else topologies.get(topology, where.size)
        rows_for(rule, graph)
        if graph.n > 1 and graph.rho >= 1 - 1e-9:
            raise ValueError(f"{graph.name} never brings its {graph.n} workers together: disagreement does not shrink")

        self._options.check_compression(rule, graph)
        self.inner = optimizer
        self.__setstate__({})  # what Optimizer keeps beside groups and state, which stay the inner optimizer's
        self._entries = dict(gossip_topology=f"{graph.name} over {where.size}", gossip_schedule=schedule, gossip_step=0)
        if callable(getattr(optimizer, "eval", None)):
            raise TypeError(
                f"{type(optimizer).__name__} has eval(): a schedule-free optimizer keeps a second sequence of the"
                " parameters in its state, which gossip does not average, and the workers' drift apart. Use another"
                " optimizer, or average all of it by torch.distributed"
            )
        everything = [p for g in self.param_groups for p in g["params"]]
        options.check_parameters(everything)
        survival.check_parameters(everything)
        self._frozen = Frozen()
        self._stepped: int | None = None  # the step in which the inner optimizer has stepped, while that lasts
        self._loss: Any = None
        self._place_options = hierarchical, timeout, "optimizer (Gossip)"
        place = self._first_place(where, membership, hierarchical is None)
        self._ahead = message.leaves_early
        self._running = Engine(rule, graph, place, message, (), fused, comm_dtype, bucket_mb,
                               elastic=survival.goes_on, codec=self._options.compress)  # fmt: skip
        self._health = Health(self._engine, "skip", lambda slot: f"a parameter of shape {tuple(slot.p.shape)}")
        for g in self.param_groups:
            self._enter(g)
        self._survive(survival, membership, graphs)

    def __repr__(self) -> str:
        topology, schedule = self._entries["gossip_topology"], self._entries["gossip_schedule"]
        return f"Gossip({topology!r}, {schedule!r}) of {self.inner!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch. With several workers all ranks must do so before the same step."""
        self.inner.add_param_group(param_group)
        try:
            self._enter(self.param_groups[-1])
        except Exception:
            self._drop_group()
            raise

    def _enter(self, group: dict[str, Any]) -> None:
        """Takes a group in, which keeps what this optimizer was built with."""
        engine = self._engine
        options.check_parameters(group["params"])
        group.update({**self._entries, "gossip_step": self._step})
        params = list({id(p): p for p in group["params"]}.values())
        name = {"the optimizer": type(self.inner).__name__}
        self._take_in(params, lambda: name | options.facts(group, params, engine, self._options))

    @property
    def _step(self) -> int:  # type: ignore[override]
        return self.param_groups[0].get("gossip_step", 0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # as in GossipSGD
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The inner optimizer's step and one exchange. Every rank must call it equally often.

        Args:
            closure: passed on to the inner optimizer; with hierarchical= it is called once, before its step.

        Raises RuntimeError if a parameter was moved or replaced, ExchangeError if a peer does not answer.
        """
        self._check_connected()
        check_step_allowed(self._engine, self._averaging)
        return self._exchange(lambda: self._advance(closure))

    def local_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Raises RuntimeError: `GossipSGD` has it, see there."""
        raise RuntimeError(
            "Gossip takes no local_step(): it does not know what of an inner optimizer's step is in proportion to the"
            " rate, and cannot weigh it. GossipSGD(local_steps=True) can; as many steps on every rank between exchanges"
            " are topology=lambda n: topology.ring(n).every(4)"
        )

    def _advance(self, closure: Callable[[], Any] | None = None, gradients: bool = True) -> Any:
        """One step. Without gradients: for the other ranks' sake, see `join`.

        Called again when an exchange failed it goes on, alone, from where that was.
        """
        if self._stepped != self._step:
            self._loss = self._step_and_mix(closure, gradients)
        else:
            self._engine.check_whole()
            self._engine.end()
        for group in self.param_groups:
            group["gossip_step"] += 1
        loss, self._loss, self._stepped = self._loss, None, None
        return loss

    def _step_and_mix(self, closure: Callable[[], Any] | None, gradients: bool) -> Any:
        engine = self._engine
        skip = self._overflow_elsewhere
        if gradients:
            self._take_part(True, scaled=getattr(self, "found_inf", None) is not None)
            skip = self._overflowed()
        if len(self.param_groups) != len(engine.local.passes):
            raise RuntimeError("a group was added to the inner optimizer: call add_param_group of Gossip")
        for number, params in self._frozen.thawed():
            self._frozen.enter_late(params, number, engine, self._step)
        engine.refresh()
        if engine.silent:  # the inner optimizer's step and nothing else: no digit of a 16-bit parameter is rounded
            loss = self._local_step(closure, gradients, skip)
            if engine.step is not None:  # it had begun with others
                engine.end()
            return loss
        return self._exchanging_step(closure, gradients, skip)

    def _exchanging_step(self, closure: Callable[[], Any] | None, gradients: bool, skip: bool) -> Any:
        engine = self._engine
        if engine.step is None:  # else the last attempt raised: it goes on from there
            rates = tuple(g["lr"] for g in self.param_groups if isinstance(g.get("lr"), float))
            engine.settings = rates, ()
            engine.begin(self._step)
            engine.set_scalars([Scalars(engine.rule.scalars(0.0, 0.0, 0.0), ())] * len(engine.local.passes))
        if not engine.gossips:  # one machine: gradients are averaged inside it, and there is nobody to mix x with
            loss = self._local_step(closure, gradients, skip)
            engine.end()
            return loss
        if self._ahead:
            engine.bring(OPEN)  # a copy of x leaves before the inner optimizer steps x
        if engine.message is Message.HALFWAY:  # at each attempt: nothing has left, and the script may have written x
            for b in engine.buckets:
                b.absorb()
                b.state[0].copy_(b.x)
        loss = self._local_step(closure, gradients, skip)
        for b in engine.buckets:
            b.refresh()
            b.absorb(stepped=True)
        self._stepped, self._loss = self._step, loss
        self._health.look(self._step)
        engine.complete(self._ahead)
        return loss

    def _local_step(self, closure: Callable[[], Any] | None, gradients: bool, skip: bool) -> Any:
        engine, loss = self._engine, None
        scale = getattr(self, "grad_scale", None)
        if engine.averager.size == 1:
            if skip or not gradients:
                return None
            grads = [sharded.local(p.grad) for g in self.param_groups for p in g["params"] if p.grad is not None]
            if scale is not None and grads:
                torch._foreach_div_(grads, scale)
            return self.inner.step() if closure is None else self.inner.step(closure)
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for b in engine.buckets:
            b.refresh()
        engine.factor = self._join_factor * mixed_precision.to_common_scale(self)  # ranks may have scales of their own
        scale = getattr(self, "grad_scale", None)
        engine.bring(AVERAGING)
        # Waits for all before the first takes a gradient's place: where a worker is lost, all are of this one alone.
        for b, active in [(b, engine.flight(b).active()) for b in engine.buckets]:
            torch.div(b.g, 1.0 if scale is None else scale, out=b.grads)
            for slot, now in zip(b.slots, active, strict=True):
                slot.p.grad = slot.installed if now else None
        if not skip:
            self.inner.step()
        return loss

    def _overflowed(self) -> bool:
        """Whether a GradScaler found an overflow on any rank, see mixed_precision.py."""
        if getattr(self, "found_inf", None) is None:
            return False
        return mixed_precision.overflowed(self)

    # -- other neighbors, see recovery.py ----------------------------------------------------------------------------

    def _resume(self, graph: Topology) -> None:
        self._entries["gossip_topology"] = f"{graph.name} over {graph.n}"
        for group in self.param_groups:
            group["gossip_topology"] = self._entries["gossip_topology"]

    def _set_step(self, step: int) -> None:
        for group in self.param_groups:
            group["gossip_step"] = step

    def _facts(self) -> dict[str, str]:
        return {"inner optimizer": type(self.inner).__name__, **super()._facts()}

    def _rest(self) -> Any:
        return self.inner.state_dict()["state"]

    def _take_rest(self, rest: Any) -> None:
        self.inner.load_state_dict({**self.inner.state_dict(), "state": rest})
