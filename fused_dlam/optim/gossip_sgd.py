"""`GossipSGD`: momentum SGD whose workers average with a few neighbors instead of all-reducing gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from .. import rules
from .. import topology as topologies
from ..comm.place import Place, layout
from ..engine.arrivals import Arrivals
from ..engine.buckets import Bucket
from ..engine.engine import Engine
from ..engine.health import Health
from ..engine.message import message_of
from ..engine.slot import Slot
from ..layers.compression import Codec
from ..layers.layer import Layer
from ..rules.rule import Rule
from ..topology import Topology, TopologyLike
from . import options, skipping
from .certificate import Certificate
from .copies import Copies, reclaimed
from .counter import Counter
from .frozen import Frozen
from .kept_state import show
from .local_steps import LocalSteps, TakesLocalSteps, check_local_steps
from .old_names import translate
from .opening import Opening
from .options import Options
from .shared import GossipOptimizer
from .state_dict import detach
from .steps import Steps
from .succession import Succession
from .survival import Members, Survival, enter


class GossipSGD(Copies, Steps, TakesLocalSteps, GossipOptimizer):
    """Momentum SGD, data parallel by gossip: each `step` takes a local step and averages with neighbors of a graph.

    Call it on every rank in place of DDP and `torch.optim.SGD`, on a model that is not wrapped. The constructor moves
    the parameters into flat buffers (move the model to its device first), checks that all ranks agree on shapes and
    settings, and broadcasts rank 0's parameters; buffers such as BatchNorm's are the user's to broadcast. Without a
    process group it is `torch.optim.SGD` with momentum.

    Args:
        params: parameters, groups, or named parameters, as for `torch.optim.SGD`.
        lr: learning rate; a number, or a tensor of one element. On a GPU the Triton kernels read a tensor there; every
            other pass on a GPU waits for it once per step.
        momentum: beta, in [0, 1). Unlike torch's, a step with momentum 0 leaves its gradient in the buffer.
        weight_decay: lambda, added to the gradient as lambda x.
        method: a name from `fused_dlam.rules.ALL` or a `fused_dlam.Rule`. "mi-dmsgd" (the default) suits any graph,
            "decentlam" symmetric ones. "push-sum", "push-diging" and "push-pull" also suit graphs whose columns alone
            sum to one (`topology.push`, `topology.one_peer`): each worker's rate is divided by its mass there. They
            have no bias towards workers on graphs whose rows alone do, either.
        topology: a name from `fused_dlam.topology.FAMILY`, a `Topology` for as many workers as there are, or a function
            of their number: `lambda n: topology.ring(n).every(4)` exchanges in every fourth step only, and
            `.with_global_average(48)` puts an exact average in the place of every 48th exchange (Gossip-PGA).
        schedule: "atc" sends x + d when the worker's own step d is known, "midpoint" x + d/2, "awc" x itself while the
            gradient is computed. "auto" is the method's own: midpoint for "mi-dmsgd", else mostly atc.
        group: the process group of the workers; default: all ranks.
        overlap: "auto" (default) finds out in the first step whether messages can leave during the backward pass, True
            insists, False exchanges in step() alone. See `no_sync` for gradient accumulation.
        max_grad_norm: clips the gradient of each worker to this norm, in `step`. One whose norm is not finite counts as
            zero.
        clip: "spikes" shortens a gradient to 1.5 times the running norm of this worker's own, message by message: at
            large rates momentum would repeat a single one that is far longer. Nothing is sent for it. The running norm
            rises by at most 2.5 % a step, so do not start it on gradients far smaller than later ones (an adapter that
            starts at zero). One whose norm is not finite counts as zero.
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
        on_failure: "raise" (default) ends all ranks with an error that names the one that was lost; "continue" goes on
            without it, under a launcher that keeps the store (`fused-dlam run`), see
            fused_dlam/comm/README.md. Then a name or function is needed as topology.
        min_workers: how many must be left for that.
        admit_every: steps after which one worker looks whether another asks to be let in; 0: none looks.
        on_members_changed: called with `Members` when workers were lost or came, to share out data anew, say.
        nonfinite: with several workers an element of a gradient that is not finite counts as zero, and one of a message
            is left out, so that a NaN stays where it arose. "skip" (default) reports them now and then, "raise" looks
            in every step (on a GPU it waits for it) and raises FloatingPointError after the step.
        skip_late: seconds after which both ends of a pair leave a late exchange out (optim/skipping.py); None: never.
        local_steps: workers may take unlike numbers of steps between exchanges, see `local_step`. Messages then leave
            in step(), which costs an all-reduce of two numbers, and x of the last exchange is kept.
        compress: "int8" sends 8-bit numbers with a scale for every 256, 3.9 times fewer bytes than float32, and keeps
            what rounding left out for the next message: one buffer more. "int4" (7.8 times fewer) and "topk" (the
            largest eighth, 8 times fewer) send what has changed since the last message over the same edge: two buffers
            more for each matrix of the graph's period. Or a `fused_dlam.layers.Codec`. The workers' mean is kept as
            without; exact averages are sent in full. Not with comm_dtype=. See fused_dlam/layers/README.md.
        allow_unstable: run although disagreement between workers grows.
        hyper: the method's own hyper-parameters, such as `correction_gain` of "mi-dmsgd" or `mu` of "qg-dmsgd"; see
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
        method: str | Rule = "mi-dmsgd",
        topology: TopologyLike = "one-peer-exponential",
        schedule: str = "auto",
        group: dist.ProcessGroup | None = None,
        *,
        overlap: bool | str = "auto",
        max_grad_norm: float | None = None,
        clip: str | None = None,
        maximize: bool = False,
        layers: Sequence[Layer] = (),
        hierarchical: Any = None,
        comm_dtype: torch.dtype | None = None,
        fused: bool | None = None,
        bucket_mb: float | None = None,
        timeout: float = 600.0,
        on_failure: str = "raise",
        min_workers: int = 1,
        admit_every: int = 100,
        on_members_changed: Callable[[Members], Any] | None = None,
        nonfinite: str = "skip",
        skip_late: float | None = None,
        local_steps: bool = False,
        compress: str | Codec | None = None,
        allow_unstable: bool = False,
        **hyper: Any,
    ):
        topology, method, layers = translate(hyper, topology, method, layers)
        rule = rules.get(method)
        for name in {"outer", "every"} & hyper.keys():
            raise TypeError(
                f"GossipSGD has no {name}=, which is Gossip's, around an optimizer that takes the steps between:"
                " Gossip(torch.optim.SGD(...), outer='mi-dmsgd', every=10)"
            )
        rule.check_hyper(hyper, options.ARGUMENTS)
        chosen = Options(
            schedule, overlap, max_grad_norm, layers, comm_dtype, fused, bucket_mb, nonfinite, clip, skip_late,
            local_steps, compress,
        )  # fmt: skip
        options.check_names(rule, chosen.layers)
        options.check_place(timeout, group, hierarchical)
        survival = Survival(on_failure, min_workers, admit_every, on_members_changed)
        own = rule.under(schedule)
        membership, self._comes = enter(survival, timeout, group, hierarchical, own, fused)
        where = layout(group, hierarchical)
        if where.local and rule.average == "gradient":
            raise ValueError(f"method {rule.name!r} averages over all ranks: hierarchical= is for gossip")
        defaults: dict[str, Any] = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize)
        defaults.update(rule.defaults(hyper), **chosen.settings, step=0, memory={})
        graphs = None
        if membership is not None:
            graphs = Succession(
                topology, own, allow_unstable, lambda: vars(self).get("param_groups") or [defaults],
                partial(chosen.check_compression, rule),
            )  # fmt: skip
        graph = graphs(where.size) if graphs and self._comes else topologies.get(topology, where.size)
        self._choose(rule, graph, chosen, allow_unstable)
        chosen.check_compression(rule, graph)
        check_local_steps(self._rule, chosen, hierarchical)
        defaults.update(method=rule.name, topology=f"{graph.name} over {where.size}", schedule=self._rule.schedule)
        options.check({**defaults, "params": []}, rule, chosen)
        super().__init__(params, defaults)  # calls add_param_group, which checks every group

        everything = [p for param_group in self.param_groups for p in param_group["params"]]
        options.check_parameters(everything)
        survival.check_parameters(everything)
        skipping.check(skip_late, self._rule, graph, where, everything, survival.goes_on)
        advise = hierarchical is None and rule.average == "neighbors"
        self._place_options = hierarchical, timeout, f"optimizer ({type(self).__name__})"
        self._start(self._first_place(where, membership, advise), survival.goes_on)
        self._survive(survival, membership, graphs)

    def _choose(self, rule: Rule, graph: Topology, chosen: Options, allow_unstable: bool) -> None:
        """Keeps what was chosen, all that a copy is built from."""
        self._chosen = rule, graph, chosen
        self._rule = rule.under(chosen.schedule)
        self._topology, self._options = graph, chosen
        self._certificate = Certificate(self._rule, graph, allow_unstable)

    def _start(self, place: Place, elastic: bool = False) -> None:
        """Builds all that runs: flat buffers, passes, hooks."""
        o = self._options
        self._running = Engine(
            self._rule, self._topology, place, message_of(self._rule), o.layers, o.fused, o.comm_dtype, o.bucket_mb,
            o.clip is not None, elastic, o.compress,
        )  # fmt: skip
        clips = o.max_grad_norm is not None
        skipping.start(self._engine, o.skip_late)
        self._frozen, self._health = Frozen(), Health(self._engine, o.nonfinite, self._name_of)
        self._counter = Counter(self, self._engine)
        self._local_steps = LocalSteps(self._engine, o.local_steps)
        self._opening = Opening(self, self._engine, self._certificate, o, self._counter, self._local_steps)
        begin, settings = self._opening.begin_early, self._opening.settings
        self._arrivals = Arrivals(
            self._engine, o.overlap if o.skip_late is None else False, clips, begin, settings, self._name_of
        )
        for param_group in self.param_groups:
            self._enter(param_group)
        self.register_state_dict_pre_hook(reclaimed)
        self.register_state_dict_post_hook(detach)

    # -- parameter groups and their state ----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch. With several workers all ranks must do so before the same step."""
        if self._running is not None:
            self._check_own_values("add_param_group()")
        begun = self._running is not None and self._running.step is not None
        if "_rule" not in vars(self) or (begun and not self._engine.recallable):
            self._engine  # noqa: B018 -- in a copy that cannot work on, this says so
            raise RuntimeError("add parameter groups before the backward pass or after step(): messages have left")
        if begun:
            self._arrivals.hold_back("a parameter group was added after the backward pass")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if not isinstance(group["memory"], Mapping):
                raise TypeError(f"memory must be numbers by name, not {group['memory']!r}")
            group["memory"] = dict(group["memory"])
            group["step"] = self.param_groups[0]["step"]
            options.check(group, self._rule, self._options)
            options.check_parameters(group["params"])
            self._certificate.check(group)
            if self._running is not None:
                self._enter(group)
        except Exception:
            self._drop_group()
            raise

    def _enter(self, group: dict[str, Any]) -> None:
        """Takes a group in, and shows its state."""
        engine = self._engine
        params = list({id(p): p for p in group["params"]}.values())  # torch warns of duplicates, and goes on
        self._watch(self._take_in(params, lambda: options.facts(group, params, engine, self._options)))

    def _watch(self, buckets: Sequence[Bucket]) -> None:
        for b in buckets:
            for slot in b.slots:
                show(self.state, self._engine, b, slot)
            self._arrivals.watch(b)

    @property
    def _step(self) -> int:  # type: ignore[override]
        return self.param_groups[0]["step"]

    def close(self) -> None:
        if self._running is not None:
            self._arrivals.leave()
        super().close()

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients accumulated within are not final: wrap all backward passes but the last before a step."""
        return self._arrivals.hold()

    _hold_back = no_sync  # what `join` asks for

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
        self._frozen.zero_grad(set_to_none)
