"""`GossipSGD`: momentum SGD whose workers average with a few neighbors instead of all-reducing gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer, ParamsT

from .. import rules
from ..comm.group import Group, log
from ..comm.place import Machine, places
from ..comm.sharded import is_sharded
from ..engine.arrivals import Overlap
from ..engine.buckets import Slot
from ..engine.clip import clip_coefficient
from ..engine.engine import Engine
from ..engine.guards import check_place
from ..layers import lars as layerwise
from ..layers.slowmo import SlowMo
from ..rules.rule import Rule
from ..rules.scalars import Scalar, Scalars, scalar
from ..topology.topology import Topology
from . import mixed_precision as amp
from . import options as settings
from . import state_dict as checkpoint
from .certificate import Certificate
from .shared import Consensus


class GossipSGD(Consensus, Optimizer):
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
        topology: a name from `fused_dlam.topology.FAMILY` or a `Topology` for as many workers as the group has.
        correction_rate, correction_gain: PC-DmSGD's e and kappa; "auto" takes the rate the topology allows.
        schedule: "atc" sends after the gradient is known, "awc" sends the parameters while it is computed.
        group: the process group of the workers; default: all ranks.
        overlap: "auto" (default) finds out in the first step whether messages can leave during the backward pass, True
            insists, False exchanges in step() alone. See `no_sync` for gradient accumulation.
        max_grad_norm: clips the gradient of each worker to this norm, in `step`.
        maximize: ascend instead of descend.
        nesterov: the method with Nesterov's lookahead, as in `torch.optim.SGD`; for methods in `rules.NESTEROV`.
        lars: eta, scales every layer's gradient to this share of its weights' size (LARS; see fused_dlam/lars.py).
            Biases and normalization parameters are left alone; None in a parameter group leaves out that group.
            `p.grad` is then the scaled gradient, weight decay included.
        slowmo: a `SlowMo(every, momentum, lr)`: every so many steps the workers are averaged exactly, by all-reduce,
            and take a slow momentum step.
        hierarchical: True (machines of LOCAL_WORLD_SIZE ranks) or a two-dimensional `DeviceMesh` (machines x ranks):
            gradients are averaged inside a machine and machines gossip, so that a network card carries one message per
            machine; the workers of the topology are the machines. The model may be under `fully_shard` (FSDP2) over
            the mesh's second dimension, then each rank exchanges its shard, or in DDP over the machine's ranks.
        communicate_every: exchange in every k-th step only; the steps between are local.
        global_average_every: an exact average over all workers every H steps in place of the exchange (Gossip-PGA).
        comm_dtype: the type of the messages, e.g. torch.bfloat16 for half the bytes; default: that of the parameters.
        fused: None takes the best passes available for the parameters, True insists, False takes the reference.
        bucket_mb: MiB per message; default: a twelfth of the parameters, between 1 and 32; with "awc" a quarter,
            between 8 and 32.
        timeout: seconds after which waiting for a peer is an error.
        allow_unstable: run although disagreement between workers grows.
        hyper: hyper-parameters of single methods, e.g. `mu` of "qg-dmsgd".

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
        topology: str | Topology = "one-peer-exponential",
        correction_rate: float | str = "auto",
        correction_gain: float = 10.0,
        schedule: str = "atc",
        group: dist.ProcessGroup | None = None,
        *,
        overlap: bool | str = "auto",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        nesterov: bool = False,
        lars: float | None = None,
        slowmo: SlowMo | None = None,
        hierarchical: Any = None,
        communicate_every: int = 1,
        global_average_every: int | None = None,
        comm_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        bucket_mb: float | None = None,
        timeout: float = 600.0,
        allow_unstable: bool = False,
        **hyper: Any,
    ):
        rule = rules.get(method)
        if nesterov:
            if rule.name not in rules.NESTEROV:
                known = ", ".join(rules.NESTEROV)
                raise ValueError(f"method {rule.name!r} has no Nesterov form; these have: {known}")
            rule = rules.NESTEROV[rule.name]
        if slowmo is not None and not isinstance(slowmo, SlowMo):
            raise TypeError(f"slowmo must be a fused_dlam.SlowMo(every=...), not {type(slowmo).__name__}")
        settings.check_exchange(schedule, bucket_mb, comm_dtype)
        if overlap not in (True, False, "auto"):
            raise ValueError(f"Invalid overlap: {overlap!r}, must be True, False or 'auto'")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"Invalid max_grad_norm: {max_grad_norm}")
        if "correction_rate" in rule.hyper:
            hyper["correction_rate"] = correction_rate
        if "correction_gain" in rule.hyper:
            hyper["correction_gain"] = correction_gain
        rule.check_hyper(hyper)
        defaults: dict[str, Any] = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize)
        defaults.update(settings.defaults(rule, hyper), lars=lars, slowmo=str(slowmo) if slowmo else None)
        settings.check(defaults)

        where = places(group, hierarchical)
        if where.local and rule.average == "gradient":
            raise ValueError(f"method {rule.name!r} averages over all ranks: hierarchical= is for gossip")
        graph = where.graph(topology, communicate_every, global_average_every)
        self._rule = rule.adapt_while_communicating() if schedule == "awc" else rule
        self._topology = graph
        self._certificate = Certificate(self._rule, graph, allow_unstable)
        defaults.update(
            method=rule.name, topology=f"{graph.name} over {where.size}", schedule=schedule, step=0, memory={}
        )
        super().__init__(params, defaults)  # calls add_param_group, which checks every group

        everything = [p for param_group in self.param_groups for p in param_group["params"]]
        warn = hierarchical is None and rule.average == "neighbors"
        exchange, machine, inside = where.connect(everything, timeout, warn)
        self._options = (rule, graph, schedule, fused, comm_dtype, bucket_mb, max_grad_norm, overlap, slowmo)
        self._start(exchange, machine, inside)

    def _start(self, exchange: Group | None, machine: Machine | None, inside: Group | None) -> None:
        """Builds all that runs: flat buffers, passes, hooks."""
        _, graph, _, fused, comm_dtype, bucket_mb, max_grad_norm, overlap, slowmo = self._options
        self._running = Engine(self._rule, graph, exchange, machine, inside, fused, comm_dtype, bucket_mb)
        self._max_grad_norm = max_grad_norm
        self._slowmo = slowmo
        if slowmo is not None:
            self._engine.after = lambda b: slowmo.apply(b, self.param_groups[b.group], exchange)
        clips = max_grad_norm is not None
        self._overlap = Overlap(self._engine, overlap, clips, self._begin, self._settings, self._name_of)
        for param_group in self.param_groups:
            self._enter(param_group)
        self.register_state_dict_post_hook(checkpoint.detach)

    _loading: dict[str, Any] | None = None  # the checkpoint, within load_state_dict

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
            settings.check(group)
            settings.check_parameters(group["params"])
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
        if group["lars"] is not None and any(is_sharded(p) for p in params):
            raise ValueError("lars= needs the norms of whole layers, but FSDP shards them: build without it")
        exchanges = [e for e in (engine.inside, engine.exchange) if e is not None]
        more = {"overlap": str(self._overlap.mode), "max_grad_norm": str(self._max_grad_norm)}
        for exchange in exchanges:
            exchange.agree({**settings.facts(group, params, engine), **more})
        buckets = engine.add_group(params)
        engine.start_equal(buckets)
        for b in buckets:
            if self._slowmo is not None:
                b.slow = {"slow_anchor": b.x.clone(), "slow_momentum_buffer": torch.zeros_like(b.x)}
            for slot in b.slots:
                self.state[slot.p] = {name: slot.stateful(t) for name, t in engine.buffers(b).items()}
            self._overlap.watch(b)
        self._overlap.reset()

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
        check_place(engine)
        engine.refresh()
        if getattr(self, "found_inf", None) is not None:
            amp.unscale(self, engine, self._overlap)
        self._overlap.check()
        if engine.step is None:
            self._begin()
        elif self._begun != self._settings():
            log.warning(
                "a hyper-parameter was changed between the backward pass and step(), after the messages had left: it"
                " takes effect in the next step. Set it before the backward pass, or build with overlap=False."
            )
        engine.complete()
        self._overlap.finish()
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def _begin(self) -> None:
        """Fixes this step's scalars: from here on a change of a hyper-parameter counts for the next step."""
        for group in self.param_groups:
            self._certificate.recheck(group)
        self._begun = self._settings()
        scale = self._gradient_scale()  # of the whole gradient: once, whatever the number of groups
        scalars = [self._scalars(group, scale) for group in self.param_groups]
        if any(group["lars"] is not None for group in self.param_groups):
            self._engine.before, scalars = layerwise.around(self.param_groups, scalars)
        self._engine.begin(self._step, scalars)
        for b in self._engine.buckets if self._slowmo is not None else ():
            self._slowmo.start(b, self._step)  # type: ignore[union-attr]

    def _settings(self) -> list[tuple]:
        names = ("lr", "momentum", "weight_decay", "maximize", "lars", *self._rule.hyper)
        return [settings.snapshot(group, names) for group in self.param_groups]

    def _scalars(self, group: dict[str, Any], scale: Scalar) -> Scalars:
        rule = self._rule
        hyper = {name: group[name] for name in rule.hyper}
        lr, momentum, weight_decay = scalar(group["lr"]), float(group["momentum"]), layerwise.decay(group)
        memory = dict(group["memory"])
        h = rule.scalars(lr, momentum, weight_decay, self._topology.slowest_rho, hyper, memory)
        skipping = self._engine.skipping
        if isinstance(skipping, torch.Tensor):
            group["memory"] = amp.remembered(group["memory"], memory, skipping)
        elif not self._engine.skip:  # a skipped step is not remembered
            group["memory"] = memory
        return Scalars(h, (), -scale if group["maximize"] else scale)

    def _gradient_scale(self) -> Scalar:
        """What gradients are multiplied by: 1 / loss scale, clipped. On a GPU nothing here waits for it."""
        loss_scale = getattr(self, "grad_scale", None)
        unscale = 1.0 if loss_scale is None else 1.0 / scalar(loss_scale)
        limit = self._max_grad_norm
        return unscale if limit is None else unscale * clip_coefficient(self._engine, unscale, limit)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients accumulated within are not final: wrap all backward passes but the last before a step."""
        outer, self._overlap.held = self._overlap.held, True
        try:
            yield
        finally:
            self._overlap.held = outer

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

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this method and topology, or one of `torch.optim.SGD`. On all ranks.

        What `consensus_state_dict` returned loads on any topology.

        Raises ValueError for a checkpoint of another method or topology.
        """

        def last(_: Optimizer, final: dict[str, Any]) -> None:  # of the hooks, which may have made another dict of it
            checkpoint.check(final, self.param_groups)
            self._loading = final

        handle = self.register_load_state_dict_pre_hook(last)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        alone = self._running is not None and self._running.exchange is None and self._running.machine is None
        return {**super().__getstate__(), **({"_options": self._options} if alone else {})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict, and on a copied or unpickled optimizer."""
        before = [dict(group) for group in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        for group, old in zip(self.param_groups, before, strict=False):
            for name, value in old.items():
                group.setdefault(name, value)  # a checkpoint of torch.optim.SGD, or of the mean, lacks some
            group["memory"] = dict(group["memory"])
        if self._loading is not None:
            self._engine.forget()
            checkpoint.restore(checkpoint.by_parameter(self._loading, self.param_groups), self, self._engine)
        elif "_options" in state:
            rule, graph, schedule, *_ = self._options
            self._rule = rule.adapt_while_communicating() if schedule == "awc" else rule
            self._topology, self._certificate = graph, Certificate(self._rule, graph, True)
            saved = {p: self.state.get(p, {}) for group in self.param_groups for p in group["params"]}
            self._start(None, None, None)
            checkpoint.restore(saved, self, self._engine)
