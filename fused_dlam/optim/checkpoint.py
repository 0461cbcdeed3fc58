"""Save once, resume on any number of workers: `torch.distributed.checkpoint` with every worker under its own name.

    worker0.model.*  worker0.optimizer.*  worker1.model.* ...

DCP takes a tensor that several ranks have under one name for the same tensor and writes it once: workers whose
parameters differ would all come back as the one that wrote. So each worker has a name of its own; a machine's ranks
share theirs, for they are equal, or hold the shards of one DTensor, and DCP splits the writing between them.

As many workers as before continue bit for bit. Another number starts from the mean of all that were saved: each reads
its part of them and the parts are summed by one all-reduce, so that everything is read once.

checkpoint_files.py says why a kill in the middle of a save does no harm, checkpoint_reader.py how parts of two saves
are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..comm.errors import calling
from ..comm.group import Group
from ..comm.meeting import Meeting
from ..comm.sharded import local
from ..comm.watch import log
from ..engine.buckets import LOW_PRECISION
from .checkpoint_dictionaries import packed, unpacked
from .gossip import Gossip
from .gossip_sgd import GossipSGD
from .loaded_values import check_loaded
from .state_dict import unplaced

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

    from .checkpoint_reader import Reader

KINDS = {"OSError": OSError, "TypeError": TypeError, "ValueError": ValueError}  # what is raised as it was elsewhere


def worker_state(model: torch.nn.Module, optimizer: GossipSGD | Gossip, **stateful: Any) -> dict[str, Any]:
    """What `save_checkpoint` saves, for a `dcp.save` or `dcp.async_save` of one's own: {"worker3": {...}}.

    Beside it under "parts" is from which step it is, for `load_checkpoint` to see whether all parts are of one.
    """
    from .checkpoint_files import PARTS

    own = {name: packed(thing.state_dict()) for name, thing in stateful.items()}
    return {  # the parts first: every file begins with its own
        PARTS: _part("-", optimizer),
        f"worker{_number(optimizer)}": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **own},
    }


def save_checkpoint(
    path: str | PathLike[str],
    model: torch.nn.Module,
    optimizer: GossipSGD | Gossip,
    *,
    process_group: dist.ProcessGroup | None = None,
    **stateful: Any,
) -> None:
    """Saves every worker's model and optimizer into one directory that all ranks can reach. All ranks must call it.

    Safe against a kill at any moment, of any ranks: a directory that has a checkpoint is that checkpoint until the new
    one is complete, and then the new one. So `path` may be the same every time; it then takes the room of two while
    saving. What older and killed saves left there is removed. Only one job may save into a directory at a time.

    Args:
        path: a directory, on a file system that all machines share. It is complete once it has a file `.metadata`,
            which DCP's tools read (`dcp.load`, `dcp_to_torch_save(path, ...)`); the data are in a folder beside it.
        model: anything with `state_dict`, its parameters the optimizer's.
        optimizer: a `GossipSGD` or `Gossip`. Its `timeout` is the deadline of every wait here: for the last rank to
            call this, and for the last to have written.
        process_group: all ranks that take part; default: the world.
        stateful: what else has `state_dict` and `load_state_dict`, by name: `scheduler=scheduler`.

    Raises, and the last checkpoint stays: OSError on all ranks if one of them cannot write, a full disk for instance;
    ValueError on all if they are at different steps; ExchangeError if a rank does not come, or dies.
    """
    _check_kinds(model, optimizer, stateful)
    optimizer._check_own_values("save_checkpoint()")
    optimizer._together(lambda: _save(Path(path), model, optimizer, process_group, stateful))


def _save(
    home: Path,
    model: torch.nn.Module,
    optimizer: GossipSGD | Gossip,
    process_group: dist.ProcessGroup | None,
    stateful: dict[str, Any],
) -> None:
    step = optimizer._step
    meeting = Meeting("save_checkpoint()", step, _timeout(optimizer), process_group, optimizer._gone)

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from .checkpoint_files import FOLDER, PARTS, Writer, new_folder, prepare, quietly, tidy

    folder, failure = new_folder(step), None
    try:
        if meeting.rank == 0:
            prepare(home)
        state = worker_state(model, optimizer, **stateful)
    except Exception as error:
        failure = error
    everybody = meeting.everybodys((optimizer._position, folder, _told(failure)))
    _raise_any(meeting, [problem for _, _, problem in everybody])
    steps = {rank: theirs for rank, (theirs, _, _) in zip(meeting.ranks, everybody, strict=True)}
    if len(set(steps.values())) > 1:
        raise ValueError(f"save_checkpoint() was called at different steps: {steps}")
    folder = everybody[0][1]
    match = FOLDER.fullmatch(folder)
    assert match is not None
    state[PARTS] = _part(match[1], optimizer)
    try:
        with meeting.waiting(), quietly():
            dcp.save(
                state,
                storage_writer=Writer(home, folder),
                process_group=meeting.process_group,
                no_dist=meeting.process_group is None,
            )
    except CheckpointException as error:
        if meeting.rank == 0:
            tidy(home)  # a full disk has room again
        _raise_any(meeting, [_told(_failure(error, rank)) for rank in range(meeting.size)])


def load_checkpoint(
    path: str | PathLike[str],
    model: torch.nn.Module,
    optimizer: GossipSGD | Gossip,
    *,
    mean: bool = False,
    process_group: dist.ProcessGroup | None = None,
    **stateful: Any,
) -> int:
    """Loads what `save_checkpoint` saved, on any number of workers, and returns how many had saved it.

    A worker that has just come to a run that is under way loads nothing: it has the others' state.

    As many as now: each has its own back and the run goes on bit for bit. Otherwise all start from the mean of the
    workers' parameters, buffers and optimizer state, with MI-DmSGD's correction zero, as its mean is, and go on in
    their own topology from the step that was saved; what is in `stateful` is worker 0's. `mean=True` does so although
    they are as many, for another topology or schedule. Other arguments as there.

    Raises, on every rank and before anything is loaded: ValueError if the checkpoint lacks something that is asked for,
    is of another method, has parts of more than one save or states that differ in their entries; ValueError or
    TypeError, as the constructor does, for values and shapes that this optimizer cannot have; ValueError for bytes that
    were changed since and for entries that would have to run code, of which nothing is run (safe_reading.py); OSError
    for what cannot be read; ExchangeError if a rank does not come within the optimizer's timeout.
    """
    _check_kinds(model, optimizer, stateful)
    optimizer._check_own_values("load_checkpoint()")
    if optimizer._just_came:
        log.info("load_checkpoint(): this worker came to a run that is under way, and has taken its state: not loaded")
        return optimizer._engine.place.workers.size
    return optimizer._together(lambda: _load(path, model, optimizer, mean, process_group, stateful))


def _load(
    path: str | PathLike[str],
    model: torch.nn.Module,
    optimizer: GossipSGD | Gossip,
    mean: bool,
    process_group: dist.ProcessGroup | None,
    stateful: dict[str, Any],
) -> int:
    meeting = Meeting("load_checkpoint()", optimizer._step, _timeout(optimizer), process_group, optimizer._gone)

    from .checkpoint_reader import Reader, check_parts

    reader = Reader(path, model, list(_params(optimizer)))
    found = reader.found({"model", "optimizer", *stateful})
    everybody = meeting.everybodys((found, reader.parts(meeting.rank, meeting.size)))
    finds = [find for find, _ in everybody]
    if found.startswith("no ") or set(finds) != {found}:
        seen = found if set(finds) == {found} else str(dict(zip(meeting.ranks, finds, strict=True)))
        raise ValueError(
            f"{path} holds {seen} (a checkpoint is a directory that all ranks can read, complete once it has .metadata)"
        )
    check_parts(path, [part for _, parts in everybody for part in parts])
    workers = optimizer._engine.place.workers
    averages = reader.count != workers.size or mean
    if averages:
        log.info("%s was saved by %d workers: they are averaged", path, reader.count)
        reader.check_alike()
    sums: dict[tuple, torch.Tensor] = {}
    failure: Exception | None = None
    centered = optimizer._engine.rule.centered
    try:
        values, sums = _summed(reader, workers) if averages else (reader.read(workers.rank), {})
        state = reader.nested(values)
        _check_model(state["model"], model)
        check_loaded(optimizer, unplaced(state["optimizer"], centered) if averages else state["optimizer"])
    except (LookupError, AttributeError) as error:  # it is nested as no checkpoint of this package is
        failure = ValueError(f"{path} holds no worker's state: {type(error).__name__}: {error}")
    except Exception as error:
        failure = error
    _raise_any(meeting, meeting.everybodys(_told(failure)))
    if averages:
        for place in sorted(sums, key=str):
            with calling("load_checkpoint()"):
                workers.mean(sums[place])
            local(values[place]).copy_(sums[place] * (workers.size / reader.count))
        state["optimizer"] = unplaced(state["optimizer"], centered)
    optimizer.synchronize()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, thing in stateful.items():
        thing.load_state_dict(unpacked(state[name]))
    return reader.count


def _summed(reader: Reader, workers: Group) -> tuple[dict[tuple, Any], dict[tuple, torch.Tensor]]:
    """One worker's values, and the sums of what has a mean over those that this rank has read."""
    values: dict[tuple, Any] = {}
    sums: dict[tuple, torch.Tensor] = {}
    for first in range(0, reader.count, workers.size):
        worker = first + workers.rank
        if values and worker >= reader.count:
            break
        # Who has none reads the last one all the same, for what has no mean, and counts it 0 times.
        values = reader.read(min(worker, reader.count - 1), others=0)
        for place in filter(reader.averages, values):
            part = local(values[place])
            part = part.to(torch.float32 if part.dtype in LOW_PRECISION else part.dtype) * (worker < reader.count)
            sums[place] = sums[place] + part if place in sums else part
    return values, sums


def _part(save: str, optimizer: GossipSGD | Gossip) -> dict[str, Any]:
    """What this rank's part says of itself, see checkpoint_reader.py. save: "-" for one that has no name."""
    from .checkpoint_files import identity

    rank = dist.get_rank() if dist.is_initialized() else 0
    return {str(rank): {str(_number(optimizer)): {save: identity(save, optimizer._step)}}}


def _number(optimizer: GossipSGD | Gossip) -> int:
    return optimizer._engine.place.workers.rank


def _check_kinds(model: Any, optimizer: Any, stateful: dict[str, Any]) -> None:
    """Raises TypeError for what has no state to save or to load, ValueError for a name that is taken."""
    if not isinstance(optimizer, (GossipSGD, Gossip)):
        raise TypeError(f"optimizer must be a GossipSGD or a Gossip, not {type(optimizer).__name__}")
    for name, thing in (("model", model), *stateful.items()):
        for method in ("state_dict", "load_state_dict"):
            if isinstance(thing, type) or not callable(getattr(thing, method, None)):
                raise TypeError(f"{name} must have {method}(), which {type(thing).__name__} lacks")


def _check_model(loaded: dict[str, Any], model: torch.nn.Module) -> None:
    """Raises ValueError for names and shapes that are not the model's: torch loads those that fit before it says so.

    Which names there must be is left to a model that may give others to what it loads.
    """
    own = model.state_dict()
    if not _renames(model):
        for names, lacks in ((own.keys() - loaded, "checkpoint"), (loaded.keys() - own, "model")):
            if names:
                has = "model" if lacks == "checkpoint" else "checkpoint"
                raise ValueError(f"the {lacks} lacks {', '.join(sorted(names)[:8])}, which the {has} has")
    for name, value in loaded.items():
        if isinstance(value, torch.Tensor) and isinstance(own.get(name), torch.Tensor):
            if value.shape != own[name].shape:
                raise ValueError(
                    f"the checkpoint has {name} of shape {tuple(value.shape)}, the model of {tuple(own[name].shape)}"
                )


def _renames(model: Any) -> bool:
    """Whether a model may load what has other names than its own: by a hook, or by methods that are not torch's."""
    if not isinstance(model, torch.nn.Module) or type(model).load_state_dict is not torch.nn.Module.load_state_dict:
        return True
    return any(
        module._load_state_dict_pre_hooks or not type(module)._load_from_state_dict.__module__.startswith("torch.nn.")
        for module in model.modules()
    )


# -- what went wrong on one rank is raised on all ---------------------------------------------------------------------


def _told(failure: BaseException | None) -> tuple[str, str] | None:
    """An exception as other ranks can have it: what kind it is, and its text."""
    if failure is None:
        return None
    kind = next((name for name, one in KINDS.items() if isinstance(failure, one)), type(failure).__name__)
    return kind, f"{'' if kind in KINDS else f'{kind}: '}{failure}"


def _raise_any(meeting: Meeting, problems: list[tuple[str, str] | None]) -> None:
    """Raises the first of all ranks' problems, if there are any."""
    for rank, problem in zip(meeting.ranks, problems, strict=True):
        if problem is not None:
            kind, text = problem
            raise KINDS.get(kind, RuntimeError)(f"{meeting.what}, on rank {rank}: {text}")


def _failure(error: CheckpointException, rank: int) -> BaseException | None:
    """What a rank raised in DCP, which packs all up in an exception of its own that is no Exception."""
    return error.failures[rank][0] if rank in error.failures else None


def _timeout(optimizer: GossipSGD | Gossip) -> float:
    place = optimizer._engine.place
    return place.workers.timeout if place.workers.size > 1 else place.inside.timeout


def _params(optimizer: GossipSGD | Gossip) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
