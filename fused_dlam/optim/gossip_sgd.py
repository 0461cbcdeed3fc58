"""`GossipSGD`: momentum SGD whose workers average with a few neighbors instead of all-reducing gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from .. import rules
from .. import topology as topologies
from ..comm.place import Place, alone, layout
from ..comm.watch import log
from ..engine.arrivals import Arrivals
from ..engine.clip import clip_coefficient
from ..engine.engine import Engine
from ..engine.message import message_of
from ..engine.slot import Slot
from ..engine.step_allowed import check_step_allowed
from ..layers.layer import Layer, finishing
from ..rules.rule import Rule
from ..rules.scalars import Scalar, Scalars, scalar
from ..topology import Topology, TopologyLike
from . import mixed_precision, options
from .certificate import Certificate
from .old_names import translate
from .options import Options
from .shared import GossipOptimizer
from .state_dict import detach, loading, restore


class GossipSGD(GossipOptimizer):
    """Momentum SGD, data parallel by gossip: each `step` takes a local step and averages with neighbors of a graph.

    Call it on every rank in place of DDP and `torch.optim.SGD`, on a model that is not wrapped. The constructor moves
    the parameters into flat buffers (move the model to its device first), checks that all ranks agree on shapes and
    settings, and broadcasts rank 0's parameters; buffers such as BatchNorm's are the user's to broadcast. Without a
    process group it is `torch.optim.SGD` with momentum.

    Args:
        params: parameters, groups, or named parameters, as for `torch.optim.SGD`.
        lr: learning rate; a number, or a tensor of one element. On a GPU the Triton kernels read a tensor there; every
            other pass on a GPU waits for it once per step.
        momentum: beta, in [0, 1).
        weight_decay: lambda, added to the gradient as lambda x.
        method: a name from `fused_dlam.rules.ALL` or a `fused_dlam.Rule`. "pc-dmsgd" (the default) suits directed and
            one-peer graphs, "decentlam" symmetric ones.
        topology: a name from `fused_dlam.topology.FAMILY`, a `Topology` for as many workers as there are, or a function
            of their number: `lambda n: topology.ring(n).every(4)` exchanges in every fourth step only, and
            `.with_global_average(48)` puts an exact average in the place of every 48th exchange (Gossip-PGA).
        schedule: "atc" sends after the gradient is known, "awc" sends the parameters while it is computed.
        group: the process group of the workers; default: all ranks.
        overlap: "auto" (default) finds out in the first step whether messages can leave during the backward pass, True
            insists, False exchanges in step() alone. See `no_sync` for gradient accumulation.
        max_grad_norm: clips the gradient of each worker to this norm, in `step`.
        maximize: ascend instead of descend.
        layers: what runs around the rule, e.g. `[fused_dlam.layers.Lars(0.01), fused_dlam.SlowMo(every=12)]`.
        hierarchical: True (machines of LOCAL_WORLD_SIZE ranks) or a two-dimensional `DeviceMesh` (machines x ranks):
            gradients are averaged inside a machine and machines gossip, so that a network card carries one message per
            machine; the workers of the topology are the machines. The model may be under `fully_shard` (FSDP2) over
            the mesh's second dimension, then each rank exchanges its shard, or in DDP over the machine's ranks.
        comm_dtype: the type of the messages, e.g. torch.bfloat16 for half the bytes; default: that of the parameters.
        fused: None takes the best passes available for the parameters, True insists, False takes the reference.
        bucket_mb: MiB per message; default: a twelfth of the parameters, between 1 and 32; with "awc" a quarter,
            between 8 and 32.
        timeout: seconds after which waiting for a peer is an error.
        allow_unstable: run although disagreement between workers grows.
        hyper: the method's own hyper-parameters, such as `correction_gain` of "pc-dmsgd" or `mu` of "qg-dmsgd"; see
            fused_dlam/rules/README.md.

    Raises ValueError or TypeError for bad input, also if the method is unstable on the topology (the message says what
    would work), before anything is sent; `fused_dlam.ExchangeError` if a peer does not answer in time.

    A parameter without a gradient takes no local step, as in torch, and is averaged all the same. Loss scalers: see
    `fused_dlam.GradScaler`. With one worker a deep copy or an unpickled optimizer works on; with several it raises
    RuntimeError at its first step, for it has no process group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        method: str | Rule = "pc-dmsgd",
        topology: TopologyLike = "one-peer-exponential",
        schedule: str = "atc",
        group: dist.ProcessGroup | None = None,
        *,
        overlap: bool | str = "auto",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        layers: Sequence[Layer] = (),
        hierarchical: Any = None,
        comm_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        bucket_mb: float | None = None,
        timeout: float = 600.0,
        allow_unstable: bool = False,
        **hyper: Any,
    ):
        topology, method, layers = translate(hyper, topology, method, layers)
        rule = rules.get(method)
        rule.check_hyper(hyper)
        chosen = Options(schedule, overlap, max_grad_norm, layers, comm_dtype, fused, bucket_mb)
        options.check_names(rule, chosen.layers)
        where = layout(group, hierarchical)
        if where.local and rule.average == "gradient":
            raise ValueError(f"method {rule.name!r} averages over all ranks: hierarchical= is for gossip")
        graph = topologies.get(topology, where.size)
        self._choose(rule, graph, chosen, allow_unstable)
        defaults: dict[str, Any] = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize)
        defaults.update(rule.defaults(hyper), **chosen.settings, step=0, memory={})
        defaults.update(method=rule.name, topology=f"{graph.name} over {where.size}", schedule=schedule)
        options.check({**defaults, "params": []}, rule, chosen.layers)
        super().__init__(params, defaults)  # calls add_param_group, which checks every group

        everything = [p for param_group in self.param_groups for p in param_group["params"]]
        self._start(where.connect(everything, timeout, hierarchical is None and rule.average == "neighbors"))

    def _choose(self, rule: Rule, graph: Topology, chosen: Options, allow_unstable: bool) -> None:
        """Keeps what was chosen, all that a copy is built from."""
        self._chosen = rule, graph, chosen
        self._rule = rule.adapt_while_communicating() if chosen.schedule == "awc" else rule
        self._topology, self._options = graph, chosen
        self._certificate = Certificate(self._rule, graph, allow_unstable)

    _begun: list[tuple] | None = None  # the settings with which the present step began

    def _start(self, place: Place) -> None:
        """Builds all that runs: flat buffers, passes, hooks."""
        o = self._options
        self._running = Engine(
            self._rule, self._topology, place, message_of(self._rule), o.layers, o.fused, o.comm_dtype, o.bucket_mb
        )
        clips = o.max_grad_norm is not None
        self._arrivals = Arrivals(self._engine, o.overlap, clips, self._begin, self._settings, self._name_of)
        for param_group in self.param_groups:
            self._enter(param_group)
        self.register_state_dict_post_hook(detach)

    # -- parameter groups and their state ----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch. With several workers all ranks must do so before the same step."""
        if "_rule" not in vars(self) or (self._running is not None and self._running.step is not None):
            self._engine  # noqa: B018 -- in a copy that cannot work on, this says so
            raise RuntimeError("add parameter groups before the backward pass or after step(): messages have left")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["memory"] = dict(group["memory"])
        group["step"] = self.param_groups[0]["step"]
        try:
            options.check(group, self._rule, self._options.layers)
            options.check_parameters(group["params"])
            self._certificate.check(group)
            if self._running is not None:
                self._enter(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _enter(self, group: dict[str, Any]) -> None:
        """Moves a group into flat buffers, agrees on it with the other ranks and takes rank 0's parameters."""
        engine = self._engine
        params = list({id(p): p for p in group["params"]}.values())  # torch warns of duplicates, and goes on
        engine.place.agree(options.facts(group, params, engine, self._options))
        buckets = engine.add_group(params)
        engine.start_equal(buckets)
        for b in buckets:
            for slot in b.slots:
                self.state[slot.p] = {name: slot.stateful(t) for name, t in engine.buffers(b).items()}
            self._arrivals.watch(b)
        self._arrivals.reset()

    @property
    def _step(self) -> int:  # type: ignore[override]
        return self.param_groups[0]["step"]

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # a compiled caller breaks its graph here, as at any communication
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One local step and one exchange. Every rank must call it equally often.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned; called once, before the exchange.

        Raises RuntimeError if a parameter was moved since construction, ExchangeError if a peer does not answer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._engine
        check_step_allowed(engine)
        engine.refresh()
        skip = mixed_precision.unscale(self, engine, self._arrivals)
        self._arrivals.check()
        if engine.step is None or self._begun is None:  # None: the last attempt to begin was interrupted
            self._begin(skip)
        elif self._begun != self._settings():
            log.warning(
                "a hyper-parameter was changed between the backward pass and step(), after the messages had left: it"
                " takes effect in the next step. Set it before the backward pass, or build with overlap=False."
            )
        engine.complete(self._arrivals.ahead)
        self._arrivals.finish()
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def _begin(self, skip: Scalar = 0.0) -> None:
        """Fixes this step's scalars: from here on a change of a hyper-parameter counts for the next step."""
        for group in self.param_groups:
            self._certificate.recheck(group)
        self._begun, begun = None, self._settings()
        memories = [dict(group["memory"]) for group in self.param_groups]
        # What may raise comes before anything has begun, so that step() can be called again.
        h = [self._scalars(group, memory) for group, memory in zip(self.param_groups, memories, strict=True)]
        self._engine.begin(self._step, skip)
        if self._options.max_grad_norm is not None and self._engine.message.leaves_early and not self._engine.flights:
            self._set_scalars(h, 1.0)  # clipping opens flights, and they may pack x for a narrower message
        self._set_scalars(h, self._gradient_scale())  # of the whole gradient: once, whatever the number of groups
        self._remember(memories, skip)
        self._begun = begun

    def _settings(self) -> list[tuple]:
        names = ("lr", "momentum", "weight_decay", "maximize", *self._options.settings, *self._rule.hyper)
        return [options.snapshot(group, names) for group in self.param_groups]

    def _scalars(self, group: dict[str, Any], memory: dict[str, Any]) -> Any:
        """The rule's scalars for a group; `memory` becomes what it is after this step."""
        rule = self._rule
        hyper = {name: group[name] for name in rule.hyper}
        weight_decay = 0.0 if finishing(self._options.layers, group) else float(group["weight_decay"])
        lr, momentum, rho = scalar(group["lr"]), float(group["momentum"]), self._topology.slowest_rho
        return rule.scalars(lr, momentum, weight_decay, rho, hyper, memory)

    def _remember(self, memories: list[dict[str, Any]], skip: Scalar) -> None:
        """A skipped step is not remembered."""
        for group, memory in zip(self.param_groups, memories, strict=True):
            if isinstance(skip, torch.Tensor):
                group["memory"] = mixed_precision.remembered(group["memory"], memory, skip)
            elif not skip:
                group["memory"] = memory

    def _set_scalars(self, h: list[Any], scale: Scalar) -> None:
        scales = [-scale if group["maximize"] else scale for group in self.param_groups]
        scalars = [Scalars(of_group, (), s) for of_group, s in zip(h, scales, strict=True)]
        self._engine.set_scalars(scalars, self.param_groups)

    def _gradient_scale(self) -> Scalar:
        """What gradients are multiplied by: 1 / loss scale, clipped. On a GPU nothing here waits for it."""
        loss_scale = getattr(self, "grad_scale", None)
        unscale = 1.0 if loss_scale is None else 1.0 / scalar(loss_scale)
        limit = self._options.max_grad_norm
        return unscale if limit is None else unscale * clip_coefficient(self._engine, unscale, limit)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients accumulated within are not final: wrap all backward passes but the last before a step."""
        with self._arrivals.hold():
            yield

    def _name_of(self, slot: Slot) -> str:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is slot.p:
                    names = group.get("param_names")
                    return f"parameter {names[j] if names else f'{j} of group {i}'} of shape {tuple(p.shape)}"
        return f"a parameter of shape {tuple(slot.p.shape)}"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With `set_to_none=False` gradients stay views of flat buffers, zeroed by one write a bucket."""
        if self._running is None:
            super().zero_grad(set_to_none)
            return
        for b in self._engine.buckets:
            b.zero_grad(set_to_none)

    # -- checkpoints and copies --------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this method and topology, or one of `torch.optim.SGD`. On all ranks.

        What `consensus_state_dict` returned loads on any topology.

        Raises ValueError for a checkpoint of another method or topology.
        """
        with loading(self, self._engine):
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        can_work_on = self._running is not None and self._running.place.alone
        return {**state, "_chosen": self._chosen} if can_work_on else state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called on a copied or unpickled optimizer, and by torch's load_state_dict in its middle."""
        before = [dict(group) for group in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        for group, old in zip(self.param_groups, before, strict=False):
            for name, value in old.items():
                group.setdefault(name, value)  # a checkpoint of torch.optim.SGD, or of the mean, lacks some
            group["memory"] = dict(group["memory"])
        if "_chosen" in state:
            rule, graph, chosen = state["_chosen"]
            self._choose(rule, graph, chosen, allow_unstable=True)
            saved = {p: self.state.get(p, {}) for group in self.param_groups for p in group["params"]}
            device = next(iter(saved)).device
            self._start(alone(device))
            restore(saved, self, self._engine)
