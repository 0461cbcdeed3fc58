"""Reading a checkpoint: one worker's entries at a time, and of which save each part is.

    parts.<rank>.<worker>.<save>    in that rank's file, which it begins: the save and the step

`.metadata` names files and places in them. Should a file be another save's, put there by a copy that was cut off, say,
it would be read as if it were this one's: DCP looks at nothing but places. safe_reading.py tells torn and changed
bytes, and lets no file run code.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.api import CheckpointException

from .checkpoint_files import PARTS, quietly
from .safe_reading import Known, Planner, read_metadata


class Part:
    """What one rank wrote."""

    def __init__(self, rank: int, worker: str, save: str, found: str):
        self.rank, self.worker = rank, worker
        self.named = save  # which save `.metadata` says it is of
        self.found, self.step = "", 0  # which it is of
        self.problem = ""  # why nothing could be read
        try:
            self.found, step = found.split()
            self.step = int(step)
        except ValueError:
            self.problem = found

    def __str__(self) -> str:
        return f"of step {self.step}" if not self.problem else f"unreadable ({self.problem})"


class Reader:
    """Reads one worker's entries at a time: {where in its nested state: value}. It talks to nobody.

    Args:
        model, params: those that are to be loaded into, in which way tensors are read: sharded, and on which device.
    """

    def __init__(self, path: str | PathLike[str], model: torch.nn.Module, params: list[torch.Tensor]):
        self.path, self.model, self.params = path, model.state_dict(), params
        self.problem = ""
        try:
            self._take(read_metadata(path))
        except FileNotFoundError:
            self._take(Metadata({}, {}))
        except Exception as error:
            self._take(Metadata({}, {}))
            self.problem = f"; {type(error).__name__}: {error}"

    def _take(self, metadata: Metadata) -> None:
        self.metadata, self.stored = metadata, metadata.state_dict_metadata
        self.keys: dict[int, dict[tuple, str]] = {}
        self._parts: list[tuple[int, str, str, str]] = []
        for key, place in (metadata.planner_data or {}).items():
            worker = str(place[0]).removeprefix("worker")
            if worker.isdigit():
                self.keys.setdefault(int(worker), {})[tuple(place[1:])] = key
            elif place[0] == PARTS and len(place) == 4:
                self._parts.append((int(place[1]), str(place[2]), str(place[3]), key))
        self._parts.sort()
        self.count = len(self.keys)
        self.sections = (
            {place[0] for place in self.keys.get(0, {})} if set(self.keys) == set(range(self.count)) else set()
        )

    def found(self, wanted: set[str]) -> str:
        """What there is, for ranks to compare."""
        lacking = ", ".join(sorted(wanted - self.sections))
        if lacking:
            return f"no {lacking} saved by fused_dlam.save_checkpoint{self.problem}"
        saves = sorted({save for _, _, save, _ in self._parts} - {"-"})
        return f"{self.count} workers" + (f" of save {', '.join(saves)}" if saves else "")

    def parts(self, rank: int, size: int) -> list[Part]:
        """What some of the parts say of themselves: of `size` ranks, number `rank` reads these."""
        return [
            Part(writer, worker, save, self._identity(key)) for writer, worker, save, key in self._parts[rank::size]
        ]

    def _identity(self, key: str) -> str:
        try:
            return str(self._load({key: None})[key])
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def averages(self, place: tuple) -> bool:
        """Whether the mean of an entry over the workers means something: floating-point tensors."""
        properties = getattr(self.stored[self.keys[0][place]], "properties", None)
        floats = properties is not None and (properties.dtype.is_floating_point or properties.dtype.is_complex)
        return floats and place[0] in ("model", "optimizer")

    def read(self, worker: int, others: int | None = None) -> dict[tuple, Any]:
        """A worker's entries; what cannot be averaged of worker `others`. Raises OSError or ValueError."""
        chosen = {
            place: key if others is None or self.averages(place) else self.keys[others][place]
            for place, key in self.keys[worker].items()
        }
        values = self._load({key: self._room(place, key) for place, key in chosen.items()})
        return {place: values[key] for place, key in chosen.items()}

    def _load(self, values: dict[str, Any]) -> dict[str, Any]:
        try:
            with quietly():
                dcp.load(values, storage_reader=Known(self.path, self.metadata), planner=Planner(), no_dist=True)
        except CheckpointException as packed:
            error = packed.failures[0][0]
            if isinstance(error, (OSError, ValueError, MemoryError, torch.OutOfMemoryError)):
                raise error from None
            raise ValueError(f"{self.path} cannot be read: {type(error).__name__}: {error}") from None
        return values

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

    @staticmethod
    def nested(values: dict[tuple, Any]) -> dict[str, Any]:
        """{place: value} as worker_state had it. DCP makes text of an optimizer's parameter numbers."""
        from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

        state = unflatten_state_dict({str(p): v for p, v in values.items()}, {str(p): p for p in values})
        optimizer = state["optimizer"]
        numbered = {int(number): entries for number, entries in optimizer.get("state", {}).items()}
        return {**state, "optimizer": {**optimizer, "state": numbered}}


def check_parts(path: str | PathLike[str], parts: list[Part]) -> None:
    """Raises ValueError, naming the parts, if they are not all of the save of which `.metadata` says they are.

    A checkpoint of an earlier release has none, and is taken as it is.
    """
    parts = sorted(parts, key=lambda part: part.rank)
    alike = len({(part.found, part.step) for part in parts}) < 2
    if alike and not any(part.problem or part.found != part.named for part in parts):
        return
    several = len({part.worker for part in parts}) < len(parts)
    same_step = len({part.step for part in parts}) == 1

    def told(part: Part, word: str) -> str:
        rank = f" (rank {part.rank}'s)" if several else ""
        save = f" (save {part.found})" if same_step and not part.problem else ""
        return f"worker {part.worker}'s{word}{rank} is {part}{save}"

    texts = [told(part, "" if i else " part") for i, part in enumerate(parts[:16])]
    more = f" and {len(parts) - 16} more" if len(parts) > 16 else ""
    named = ", ".join(sorted({part.named for part in parts}))
    raise ValueError(
        f"{path} holds parts of more than one save, or is not whole: {', '.join(texts)}{more}; .metadata is of save"
        f" {named}. Load another checkpoint"
    )
