"""Where a checkpoint's files lie, so that a kill at any moment leaves a complete one.

    run/latest/.metadata                        what DCP reads first: the names of the files, and what is where in them
    run/latest/step600-1f0c55d2/__0_0.distcp    what rank 0 wrote, ...

Every save writes into a folder of its own, and `.metadata`, the last thing written, is put in the place of the former
one by one rename. Before it the directory is the old checkpoint, afterwards it is the new one, and DCP's tools read it
as they read any other. A folder that `.metadata` does not name is an older save's, or one's that was killed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter, Metadata

from ..comm.watch import log
from .safe_reading import read_metadata, seal

FOLDER = re.compile(r"step\d+-([0-9a-f]{8})")
FORMER = re.compile(r"__\d+_\d+\.distcp|(__\d+)?\.metadata\.tmp")  # what a plain dcp.save leaves in the directory
PARTS = "parts"  # the entry that says in every file of which save it is


def new_folder(step: int) -> str:
    """A name that no other save has."""
    return f"step{step}-{uuid.uuid4().hex[:8]}"


def identity(save: str, step: int) -> str:
    """What a part says of itself, of one length: other saves' parts can then be read where this one's should be."""
    return f"{save:8.8} {step:15d}"


class Writer(FileSystemWriter):
    """Writes into a folder of the checkpoint's directory, and puts it in place once all ranks have written.

    Args:
        home: the directory of the checkpoint.
        folder: this save's, from `new_folder`.
    """

    def __init__(self, home: Path, folder: str):
        super().__init__(home / folder)
        self.home, self.folder = home, folder

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As there; a full disk is an OSError, also where torch.save makes something else of it."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            inner: BaseException | None = error
            while inner is not None and not isinstance(inner, OSError):
                inner = inner.__cause__ or inner.__context__
            if inner is None:
                raise
            raise inner from None

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0, once everybody has written.

        Raises OSError if a file that a rank wrote is not there, as seen from here.
        """
        sizes: dict[str, int] = {}
        for one in chain(*results):
            place = one.storage_data
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
        for name, size in sizes.items():
            file = Path(self.path, name)
            found = file.stat().st_size if file.exists() else -1
            if found < size:
                raise OSError(
                    f"{file} was written, but rank 0 finds {'nothing' if found < 0 else f'{found} bytes of {size}'}"
                    " there: a checkpoint's directory must be on a file system that all ranks share"
                )
        for place in {id(one.storage_data): one.storage_data for one in chain(*results)}.values():
            place.relative_path = f"{self.folder}/{place.relative_path}"
        super().finish(metadata, results)
        seal(Path(self.path, ".metadata"))
        sync(Path(self.path))
        os.replace(Path(self.path, ".metadata"), self.home / ".metadata")
        sync(self.home)
        tidy(self.home, former=True)


def prepare(home: Path) -> None:
    """Makes the directory, and room in it. On rank 0, before anybody writes. Raises OSError."""
    home.mkdir(parents=True, exist_ok=True)
    sync(home.parent)
    tidy(home)


def tidy(home: Path, former: bool = False) -> None:
    """Removes what `.metadata` does not name: folders of older and of killed saves. What cannot be removed stays.

    former: also the files of a `dcp.save` that had this directory before.
    """
    try:
        kept = set()
        if (home / ".metadata").exists():
            kept = {Path(place.relative_path).parts[0] for place in read_metadata(home).storage_data.values()}
        for entry in list(home.iterdir()):
            if entry.name in kept:
                continue
            if FOLDER.fullmatch(entry.name) and entry.is_dir():
                shutil.rmtree(entry)
            elif former and FORMER.fullmatch(entry.name):
                entry.unlink()
    except Exception as error:  # the checkpoint is complete all the same
        log.warning("old files in %s could not be removed: %s", home, error)


def sync(folder: Path) -> None:
    """Waits until a folder's entries are on the disk, where it has such a wait."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def quietly() -> Iterator[None]:
    """Without DCP's warning, in every call, that it is alone, which it is meant to be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
