"""Worker processes on this machine, over gloo, for demo, benchmarks and tests. `fused-dlam run` is for training."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: The fork server imports these once, and all workers are forks of it. torch.optim imports torch._dynamo when the first
#: optimizer is built. Eight workers on two cores start in 2.5 s, and in 0.7 s the next time; with torch alone in 3.3 s
#: and 2.6 s; without a fork server they took 40 s. This package is not among them: the server does not have the
#: parent's sys.path, and would import an installed copy where the parent runs another one.
PRELOAD = ["torch", "torch._dynamo", "networkx", "triton", "numba"]  # those that are not installed are skipped


def run_workers(fn: Callable[..., Any], n: int, *args: Any, deadline: float = 600.0) -> list[Any]:
    """Runs `fn(rank, *args)` in n processes with a gloo process group over all of them; returns their results.

    fn must be importable (not a lambda). Each worker has one thread. If one fails the others are ended and its
    traceback is raised; if they are not done after `deadline` seconds, TimeoutError.
    """
    if n < 1:
        raise ValueError(f"the number of workers must be at least 1, not {n}")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    try:
        return _run(fn, n, args, deadline)
    except _NotConnected:  # seen once in a thousand starts, on a busy machine; on that worker nothing has run
        return _run(fn, n, args, deadline)


class _NotConnected(RuntimeError):
    """A worker's process group could not be built."""


def _run(fn: Callable[..., Any], n: int, args: tuple, deadline: float) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="fused_dlam-") as folder:
        context = mp.start_processes(
            _worker, (fn, n, args, folder, deadline), nprocs=n, join=False, start_method="forkserver"
        )
        end = time.monotonic() + deadline
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > end:
                    raise TimeoutError(f"{n} workers of {fn.__name__} were not done after {deadline:g} s")
        except mp.ProcessRaisedException as error:
            if Path(folder, f"connected{error.error_index}").exists():
                raise
            raise _NotConnected(str(error)) from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(n)]


def _worker(rank: int, fn: Callable[..., Any], n: int, args: tuple, folder: str, deadline: float) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is left out of every search: of 0.39 s for an optimizer and its end, 0.09 are left
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=deadline))
    Path(folder, f"connected{rank}").touch()
    try:
        Path(folder, f"result{rank}").write_bytes(pickle.dumps(fn(rank, *args)))
        try:
            dist.barrier()
        except RuntimeError:  # another worker failed: its traceback is the one to be raised, so it gets time to arrive
            time.sleep(10)
            raise
    finally:
        dist.destroy_process_group()


def _leave_with_parent() -> None:
    """Ends this process when its parent ends, however that ends: no worker is left training behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
