"""Processes that are forks of a script which has imported everything: they start in milliseconds, and may be killed.

For scripts of their own, which have no threads when they fork; pytest has some.
"""

import atexit
import multiprocessing.util
import os
import signal
import sys
import time
import traceback

import torch.distributed as dist

HOST = "127.0.0.1"


def fork(function, *arguments, out=os.devnull):
    """Runs a function in a new process, whose output goes to a file, and returns its pid.

    It ends like a script: with what is to be done at the end, and exit code 1 after an exception.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        file = os.open(out, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        function(*arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        sys.last_type, code = sys.exc_info()[0], 1  # as the interpreter leaves it
    try:
        multiprocessing.util._exit_function()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def launched(rank, n, port, local=1):
    """Sets what the launcher does for a worker, one of `local` on its machine. The store: see `start_store`."""
    own = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    own |= {"MASTER_ADDR": HOST, "MASTER_PORT": port, "FUSED_DLAM_STORE": f"{HOST}:{port}"}
    own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in own.items()})


def others_end_well(n, victim, function, *arguments, seconds=120):
    """Runs function(rank, *arguments) in n launched workers; whether all but the victim end with exit code 0."""
    keeper, port = start_store()  # in a process of its own: no thread runs here when workers are forked
    pids = []
    for rank in range(n):
        launched(rank, n, port)
        pids.append(fork(function, rank, *arguments, out="/dev/stderr"))
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < n and time.monotonic() < end:
        for rank, pid in enumerate(pids):
            done, status = os.waitpid(pid, os.WNOHANG) if rank not in codes else (0, 0)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for rank, pid in enumerate(pids):
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)
    os.kill(keeper, signal.SIGKILL)
    return all(codes.get(rank) == 0 for rank in range(n) if rank != victim)


def start_store():
    """A store in a process of its own, as a launcher gives it: (pid, port)."""
    reads, writes = os.pipe()
    pid = fork(_keep, writes)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        return pid, int(pipe.readline())


def _keep(pipe):
    store = dist.TCPStore(HOST, 0, None, True, wait_for_workers=False)
    os.write(pipe, b"%d\n" % store.port)
    os.close(pipe)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)
