"""One rank whose neighbor is itself: the whole exchange, its streams and its transport, on one device.

The pull is exactly zero if the message that arrives is the message of this very step, and only then: whatever comes
too early or too late shows as a difference from one worker that exchanges nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from fused_dlam.comm import transfer
from fused_dlam.comm.group import Alone, Group
from fused_dlam.comm.place import Layout, Place
from fused_dlam.topology import Peers, Topology

from .device import DEVICE, SMOKE, sleep


@contextlib.contextmanager
def process_group(
    backend: str | None = None, rank: int = 0, size: int = 1, path: str | None = None, **options
) -> Iterator[None]:
    """A default process group over a file: no port has to be free, no host name to be found."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("GPU_SCRATCH"), ignore_cleanup_errors=True) as folder:
        store = dist.FileStore(path or str(Path(folder, "store")), size)
        dist.init_process_group(
            backend or ("gloo" if SMOKE else "nccl"), store=store, rank=rank, world_size=size, **options
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def _by_one(name: str):
    def call(self: Echo, *args):
        self.size = 1
        try:
            return getattr(Group, name)(self, *args)
        finally:
            self.size = 2

    return call


class Echo(Group):
    """A group of one rank that says it is two, for an optimizer alone would exchange nothing. Means are over one."""

    def __init__(self, device: torch.device):
        super().__init__(None, 60.0, device=device)
        self.size = 2

    start_mean, mean, agree = map(_by_one, ("start_mean", "mean", "agree"))


class Loop:
    """Within it optimizers exchange with themselves: `with loop: optimizer = GossipSGD(...)` and its steps.

    One exchange for all of them: each would make a communicator of its own.
    """

    def __init__(self, weight: float = 0.5):
        self.peers = Peers((0,), (weight,), (0,))
        device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
        self.exchange = Echo(device)
        self.place = Place(self.exchange, Alone(device))

    def __enter__(self) -> Loop:
        self._patches = contextlib.ExitStack()
        for owner, name, new in (
            (Layout, "connect", lambda *_args, **_kwargs: self.place),
            (Topology, "peers", lambda *_args, **_kwargs: self.peers),
            (Topology, "most_messages", property(lambda _: 1)),
        ):
            self._patches.enter_context(patch.object(owner, name, new))
        if SMOKE:  # gloo refuses to send to its own rank
            mailbox = Mailbox()
            self._patches.enter_context(patch.object(dist, "irecv", mailbox.irecv))
            self._patches.enter_context(patch.object(dist, "isend", mailbox.isend))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()


class Mailbox:
    """In place of a transport, on a CPU: a send is copied into the newest receive of its tag.

    The newest: an optimizer that is dropped leaves the receives of a step that never comes.
    """

    def __init__(self) -> None:
        self._receives: dict[int, list[tuple[torch.Tensor, threading.Event]]] = defaultdict(list)

    def irecv(self, tensor, src=None, group=None, tag=0, group_src=None):
        there = threading.Event()
        self._receives[tag].append((tensor, there))
        return Work(there)

    def isend(self, tensor, dst=None, group=None, tag=0, group_dst=None):
        row, there = self._receives[tag].pop()
        row.view(-1).copy_(tensor.view(-1))
        there.set()
        return Work(there)


class Work:
    def __init__(self, there: threading.Event):
        self._there = there

    def wait(self, timeout: object = None) -> bool:
        if not self._there.wait(10):
            raise RuntimeError("no message came")
        return True


@contextlib.contextmanager
def delayed(where: str | None, milliseconds: float = 1.5) -> Iterator[None]:
    """The device sleeps before every pack, combine, send or receive: what is not ordered comes too early."""
    if where is None or SMOKE:
        yield
        return
    from fused_dlam.kernels.triton_passes import TritonPasses

    owner, name = {
        "pack": (TritonPasses, "pack"),
        "combine": (TritonPasses, "combine"),
        "send": (transfer.Transfer, "send"),
        "received": (transfer.Transfer, "wait_received"),
    }[where]
    real = getattr(owner, name)

    def late(*args, **kwargs):
        sleep(milliseconds)
        return real(*args, **kwargs)

    with patch.object(owner, name, late):
        yield
