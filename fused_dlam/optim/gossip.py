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
from ..engine.anchored import average_inside
from ..engine.engine import Engine
from ..engine.flight import AVERAGING, OPEN
from ..engine.health import Health
from ..engine.message import Message
from ..engine.step_allowed import check_step_allowed
from ..layers.compression import Codec
from ..rules.averaging import mix, mix_ahead, mix_halfway
from ..rules.rule import Rule
from ..rules.scalars import Scalars
from ..theory.stability import rows_for
from ..topology import Topology, TopologyLike
from . import mixed_precision, options
from .frozen import Frozen
from .inner_copies import InnerCopies
from .of_inner import OfInner
from .old_names import translate
from .options import Options
from .outer import Outer
from .outer_steps import OuterSteps
from .rounds import MEMORY
from .shared import GossipOptimizer
from .succession import Succession
from .survival import Members, Survival, enter

AVERAGING_RULES = {
    "atc": (mix, Message.STEPPED),
    "midpoint": (mix_halfway, Message.HALFWAY),
    "awc": (mix_ahead, Message.COPY),
}


class Gossip(InnerCopies, OfInner, OuterSteps, GossipOptimizer):  # type: ignore[override]
    """Makes an optimizer decentralized: each `step` is the inner optimizer's step and an average with neighbors.

        atc       x' = W (x + d)          d the inner optimizer's step at x: adapt, then combine
        midpoint  x' = W (x + d/2) + d/2  the middle of the step is sent
        awc       x' = W x + d            x is sent when the last step ends, behind the next forward and backward pass

    (Chen and Sayed, "Diffusion adaptation strategies for distributed optimization and learning over networks", 2012;
    midpoint is ours, see fused_dlam/theory/README.md: with momentum it keeps all-reduce's range of learning rates.)
    With `torch.optim.SGD` atc is DmSGD. What is averaged are the parameters; the inner optimizer's state (momentum,
    second moments) stays each worker's own. Use it wherever an optimizer is used, learning rate schedulers included.
    It moves the parameters into flat buffers, as `GossipSGD` does, and broadcasts rank 0's.

    With every=H an exchange comes after H steps of the inner optimizer, and what is exchanged is the way g = x_0 - x_H
    that they went, or the x_0 from which they started. outer= is the method that steps x_0 with it (optim/rounds.py):

        local AdamW   Gossip(AdamW(...), every=50)
        DiLoCo        Gossip(AdamW(...), outer="nesterov-pmsgd", every=50, lr=0.7, momentum=0.9)
        ours, hidden behind the next round    Gossip(AdamW(...), outer="mi-dmsgd", every=50, schedule="awc")

    Args:
        optimizer: any `torch.optim.Optimizer`, already built, over a model on its device and not wrapped in DDP. It
            may do what it likes in its step but replace a parameter.
        outer: a name from `fused_dlam.rules.ALL` or a `Rule`; None: the average alone, without a method of its own.
        every: H, inner steps to an exchange. The same on all ranks, unless local_steps=True.
        lr, momentum: of the outer method, 0.7 and 0.9 by default. In the inner optimizer's groups they are "outer_lr"
            and "outer_momentum", and the method's own hyper-parameters "outer_...": schedule them there.
        local_steps: ranks may have an `every` of their own, and change it at any time; what they went counts by the
            mean number of steps over their own. Costs an all-reduce of two numbers per exchange.
        allow_unstable: run although the outer method's disagreement between workers grows.
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
        schedule: str = "auto",
        group: dist.ProcessGroup | None = None,
        *,
        outer: str | Rule | None = None,
        every: int = 1,
        lr: float | None = None,
        momentum: float | None = None,
        local_steps: bool = False,
        allow_unstable: bool = False,
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
        **hyper: Any,
    ):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Gossip wraps a torch.optim.Optimizer, not {type(optimizer).__name__}")
        if isinstance(optimizer, GossipOptimizer):
            raise TypeError(f"{type(optimizer).__name__} gossips already")
        topology, _, _ = translate(hyper, topology)
        everything = [p for g in optimizer.param_groups for p in g["params"]]
        chosen = Outer(outer, every, lr, momentum, local_steps, hyper)
        bucket_mb = chosen.bucket_mb(bucket_mb, schedule, everything)
        schedule = "atc" if schedule == "auto" and not chosen.on else schedule
        self._options = Options(
            schedule, False, None, (), comm_dtype, fused, bucket_mb, local_steps=local_steps, compress=compress
        )
        options.check_place(timeout, group, hierarchical)
        survival = Survival(on_failure, min_workers, admit_every, on_members_changed)
        rule, message = chosen.rule(schedule, hierarchical) or AVERAGING_RULES[schedule]
        membership, self._comes = enter(survival, timeout, group, hierarchical, rule, fused)
        where = layout(group, hierarchical)
        suits = partial(self._options.check_compression, rule)
        graphs = None
        if membership is not None:
            graphs = Succession(topology, rule if chosen.on else None, allow_unstable, self._outer_groups, suits)
        graph = graphs(where.size) if graphs and self._comes else topologies.get(topology, where.size)
        rows_for(rule, graph)
        if graph.n > 1 and graph.rho >= 1 - 1e-9 and rule.average != "gradient":
            raise ValueError(f"{graph.name} never brings its {graph.n} workers together: disagreement does not shrink")

        self._options.check_compression(rule, graph)
        self._rounds = chosen.rounds(rule, graph, allow_unstable)
        self.inner = optimizer
        self.__setstate__({})  # what Optimizer keeps beside groups and state, which stay the inner optimizer's
        self._entries = dict(
            gossip_topology=f"{graph.name} over {where.size}", gossip_schedule=rule.schedule if chosen.on else schedule,
            gossip_step=0,
        )  # fmt: skip
        if self._rounds is not None:
            self._entries["gossip_outer"] = rule.name
        if callable(getattr(optimizer, "eval", None)):
            raise TypeError(
                f"{type(optimizer).__name__} has eval(): a schedule-free optimizer keeps a second sequence of the"
                " parameters in its state, which gossip does not average, and the workers' drift apart. Use another"
                " optimizer, or average all of it by torch.distributed"
            )
        options.check_parameters(everything)
        survival.check_parameters(everything)
        self._frozen = Frozen()
        self._stepped: int | None = None  # the step in which the inner optimizer has stepped, while that lasts
        self._loss: Any = None
        self._place_options = hierarchical, timeout, "optimizer (Gossip)"
        place = self._first_place(where, membership, hierarchical is None)
        self._ahead = message.leaves_early
        self._running = Engine(rule, graph, place, message, (), fused, comm_dtype, bucket_mb,
                               elastic=survival.goes_on, codec=self._options.compress, anchored=chosen.on)  # fmt: skip
        self._health = Health(self._engine, "skip", lambda slot: f"a parameter of shape {tuple(slot.p.shape)}")
        for g in self.param_groups:
            self._enter(g)
        self._survive(survival, membership, graphs)

    def __repr__(self) -> str:
        topology, schedule = self._entries["gossip_topology"], self._entries["gossip_schedule"]
        outer = "" if self._rounds is None else f", outer={self._rounds.rule.name!r}, every={self.every}"
        return f"Gossip({topology!r}, {schedule!r}{outer}) of {self.inner!r}"

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
        self._enter_round(group)
        params = list({id(p): p for p in group["params"]}.values())
        name = {"the optimizer": type(self.inner).__name__}
        if not self._options.local_steps:
            name["every"] = str(self.every)
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
        if self._rounds is not None and not self._rounds.last:
            return self._inner_step(closure)
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
        if self._rounds is not None:
            return (self._end_round if self._rounds.last else self._inner_step)(closure, gradients)
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
        self._thaw()
        engine.refresh()
        if engine.silent:  # the inner optimizer's step and nothing else: no digit of a 16-bit parameter is rounded
            loss = self._local_step(closure, gradients, skip)
            if engine.step is not None:  # it had begun with others
                engine.end()
            return loss
        return self._exchanging_step(closure, gradients, skip)

    def _thaw(self) -> None:
        """Moves into flat buffers what is trainable now and was not."""
        if len(self.param_groups) != len(self._engine.local.passes):
            raise RuntimeError("a group was added to the inner optimizer: call add_param_group of Gossip")
        for number, params in self._frozen.thawed():
            self._frozen.enter_late(params, number, self._engine, self._step)

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
        if engine.averager.size == 1 or not (self._rounds is None or engine.averages_inside):
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
        # Waits for all before the first takes a gradient's place: where a worker is lost, all are of this one alone.
        if self._rounds is None:
            engine.bring(AVERAGING)
            actives = [engine.flight(b).active() for b in engine.buckets]
        else:
            actives = average_inside(engine, self._step)
        for b, active in zip(engine.buckets, actives, strict=True):
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
        if self._own_overflows:  # its own inner step alone: what is exchanged is a way, which has no scale
            return bool(getattr(self, "found_inf"))  # noqa: B009 -- a GradScaler's, and in no class
        return mixed_precision.overflowed(self)

    # -- other neighbors, see recovery.py ----------------------------------------------------------------------------

    @property
    def _own_overflows(self) -> bool:  # type: ignore[override]
        return self._rounds is not None and not self._engine.averages_inside

    def _outer_groups(self) -> list[dict[str, Any]]:
        assert self._rounds is not None
        return [self._rounds.settings_of(g) for g in self.param_groups]

    def _resume(self, graph: Topology) -> None:
        if self._rounds is not None:
            self._rounds.move(graph, self._outer_groups())
        self._entries["gossip_topology"] = f"{graph.name} over {graph.n}"
        for group in self.param_groups:
            group["gossip_topology"] = self._entries["gossip_topology"]

    def _set_step(self, step: int) -> None:
        for group in self.param_groups:
            group["gossip_step"] = step

    def _facts(self) -> dict[str, str]:
        return {"inner optimizer": type(self.inner).__name__, **super()._facts()}

    def _rest(self) -> Any:
        state = self.inner.state_dict()["state"]
        return state if self._rounds is None else (state, self._rounds.rest, [g[MEMORY] for g in self.param_groups])

    def _take_rest(self, rest: Any) -> None:
        if self._rounds is not None:
            rest, counts, memories = rest
            self._rounds.taken, self._rounds.batches = counts
            for group, memory in zip(self.param_groups, memories, strict=True):
                group[MEMORY] = dict(memory)
            self._note(self._rounds)
        self.inner.load_state_dict({**self.inner.state_dict(), "state": rest})
