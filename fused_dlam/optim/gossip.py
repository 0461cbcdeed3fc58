"""`Gossip`: any torch optimizer, its workers averaging with a few neighbors instead of all-reducing gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from .. import topology as topologies
from ..comm.place import layout
from ..engine.engine import Engine
from ..engine.health import Health
from ..engine.message import Message
from ..layers.compression import Codec
from ..rules.averaging import mix, mix_ahead, mix_halfway
from ..rules.rule import Rule
from ..theory.stability import rows_for
from ..topology import Topology, TopologyLike
from . import options
from .counter import Counter
from .frozen import Frozen
from .gossip_steps import GossipSteps
from .inner_copies import InnerCopies
from .old_names import translate
from .options import Options
from .outer import Outer, advise
from .outer_steps import forget_rounds
from .rounds import MEMORY
from .shared import GossipOptimizer
from .succession import Succession
from .survival import Members, Survival, enter

AVERAGING_RULES = {
    "atc": (mix, Message.STEPPED),
    "midpoint": (mix_halfway, Message.HALFWAY),
    "awc": (mix_ahead, Message.COPY),
}


class Gossip(InnerCopies, GossipSteps):  # type: ignore[override]
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
        ours, hidden  Gossip(AdamW(...), outer="nesterov-mi-dmsgd", every=50, lr=0.7, momentum=0.6, schedule="awc")

    Within a round the parameters are this worker's own y, also in `model.state_dict()`; `averaged` has their mean. What
    a script writes into them there, `model.load_state_dict` included, is kept, as a part of the way g that the outer
    method steps with. So load a model on all ranks before this is built, or call `synchronize` on all ranks first: then
    a round begins at what was loaded. A gradient that is not finite goes to the inner optimizer as it is, as in torch.
    A loss scaler's overflow is the rank's own (with hierarchical= the machine's), whose inner step is left out.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built, over a model on its device and not wrapped in DDP. It
            may do what it likes in its step but replace a parameter.
        outer: a name from `fused_dlam.rules.ALL` or a `Rule`; None: the average alone, without a method of its own.
        every: H, inner steps to an exchange. The same on all ranks, unless local_steps=True.
        lr, momentum: of the outer method, 0.7 and 0.9 by default. In the inner optimizer's groups they are "outer_lr"
            and "outer_momentum", and the method's own hyper-parameters "outer_...": schedule them there.
        local_steps: ranks may have an `every` of their own, and change it at any time; what they went counts by the
            mean number of steps over their own. Costs an all-reduce of two numbers per exchange. What all ranks call
            (`averaged`, checkpoints) is then to be called after steps that exchanged.
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
        if {"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"} & {kind.__name__ for kind in type(optimizer).__mro__}:
            raise TypeError(
                f"{type(optimizer).__name__} sends parameters to other ranks in its own step(): give Gossip the"
                " optimizer that it is built around"
            )
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
        rule, message = chosen.rule(schedule, hierarchical, comm_dtype) or AVERAGING_RULES[schedule]
        membership, self._comes = enter(survival, timeout, group, hierarchical, rule, fused)
        where = layout(group, hierarchical)
        suits = partial(self._options.check_compression, rule)
        graphs = None
        if membership is not None:
            groups = lambda: self._outer_groups() or [chosen.settings]  # noqa: E731
            graphs = Succession(topology, rule if chosen.on else None, allow_unstable, groups, suits)
        graph = graphs(where.size) if graphs and self._comes else topologies.get(topology, where.size)
        rows_for(rule, graph)
        if graph.n > 1 and graph.rho >= 1 - 1e-9 and rule.average != "gradient":
            raise ValueError(f"{graph.name} never brings its {graph.n} workers together: disagreement does not shrink")

        self._options.check_compression(rule, graph)
        self._rounds = chosen.rounds(rule, graph, allow_unstable)
        for g in optimizer.param_groups:
            forget_rounds(g)  # of a Gossip around it before
        self.inner = optimizer
        self.__setstate__({})  # what Optimizer keeps beside groups and state, which stay the inner optimizer's
        self._entries = dict(
            gossip_topology=self._over(rule, graph), gossip_schedule=rule.schedule if chosen.on else schedule,
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
        if self._rounds is not None:
            self._rounds.counter = Counter(self, self._engine, MEMORY)
        for g in self.param_groups:
            self._enter(g)
        if self._rounds is not None and place.workers.rank == 0:
            advise(rule, graph, chosen.settings)
        self._survive(survival, membership, graphs)
        self._refuse_inner_steps()

    def _over(self, rule: Rule, graph: Topology) -> str:
        """Where this runs. All-reduce asks no graph."""
        return f"{graph.name if rule.average == 'neighbors' else 'full'} over {graph.n}"

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

    # -- other neighbors, see recovery.py ----------------------------------------------------------------------------

    def _outer_groups(self) -> list[dict[str, Any]]:
        """The groups' settings as the outer method knows them, once there are any."""
        rounds = vars(self).get("_rounds")
        return [] if rounds is None else [rounds.settings_of(g) for g in self.param_groups]

    def _resume(self, graph: Topology) -> None:
        if self._rounds is not None:
            self._rounds.move(graph, self._outer_groups())
        self._entries["gossip_topology"] = self._over(self._engine.rule, graph)
        for group in self.param_groups:
            group["gossip_topology"] = self._entries["gossip_topology"]

    def _set_step(self, step: int) -> None:
        for group in self.param_groups:
            group["gossip_step"] = step

    def _facts(self) -> dict[str, str]:
        return {"inner optimizer": type(self.inner).__name__, **super()._facts()}

    def _rest(self) -> Any:
        state = self.inner.state_dict()["state"]
        return state if self._rounds is None else (state, self._rounds.rest(self.param_groups))

    def _take_rest(self, rest: Any) -> None:
        if self._rounds is not None:
            rest, of_rounds = rest
            new = self._recovery is not None and self._recovery.empty
            self._rounds.take(self.param_groups, of_rounds, new)
        self.inner.load_state_dict({**self.inner.state_dict(), "state": rest})
