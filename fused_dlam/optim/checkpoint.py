"""Save once, resume on any number of workers: `torch.distributed.checkpoint` with every worker under its own name.

    worker0.model.*  worker0.optimizer.*  worker1.model.* ...

DCP takes a tensor that several ranks have under one name for the same tensor and writes it once: workers whose
parameters differ would all come back as the one that wrote. So each worker has a name of its own; a machine's ranks
share theirs, for they are equal, or hold the shards of one DTensor, and DCP splits the writing between them.

As many workers as before continue bit for bit. Another number starts from the mean of all that were saved: each reads
its part of them and the parts are summed by one all-reduce, so that everything is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist

from ..comm import sharded
from ..comm.group import Group
from ..comm.process_group import everybodys
from ..comm.watch import log
from ..engine.buckets import LOW_PRECISION
from .gossip import Gossip
from .gossip_sgd import GossipSGD
from .state_dict import unplaced


def worker_state(model: torch.nn.Module, optimizer: GossipSGD | Gossip, **stateful: Any) -> dict[str, Any]:
    """What `save_checkpoint` saves, for a `dcp.save` or `dcp.async_save` of one's own: {"worker3": {...}}."""
    own = {name: thing.state_dict() for name, thing in stateful.items()}
    return {f"worker{_number(optimizer)}": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **own}}


def save_checkpoint(
    path: str | PathLike[str],
    model: torch.nn.Module,
    optimizer: GossipSGD | Gossip,
    *,
    process_group: dist.ProcessGroup | None = None,
    **stateful: Any,
) -> None:
    """Saves every worker's model and optimizer into one directory that all ranks can reach. All ranks must call it.

    Args:
        path: a directory, on a file system that all machines share. It is complete once it has a file `.metadata`.
        model: anything with `state_dict`, its parameters the optimizer's.
        optimizer: a `GossipSGD` or `Gossip`.
        process_group: all ranks that take part; default: the world.
        stateful: what else has `state_dict` and `load_state_dict`, by name: `scheduler=scheduler`.
    """
    import torch.distributed.checkpoint as dcp

    state = worker_state(model, optimizer, **stateful)
    dcp.save(state, checkpoint_id=path, process_group=process_group, no_dist=not dist.is_initialized())


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

    As many as now: each has its own back and the run goes on bit for bit. Otherwise all start from the mean of the
    workers' parameters, buffers and optimizer state, with PC-DmSGD's correction zero, as its mean is, and go on in
    their own topology from the step that was saved; what is in `stateful` is worker 0's. `mean=True` does so although
    they are as many, for another topology or schedule. Other arguments as there.

    Raises ValueError, on every rank, if the checkpoint lacks something that is asked for, is of another method, or its
    workers' states have different entries.
    """
    reader = _Reader(path, model, optimizer, process_group)
    lacking = ", ".join(sorted({"model", "optimizer", *stateful} - reader.sections))
    found = f"no {lacking} saved by fused_dlam.save_checkpoint" if lacking else f"{reader.count} workers"
    finds = everybodys(found, process_group)  # a rank that raised alone would leave the others waiting in DCP
    if lacking or set(finds) != {found}:
        seen = found if set(finds) == {found} else str(dict(enumerate(finds)))
        raise ValueError(
            f"{path} holds {seen} (a checkpoint is a directory that all ranks can read, complete once it has .metadata)"
        )
    workers = optimizer._engine.place.workers
    if reader.count == workers.size and not mean:
        state = _nested(reader.read(_number(optimizer)))
    else:
        log.info("%s was saved by %d workers: they are averaged", path, reader.count)
        state = _nested(_mean(reader, workers))
        state["optimizer"] = unplaced(state["optimizer"], optimizer._engine.rule.centered)
    optimizer.synchronize()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, thing in stateful.items():
        thing.load_state_dict(state[name])
    return reader.count


class _Reader:
    """Reads one worker's entries at a time: {where in its nested state: value}."""

    def __init__(
        self,
        path: str | PathLike[str],
        model: torch.nn.Module,
        optimizer: GossipSGD | Gossip,
        process_group: dist.ProcessGroup | None,
    ):
        from torch.distributed.checkpoint import FileSystemReader, Metadata

        self.path, self.process_group = path, process_group
        self.model, self.params = model.state_dict(), list(_params(optimizer))
        try:
            metadata = FileSystemReader(path).read_metadata()
        except OSError:
            metadata = Metadata({}, {})
        self.stored = metadata.state_dict_metadata
        self.keys: dict[int, dict[tuple, str]] = {}
        for key, place in (metadata.planner_data or {}).items():
            worker = str(place[0]).removeprefix("worker")
            if worker.isdigit():
                self.keys.setdefault(int(worker), {})[tuple(place[1:])] = key
        self.count = len(self.keys)
        self.sections = (
            {place[0] for place in self.keys.get(0, {})} if set(self.keys) == set(range(self.count)) else set()
        )

    def averages(self, place: tuple) -> bool:
        """Whether the mean of an entry over the workers means something: floating-point tensors."""
        properties = getattr(self.stored[self.keys[0][place]], "properties", None)
        floats = properties is not None and (properties.dtype.is_floating_point or properties.dtype.is_complex)
        return floats and place[0] in ("model", "optimizer")

    def read(self, worker: int, others: int | None = None) -> dict[tuple, Any]:
        """A worker's entries; what cannot be averaged of worker `others`. All ranks must call it equally often."""
        import torch.distributed.checkpoint as dcp

        chosen = {
            place: key if others is None or self.averages(place) else self.keys[others][place]
            for place, key in self.keys[worker].items()
        }
        values = {key: self._room(place, key) for place, key in chosen.items()}
        dcp.load(values, checkpoint_id=self.path, process_group=self.process_group, no_dist=not dist.is_initialized())
        return {place: values[key] for place, key in chosen.items()}

    def _room(self, place: tuple, key: str) -> torch.Tensor | None:
        """Where DCP reads a tensor into: sharded and on the device as the parameter that it belongs to."""
        size = getattr(self.stored[key], "size", None)
        if size is None:
            return None  # not a tensor
        dtype = self.stored[key].properties.dtype  # type: ignore[union-attr]
        owner = None
        if place[0] == "model":
            owner = self.model.get(place[1])
        elif place[:2] == ("optimizer", "state") and int(place[2]) < len(self.params):
            owner = self.params[int(place[2])]
        if owner is not None and owner.shape == size:
            return torch.empty_like(owner, dtype=dtype, requires_grad=False)
        return torch.empty(size, dtype=dtype)

    def check_alike(self) -> None:
        """Raises ValueError if workers saved different entries, which have no mean."""
        for worker, places in self.keys.items():
            for place in set(places) ^ set(self.keys[0]):
                raise ValueError(
                    f"{self.path}: worker {worker} and worker 0 differ in having {'.'.join(map(str, place))}, so there"
                    f" is no mean of them; it can be resumed by {self.count} workers alone"
                )


def _mean(reader: _Reader, workers: Group) -> dict[tuple, Any]:
    """The mean of all saved workers, the same bits on every rank."""
    reader.check_alike()
    rank, size = workers.rank, workers.size
    values: dict[tuple, Any] = {}
    sums: dict[tuple, torch.Tensor] = {}
    for first in range(0, reader.count, size):
        worker = first + rank
        # Who has none left reads the last one all the same, and counts it 0 times: DCP's reading is collective.
        values = reader.read(min(worker, reader.count - 1), others=0)
        for place in filter(reader.averages, values):
            part = sharded.local(values[place])
            part = part.to(torch.float32 if part.dtype in LOW_PRECISION else part.dtype) * (worker < reader.count)
            sums[place] = sums[place] + part if place in sums else part
    for place in sorted(sums, key=str):
        workers.mean(sums[place])
        sharded.local(values[place]).copy_(sums[place] * (size / reader.count))
    return values


def _nested(values: dict[tuple, Any]) -> dict[str, Any]:
    """{place: value} as worker_state had it. DCP makes text of an optimizer's parameter numbers."""
    from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

    state = unflatten_state_dict({str(p): v for p, v in values.items()}, {str(p): p for p in values})
    optimizer = state["optimizer"]
    numbered = {int(number): entries for number, entries in optimizer.get("state", {}).items()}
    return {**state, "optimizer": {**optimizer, "state": numbered}}


def _params(optimizer: GossipSGD | Gossip) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _number(optimizer: GossipSGD | Gossip) -> int:
    return optimizer._engine.place.workers.rank
