"""Workers that stay, for a notebook: `team = workers(4)` starts them, and `%px` runs a line on all of them.

    team = workers(4)                  four processes, a gloo process group over them
    %px x = torch.ones(3) * rank       on every worker; rank and n are there already
    %px x = neighbor_allreduce(x, "ring")
    team.pull("x")                     worker 0's x, here; team.pull_all("x") is a list, by rank
    team.close()                       ends them, as does the end of the notebook

`%%px` does it for a whole cell, and `%%px --local` here too. The processes are engines of ipyparallel, which has more:
`team.view` is its DirectView. This needs `pip install 'fused-dlam[notebook]'`.

A worker that waits for a neighbor gives up after `timeout` seconds, like every exchange. Interrupting the cell sends
SIGINT to all workers. If the notebook's process is killed, its workers end by themselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

ENVIRONMENT = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is served from elsewhere
LOOK = 0.5  # seconds between two looks for the notebook
_team: Workers | None = None


def workers(n: int, timeout: float = 60.0, deadline: float = 120.0) -> Workers:
    """Starts n worker processes that stay, and makes `%px` run on them. Those of an earlier call are ended.

    Args:
        n: how many, from 1 on.
        timeout: seconds after which a wait of the process group is an error.
        deadline: seconds that starting them may take.

    Raises ImportError, saying what to install, without ipyparallel; ValueError for n below 1; RuntimeError, after which
    no process is left, if they have not started by the deadline.
    """
    global _team
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"the number of workers must be a whole number from 1 on, not {n!r}")
    try:
        import ipyparallel  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"workers of a notebook need ipyparallel, which cannot be imported ({error}): run"
            " pip install 'fused-dlam[notebook]' and restart the notebook's kernel"
        ) from error
    if _team is not None:
        _team.close()
    _team = Workers(n, timeout, deadline)
    return _team


class Workers:
    """What `workers(n)` returns. A context manager too: `with workers(4) as team:`.

    Attributes: `n`; `view`, ipyparallel's blocking DirectView of all workers in the order of their ranks.
    """

    def __init__(self, n: int, timeout: float, deadline: float):
        import ipyparallel
        from IPython import get_ipython

        end = time.monotonic() + deadline
        self.n, self._client, self._closed = n, None, False
        self._folder = tempfile.TemporaryDirectory(prefix="fused_dlam-")
        # This process keeps the store, as a launcher does: it knows a free port before any worker asks for one.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._cluster = ipyparallel.Cluster(
            n=n, profile_dir=self._folder.name, log_level=logging.ERROR, engine_timeout=max(1, round(deadline))
        )
        try:
            self._client = self._cluster.start_and_connect_sync()
            self.view = self._client[:]
            controller = self._cluster.controller.pid
            joined = [
                self._client[engine].apply_async(_join, rank, n, self._store.port, timeout, os.getpid(), controller)
                for rank, engine in enumerate(self._client.ids)
            ]
            for each in joined:
                each.get(timeout=max(1.0, end - time.monotonic()))
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            raise RuntimeError(
                f"{n} workers have not started ({type(error).__name__}: {error}). Their processes are ended. Try fewer,"
                f" or a longer deadline than {deadline:g} s"
            ) from error
        self.view.block = True
        for rank, engine in enumerate(self._client.ids):
            self._client[engine].push({"rank": rank, "n": n}, block=True)
        if get_ipython() is not None:  # elsewhere there are no magics
            self.view.activate()

    def pull(self, name: str, rank: int = 0) -> Any:
        """The value of a variable of one worker."""
        return self.view.pull(name, targets=self.view.targets[rank], block=True)

    def pull_all(self, name: str) -> list[Any]:
        """The values of a variable on all workers, by rank."""
        return self.view.pull(name, block=True)

    def close(self, deadline: float = 30.0) -> None:
        """Ends the workers: those that have not ended when half of `deadline` seconds is over are killed."""
        global _team
        if self._closed:
            return
        self._closed = True
        _team = None if _team is self else _team
        processes = self._processes()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        _wait(processes, deadline / 2)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _wait(processes, deadline / 2)
        if self._client is not None:
            self._client.close()
        with contextlib.suppress(Exception):  # of processes that have ended already; it deletes its files
            self._cluster.stop_cluster_sync()
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def _processes(self) -> list[int]:
        sets = self._cluster.engines.values()
        engines = [launcher.pid for engines in sets for launcher in getattr(engines, "launchers", {}).values()]
        controller = [] if self._cluster.controller is None else [self._cluster.controller.pid]
        return [pid for pid in (*engines, *controller) if pid > 0]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{self.n} workers, {'ended' if self._closed else '%px runs on them'}"


def _wait(processes: list[int], seconds: float) -> None:
    """Until they have ended. ipyparallel's threads reap them."""
    end = time.monotonic() + seconds
    while any(map(_runs, processes)) and time.monotonic() < end:
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _join(rank: int, n: int, port: int, timeout: float, notebook: int, controller: int) -> None:
    """What an engine does to be worker `rank` of n."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ.update({**ENVIRONMENT, **{name: str(value) for name, value in ranks.items()}})
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(notebook, controller), daemon=True).start()
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def _leave_with(notebook: int, controller: int) -> None:
    """Ends this process, and ipyparallel's controller, when the notebook's process has ended, however that was."""
    while os.getppid() == notebook:
        time.sleep(LOOK)
    with contextlib.suppress(ProcessLookupError):
        os.kill(controller, signal.SIGTERM)
    os._exit(1)
