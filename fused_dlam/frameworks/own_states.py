"""What Lightning and Fabric share: a file of the workers' mean, and beside it every worker's own state.

    run/last.ckpt                      the framework's file, of rank 0: the mean of models and optimizers
    run/workers/last.ckpt.3f9a01c2/0   what `fused_dlam.save_checkpoint` wrote for the first optimizer, 1 for the next

The file names its folder, and is written after it, in one move. So a kill at any moment leaves a file whose folder is
whole. A file that has lost its folder still starts training again, from the mean.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .. import Gossip, GossipSGD, load_checkpoint, save_checkpoint

KEY = "fused_dlam"  # of the file's entry about its folder
FOLDERS = "workers"
log = logging.getLogger("fused_dlam")


def check(optimizer: Any, strategy: str) -> GossipSGD | Gossip:
    """Raises TypeError for an optimizer that does not gossip: under `strategy` each worker would train alone."""
    if isinstance(optimizer, (GossipSGD, Gossip)):
        return optimizer
    name = type(optimizer).__name__
    raise TypeError(
        f"{strategy} exchanges nothing by itself, the optimizer does, and {name} does not: every worker would train"
        f" alone. Take fused_dlam.Gossip({name}(...)) or fused_dlam.GossipSGD, or a strategy that averages gradients"
        ' ("ddp")'
    )


def deadline(timeout: float) -> timedelta:
    """Raises ValueError for what is no number of seconds to wait."""
    if not timeout > 0:
        raise ValueError(f"timeout must be positive seconds, not {timeout}")
    return timedelta(seconds=timeout)


@contextmanager
def averaged(optimizers: Sequence[GossipSGD | Gossip], model: torch.nn.Module) -> Iterator[None]:
    """`averaged(model)` of several optimizers. All ranks must enter it together.

    The first one also averages what no optimizer holds, and is entered last: it takes the others' parameters for such
    as well, finds their mean there, and puts that back before they put back their own.
    """
    with ExitStack() as stack:
        for number, optimizer in reversed([*enumerate(optimizers)]):
            stack.enter_context(optimizer.averaged(None if number else model))
        yield


def cloned(values: Any) -> Any:
    """A nested state with copies of its tensors, for those of an average change when its context ends."""
    if isinstance(values, torch.Tensor):
        return values.detach().clone()
    if isinstance(values, Mapping):
        return {name: cloned(value) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(cloned(value) for value in values)
    return values


def save(
    path: str | PathLike[str],
    model: torch.nn.Module,
    optimizers: Sequence[GossipSGD | Gossip],
    broadcast: Callable[[Any], Any],
) -> dict[str, Any]:
    """Saves every worker's own state into a new folder, and returns what the file at `path` is to say of it.

    All ranks must call it, outside of `averaged`. Raises ValueError for a path that is no place in a file system, else
    as `save_checkpoint` does.
    """
    folder = broadcast(f"{Path(path).name}.{uuid.uuid4().hex[:8]}")
    for number, optimizer in enumerate(optimizers):
        save_checkpoint(_folders(path) / folder / str(number), model if number == 0 else _own(optimizer), optimizer)
    return {"folder": folder, "optimizers": len(optimizers)}


def tidy(path: str | PathLike[str], kept: str | None = None) -> None:
    """On one rank, after the file was written: removes the folders of the files that it has replaced."""
    home = _folders(path)
    for folder in home.glob(f"{Path(path).name}.????????") if home.is_dir() else ():
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)
    if home.is_dir() and not any(home.iterdir()):
        home.rmdir()


def load(
    path: str | PathLike[str],
    entry: Mapping[str, Any],
    model: torch.nn.Module,
    optimizers: Sequence[GossipSGD | Gossip],
    on_all: Callable[..., bool],
) -> bool:
    """Loads what `save` has saved, and returns whether it was there. All ranks must call it.

    Args:
        entry: what the file at `path` says of its folder.
        on_all: whether something is so on all ranks; with all=False, on any.

    Raises ValueError for another number of optimizers, or where some ranks alone see the folder; else as
    `load_checkpoint` does.
    """
    folder = _folders(Path(path).resolve()) / str(entry["folder"])  # of the file that a link points at
    here = folder.is_dir()
    if not on_all(here):
        if on_all(here, all=False):
            raise ValueError(f"some ranks do not see {folder}: a checkpoint is in a folder that all machines share")
        log.warning("%s has lost the workers' own states (%s): all start from their mean", path, folder)
        return False
    if entry["optimizers"] != len(optimizers):
        raise ValueError(f"{path} was saved with {entry['optimizers']} optimizers, and there are {len(optimizers)}")
    for number, optimizer in enumerate(optimizers):
        load_checkpoint(folder / str(number), model if number == 0 else _own(optimizer), optimizer)
    return True


def _own(optimizer: GossipSGD | Gossip) -> torch.nn.Module:
    """An optimizer's parameters as a model: the whole one is saved once."""
    return torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])


def _folders(path: str | PathLike[str]) -> Path:
    if "://" in str(path):
        raise ValueError(
            f"{path}: every worker saves its own state, for which a folder is needed that all machines share, in a"
            " file system and not behind a URL. Copy it from there, or save weights alone"
        )
    return Path(path).absolute().parent / FOLDERS
