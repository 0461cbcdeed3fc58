"""The default process group's key-value store, where ranks tell each other what they cannot send: who is there."""

from __future__ import annotations

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


def default_store(prefix: str) -> dist.Store | None:
    """Keys of this package's own in the default store.

    None under torch's "fake" backend: one process plays all ranks there, and its store keeps nothing.
    """
    backend, store = c10d._world.pg_map[c10d._get_default_group()]
    return None if backend == "fake" else dist.PrefixStore(prefix, store)
