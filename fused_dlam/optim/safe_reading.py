"""What a checkpoint's files can do: give the values that were saved, or be refused. They run no code.

Python's pickle calls whatever a file names. DCP reads `.metadata` with it, and with `torch.load(weights_only=False)`
what is no tensor. Here the first is read by an unpickler that knows the classes of a `Metadata` alone, and the second
with `weights_only=True`.

    .metadata     the pickle, and behind it, where pickle reads no more, the CRC-32 of its bytes
    *.distcp      one zip archive of torch.save for each entry, which has the CRC-32 of every record

torch writes the CRCs of records and does not look at them when it reads: a flipped bit would be a wrong number. Earlier
releases' `.metadata` end with the pickle, and those of `torch.distributed.checkpoint.save` too.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
import zlib
from fractions import Fraction
from os import PathLike
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.serialization import get_crc32_options, get_unsafe_globals_in_checkpoint, safe_globals

SEAL = re.compile(rb"\nfused-dlam crc32 ([0-9a-f]{8})\n")
LENGTH = len(b"\nfused-dlam crc32 01234567\n")

_PATHS: dict[str, type[PurePath]] = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
_CLASSES = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    (_StorageInfo.__module__, _StorageInfo.__name__): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # Where it was saved, which nobody opens. Python 3.13 has another module for it than those before and after.
    **{(module, name): kind for module in ("pathlib", "pathlib._local") for name, kind in _PATHS.items()},
}  # fmt: skip
#: What settings may be beside Python's numbers, text and tensors: NumPy's numbers and arrays of them, and fractions.
_SETTINGS: list[Any] = [
    Fraction, np.ndarray, np.dtype, np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0],
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgFDG"},
]  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _CLASSES.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs: nothing of it was run")
        return found


def seal(file: Path) -> None:
    """Writes the CRC of a `.metadata` behind it, and waits for the disk. Raises OSError."""
    with open(file, "r+b") as stream:
        stream.write(b"\nfused-dlam crc32 %08x\n" % zlib.crc32(stream.read()))
        stream.flush()
        os.fsync(stream.fileno())


def read_metadata(home: str | PathLike[str]) -> Metadata:
    """A checkpoint's `.metadata`. Raises OSError if it cannot be read, ValueError if it is torn, was changed, or names
    what no checkpoint needs."""
    content = Path(home, ".metadata").read_bytes()
    match = SEAL.fullmatch(content[-LENGTH:])
    body = content[:-LENGTH] if match else content
    if match and zlib.crc32(body) != int(match[1], 16):
        raise ValueError(".metadata was changed since it was written: its CRC is another")
    stream = io.BytesIO(body)
    try:
        found = _Unpickler(stream).load()
    except Exception as error:  # unpickling bytes that are not a pickle raises nearly anything
        raise ValueError(f".metadata cannot be read: {type(error).__name__}: {error}") from None
    if stream.tell() != len(body):
        raise ValueError(".metadata was changed since it was written: behind its end is something else than its CRC")
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f".metadata holds no Metadata of torch.distributed.checkpoint, but {type(found).__name__}")
    found.storage_meta = StorageMeta()
    return found


class Known(FileSystemReader):
    """Of a directory whose `.metadata` was read already: a save in the meantime may have put another in its place."""

    def __init__(self, path: str | PathLike[str], found: Metadata):
        super().__init__(path)
        self.metadata = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> io.BytesIO:
        """The bytes of one entry. Raises ValueError if they are not those that were written."""
        size = file.seek(0, os.SEEK_END)
        if not 0 <= sinfo.offset <= sinfo.offset + sinfo.length <= size:
            raise ValueError(f"{sinfo.relative_path} is torn: it ends within an entry")
        file.seek(sinfo.offset)
        content = file.read(sinfo.length)
        if not sinfo.transform_descriptors:
            _check_records(content, sinfo.relative_path)
        return io.BytesIO(content)


def _check_records(content: bytes, name: str) -> None:
    """Raises ValueError if a record's CRC is another. Without a look where torch was told to write none."""
    if not get_crc32_options():
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            bad = archive.testzip()
    except Exception as error:  # of damaged headers: BadZipFile, struct.error, NotImplementedError, ...
        bad = f"{type(error).__name__}: {error}"
    if bad is not None:
        raise ValueError(f"{name} was changed since it was written ({bad})")


class Planner(DefaultLoadPlanner):
    """Of a flat dictionary, {name in the checkpoint: a tensor to read into, or None}."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Raises ValueError for an entry that would have to run code."""
        name = read_item.dest_index.fqn
        try:
            with safe_globals(_SETTINGS):
                self.state_dict[name] = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            value.seek(0)
            with safe_globals(_SETTINGS):
                unsafe = get_unsafe_globals_in_checkpoint(value)
            if not unsafe:
                raise ValueError(f"{name} cannot be read: {error}") from None
            raise ValueError(
                f"{name} is made by {', '.join(unsafe)}. Nothing but numbers, text, tensors and NumPy's arrays is"
                " loaded from a checkpoint, for a file could call anything: save those, or, where the file can be"
                " trusted, call torch.serialization.add_safe_globals first"
            ) from None
