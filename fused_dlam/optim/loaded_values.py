"""A checkpoint's values are checked as the constructor's arguments are: all of them, before the first is loaded."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..comm.errors import ExchangeError, calling, listed
from ..comm.sharded import local
from ..rules.scalars import among
from . import options

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from .shared import GossipOptimizer

WORKER = "gossip_worker"  # an entry of saved groups: whose state it is, where that matters, see `whose`
PLACE = ("topology", "schedule", "gossip_topology", "gossip_schedule")  # entries of a group that say where it ran


def check_loaded(optimizer: GossipOptimizer, state_dict: dict[str, Any]) -> None:
    """Raises ValueError or TypeError if an optimizer cannot load this. Talks to nobody."""
    _check_form(state_dict)
    groups = state_dict["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has {len(groups)} parameter groups, the optimizer {len(optimizer.param_groups)}"
        )
    for i, (theirs, ours) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"group {i} of the checkpoint has {len(theirs['params'])} parameters, the optimizer's"
                f" {len(ours['params'])}"
            )
    check(state_dict, optimizer.param_groups)
    for i, theirs in enumerate(groups):
        try:
            _check_group(optimizer, optimizer.param_groups[i], theirs)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"group {i} of the checkpoint: {error}") from None
    _check_state(optimizer, state_dict)


def _check_form(state_dict: Any) -> None:
    """Raises ValueError for what is no optimizer's state at all."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError("an optimizer's checkpoint is a dictionary with 'state' and 'param_groups', which this is not")
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, Mapping):
        raise TypeError(f"the checkpoint's state is no dictionary, but {state!r}")
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        raise TypeError(f"the checkpoint's param_groups are no list of dictionaries, but {groups!r}")
    for i, group in enumerate(groups):
        if not isinstance(group.get("params"), (list, tuple)):
            raise TypeError(f"group {i} of the checkpoint has no list of parameters, but {group.get('params')!r}")
        for key in group["params"]:
            if not isinstance(key, (int, str)):
                raise TypeError(f"group {i} of the checkpoint has a parameter {key!r}, which is no number and no name")


def check_everywhere(optimizer: GossipOptimizer, state_dict: dict[str, Any]) -> None:
    """The same on all ranks, which must be loading the same step. All of them must call it.

    Raises on every rank if one cannot load: its own error there, ValueError elsewhere; ValueError if their steps
    differ; ExchangeError, after the optimizer's timeout, if a rank loads nothing.
    """
    engine = optimizer._engine
    problem: Exception | None = None
    said = ""
    try:
        engine.check_whole()
        check_loaded(optimizer, state_dict)
        ours, theirs = optimizer.param_groups[0], state_dict["param_groups"][0]
        said = f"step {theirs.get('gossip_step', theirs.get('step', ours.get('gossip_step', ours.get('step'))))}"
    except Exception as error:  # the others are told before it is raised
        problem = error
    for group in (engine.place.inside, engine.place.workers):
        try:
            with calling("optimizer.load_state_dict()"):
                group.agree({"what they load": f"an error ({problem})" if problem is not None else said})
        except ValueError as error:
            problem = problem or error
        except ExchangeError as error:
            problem = problem or error
            break
    if problem is not None:
        raise problem
    if whose(engine):
        with calling("optimizer.load_state_dict()"):
            _refuse_copies(engine, state_dict["param_groups"][0].get(WORKER))


def whose(engine: Engine) -> dict[str, int]:
    """The entry of groups that says so, of methods with buffers that belong together over the workers: corrections,
    which sum to zero, and trackers, which sum to the gradients'. Copies of one worker's do not."""
    rule = engine.rule
    return {WORKER: engine.place.workers.rank} if rule.centered or "tracking_buffer" in rule.state else {}


def _refuse_copies(engine: Engine, saved: int | None) -> None:
    """Raises ValueError on all ranks where two workers load the state of one, with which they diverge."""
    workers = engine.place.workers
    if workers.size == 1:
        return
    ranks: dict[int, list[int]] = {}
    everybodys = workers.gathered(saved, "comparing whose states are loaded")
    for rank, number in zip(sorted(workers.ranks), everybodys, strict=True):
        if number is not None:  # of an earlier release, or a mean
            ranks.setdefault(number, []).append(rank)
    for number, several in ranks.items():
        if len(several) > 1:
            raise ValueError(
                f"{listed(several)} load what worker {number} saved. {engine.rule.name} keeps in each worker's state"
                " what belongs together over all of them, and copies of one diverge: save and load every worker's own,"
                " as fused_dlam.save_checkpoint and load_checkpoint do, or save optimizer.consensus_state_dict() with"
                " the averaged model for all"
            )


def check(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> None:
    """Raises ValueError for a checkpoint of another method or topology."""
    for theirs, ours in zip(state_dict["param_groups"], param_groups, strict=False):
        if "slowmo" in theirs:  # of the releases in which layers were options
            theirs = {"layers": theirs["slowmo"] if isinstance(theirs["slowmo"], str) else "", **theirs}
        if theirs.get("lars") is not None and "lars" not in ours and "method" in ours:
            raise ValueError(f"the checkpoint is of LARS: build with layers=[Lars({theirs['lars']})]")
        for what in ("method", "layers", "gossip_outer", *PLACE):
            if not {what} <= theirs.keys() & ours.keys():
                continue
            if type(theirs[what]) is not type(ours[what]) or theirs[what] != ours[what]:
                raise ValueError(
                    f"the checkpoint is of {what.removeprefix('gossip_')} {theirs[what]!r}, this optimizer of"
                    f" {ours[what]!r}"
                    + (
                        ". To go on with another number of workers or another graph, save"
                        " optimizer.consensus_state_dict(), or use fused_dlam.save_checkpoint and"
                        " load_checkpoint(mean=True)"
                        if what in PLACE
                        else f": build it with {what.removeprefix('gossip_')}= as there, or load the model alone: its"
                        " state means nothing here"
                    )
                )
        if "method" not in ours and {"method", "memory"} <= set(theirs):
            raise ValueError(
                f"the checkpoint is of GossipSGD with method {theirs['method']!r}, and this is a Gossip, whose inner"
                " optimizer has another state: load the model alone"
            )
        if "method" not in ours:
            continue  # the inner optimizer of a Gossip knows what it can load
        if "betas" in theirs:  # its steps are counted per parameter, in its state
            raise ValueError(
                "the checkpoint is of one of torch's Adams; there is fused_dlam.Gossip(torch.optim.AdamW(...))"
            )
        if not among(theirs.get("dampening"), (None, 0)):
            raise ValueError("the checkpoint uses dampening, which no method here defines")
        if "nesterov" in theirs and not among(theirs["nesterov"], (ours["method"].startswith("nesterov-"),)):
            raise ValueError(
                f"the checkpoint is of torch.optim.SGD(nesterov={theirs['nesterov']}): build with the same, by a method"
                " named nesterov-... or one that is not"
            )


def _check_group(optimizer: GossipOptimizer, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    merged = {name: value if name == "params" else theirs.get(name, value) for name, value in ours.items()}
    for name, value in ours.items():
        new = merged[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and name in theirs and not isinstance(new, (numbers.Real, torch.Tensor)):
            raise TypeError(f"{name} must be a number, not {new!r}")
    for name in ("step", "gossip_step", "gossip_taken", "gossip_went", "gossip_batches"):
        if name in merged and (not isinstance(merged[name], numbers.Integral) or merged[name] < 0):
            raise ValueError(f"Invalid {name}: {merged[name]!r}, must be a whole number from 0 on")
    if not isinstance(merged.get("gossip_every", 1), numbers.Integral) or merged.get("gossip_every", 1) < 1:
        raise ValueError(f"Invalid gossip_every: {merged['gossip_every']!r}, must be a whole number from 1 on")
    if "method" in ours:
        _check_memory(merged["memory"])
        options.check(merged, optimizer._rule, optimizer._options)  # type: ignore[attr-defined]
        optimizer._certificate.recheck(merged)  # type: ignore[attr-defined]
    elif getattr(optimizer, "_rounds", None) is not None:
        _check_memory(theirs.get("outer_memory", {}))
        of = optimizer._rounds.settings_of(merged)  # type: ignore[attr-defined]
        optimizer._rounds.check(of)  # type: ignore[attr-defined]
        optimizer._rounds.certificate.recheck(of)  # type: ignore[attr-defined]
    if (
        "method" not in ours and "lr" in merged and not 0.0 <= float(merged["lr"]) < math.inf
    ):  # what else its inner optimizer has is its own
        raise ValueError(f"Invalid learning rate: {merged['lr']}")


def _check_memory(memory: Any) -> None:
    """What a rule remembers of its scalars: numbers by name, as a dictionary or as pairs, see `state_dict.detach`."""
    pairs = memory.items() if isinstance(memory, Mapping) else memory
    try:
        good = all(isinstance(name, str) and _finite(value) for name, value in pairs)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise TypeError(f"memory must be numbers by name, not {memory!r}")


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and bool(torch.isfinite(value))
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_state(optimizer: GossipOptimizer, state_dict: dict[str, Any]) -> None:
    """Tensors of the shape of what they are copied into: torch would broadcast others in silence."""
    slots = {slot.p: (b, slot) for b in optimizer._engine.buckets for slot in b.slots}
    for i, (theirs, ours) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=True)):
        for j, (key, p) in enumerate(zip(theirs["params"], ours["params"], strict=True)):
            values = state_dict["state"].get(key, {})
            names = ours.get("param_names")
            of = f"of parameter {names[j] if names else j} of group {i}, of shape {tuple(p.shape)}"
            if not isinstance(values, Mapping):
                raise TypeError(f"the checkpoint's state {of} is no dictionary, but {values!r}")
            if values and "method" not in ours and "step" in optimizer.state.get(p, {}) and "step" not in values:
                raise ValueError(f"the checkpoint's state {of}, lacks 'step': it is of another optimizer")
            b, slot = slots.get(p, (None, None))  # a frozen parameter has none
            buffers = () if b is None else optimizer._engine.buffers(b)
            flat = {"gossip_master", *(name if "method" in ours else f"gossip_{name}" for name in buffers)}
            for name, value in values.items():
                if name in flat:
                    if value is not None:
                        _check_tensor(f"the checkpoint's {name} {of}", value, local(p).shape, p)
                    continue
                mine = optimizer.state[p].get(name) if p in optimizer.state else None
                if isinstance(mine, torch.Tensor) and isinstance(value, torch.Tensor) and mine.shape != value.shape:
                    raise ValueError(
                        f"the checkpoint's {name} {of}, has shape {tuple(value.shape)}, where {tuple(mine.shape)} is"
                        " needed"
                    )


def _check_tensor(what: str, value: Any, shape: torch.Size, p: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{what}, is no tensor, but {value!r}")
    if local(value).layout != torch.strided or local(value).is_meta:
        raise TypeError(f"{what}, is {'on the meta device' if value.is_meta else value.layout}")
    if local(value).shape != shape:
        raise ValueError(f"{what}, has shape {tuple(value.shape)}")
    if not (value.is_floating_point() or value.is_complex()) or value.is_complex() > p.is_complex():
        raise TypeError(f"{what}, is of type {value.dtype}")
