"""The processes of bench/soak.py: forks, on hosts of a lab, and one that keeps the store."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

HOST = "127.0.0.1"


def fork(function, *arguments, out: Path | None = None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        with open(out or os.devnull, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_host(namespace: str | None, function, *arguments) -> None:
    """Calls a function where a host's network is all that this process sees."""
    if namespace is not None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/var/run/netns/{namespace}") as file:
            if libc.setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"entering {namespace}")
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    function(*arguments)


def keep_store(address: str, port: int) -> None:
    store = dist.TCPStore(address, port, None, True, wait_for_workers=False)  # noqa: F841
    time.sleep(3600)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def fork_quietly(function, *arguments) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid
