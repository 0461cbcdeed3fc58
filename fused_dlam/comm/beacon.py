"""A port of each worker that tells whether its process runs.

The kernel closes it in the moment in which the process dies, so a refused connection is a certain death, known within
a millisecond and without a heartbeat. A process that is stopped or cut off does not answer, and one that merely waits
does: its beacon has a thread of its own.

The beacon sends one fixed word to whoever connects, reads nothing, and serves one caller after the other. It listens on
the one interface that faces the store.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

WORD = b"here"
GRACE = 2.0  # seconds that a process has to answer; on a machine with 50 ready processes per core 0.5 were too few

Address = tuple[str, int]


class Beacon:
    """This process's. towards: the address of the store, which tells the interface."""

    def __init__(self, towards: Address):
        family, _, _, _, there = socket.getaddrinfo(*towards, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(there)  # sends nothing
            host = probe.getsockname()[0]
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        host, port = self._listener.getsockname()[:2]
        self.address: Address = host, port
        # A data loader's forked worker must not hold the port open when its parent is dead.
        os.register_at_fork(after_in_child=self._listener.close)
        threading.Thread(target=self._answer, daemon=True, name="fused_dlam-beacon").start()

    def _answer(self) -> None:
        while True:
            try:
                caller = self._listener.accept()[0]
            except OSError:
                if self._listener.fileno() == -1:  # closed
                    return
                time.sleep(0.1)  # no descriptor is left, say
                continue
            with caller:
                try:
                    caller.sendall(WORD)  # four bytes: never waits for the caller
                except OSError:
                    pass

    def close(self) -> None:
        """From here on this process counts as dead."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which `close` alone does not
        except OSError:
            pass
        self._listener.close()


def refuses(address: Address, patience: float = 0.5) -> bool:
    """Whether the process that had this address is certainly gone."""
    try:
        socket.create_connection(address, timeout=patience).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # it cannot be reached: cut off, perhaps not dead
    return False


def which(question: Callable[[int], bool], numbers: Collection[int]) -> set[int]:
    """Those of which it is true. All are asked at once: two stopped ones are not waited for in turn."""
    if not numbers:
        return set()
    with ThreadPoolExecutor(len(numbers), "fused_dlam-probe") as pool:
        return {i for i, holds in zip(numbers, pool.map(question, numbers), strict=True) if holds}


def which_answer(addresses: Mapping[int, Address]) -> set[int]:
    """The numbers of those that run and can be reached."""
    return which(lambda i: answers(addresses[i]), addresses)


def answers(address: Address, patience: float = GRACE) -> bool:
    """Whether a process at this address runs, and can be reached."""
    try:
        with socket.create_connection(address, timeout=patience) as connection:
            return connection.recv(len(WORD)) == WORD
    except OSError:
        return False
