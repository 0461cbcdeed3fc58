"""torch's process groups: which backend serves a device, and new ones under a name that all members find themselves."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from . import interruptible
from .inherited import noted

CPU = torch.device("cpu")
BACKENDS = ("nccl", "gloo", "fake")
_naming = threading.local()  # .name: of the group that this thread builds


def transport(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """The backend that carries a device's tensors in a group: "nccl", "gloo" or torch's "fake".

    A group's name does not tell: `init_process_group()` and `init_device_mesh` without a group make one that
    `dist.get_backend` calls "undefined", and "cpu:gloo,cuda:nccl" has two. Raises ValueError if nothing fits.
    """
    config = dist.get_backend_config(group)
    found = dict(pair.split(":") for pair in config.split(",")).get(device.type)
    if found not in BACKENDS or (found == "nccl" and device.type != "cuda"):
        what = f"has no backend for tensors on {device}" if found is None else f"carries them by {found!r}"
        raise ValueError(
            f"the parameters are on {device}, and the process group ({config}) {what}: exchanges run over nccl (CUDA),"
            ' gloo (CPU, or CUDA through host memory). Call init_process_group("nccl") for GPUs, "gloo" for CPUs'
        )
    return found


def build(
    ranks: Sequence[int],
    backend: str,
    timeout: float,
    parts: Sequence[Sequence[int]],
    name: str,
    gone: Callable[[], str] | None = None,
) -> dist.ProcessGroup:
    """A new group over `ranks`, of which this rank is one; all of them call this.

    torch names a group by how many there are, or have been, in the process that asks. Ranks that have belonged to
    different numbers of groups then look for each other under different names until the timeout, and a number may come
    again once a group was destroyed. So this package names its groups itself.

    Args:
        parts: the ranks of every group that the ranks of the job build at this moment, `ranks` among them, where all
            take part. NCCL splits an eager communicator (`init_process_group(device_id=...)`) with the help of all.
        name: what these ranks, or all of `parts`, call what they build now, and nothing else (roll_call.py).
        gone: why nobody should wait for the others any more, where that can be known.

    Raises ValueError where that help cannot be had.
    """
    everybody = sorted(itertools.chain(*parts)) == list(range(dist.get_world_size()))
    eager = backend == "nccl" and dist.group.WORLD.bound_device_id is not None  # type: ignore[union-attr]
    if eager and not everybody:
        raise ValueError(
            f"ranks {list(ranks)} are to exchange, and init_process_group(device_id=...) has NCCL split communicators"
            " with the help of all ranks: leave device_id out, or pass hierarchical=mesh in place of group="
        )
    options = None
    if backend == "nccl":
        # Sends wait for no queued backward kernel, as in FSDP2.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    mine = None
    for part in parts if everybody else (ranks,):
        members = sorted(part)
        number = hashlib.sha1(str((name, members)).encode()).hexdigest()
        build_it = partial(_named, f"fused_dlam_{number}", members, backend, timeout, options, local=not everybody)
        made = build_it() if gone is None else interruptible.run(build_it, gone)
        if members == sorted(ranks):
            mine = made
    assert mine is not None
    return mine


def _named(name, ranks, backend, timeout, options, local) -> dist.ProcessGroup:
    """`dist.new_group` under a given name, for which it has no argument."""
    if not hasattr(c10d._process_group_name, "of_torch"):
        c10d._process_group_name = _name(c10d._process_group_name)  # type: ignore[assignment]
    _naming.name = name
    try:
        with noted():
            return dist.new_group(
                ranks,
                timeout=timedelta(seconds=timeout),
                backend=backend,
                pg_options=options,
                use_local_synchronization=local,
                group_desc="fused_dlam",
            )
    finally:
        del _naming.name


def _name(of_torch: Callable[..., str]) -> Callable[..., str]:
    """torch's function that names groups, which asks here first: for the thread that builds one of this package's."""

    def name(*arguments: Any, **named: Any) -> str:
        return getattr(_naming, "name", None) or of_torch(*arguments, **named)

    name.of_torch = of_torch  # type: ignore[attr-defined]
    return name
