"""The store of a run, which node 0's launcher keeps, and what the launchers of several nodes say to each other in it.

Workers agree through the store on who is left after a loss. So it must outlive every one of them, and live in none: it
is served by the launcher on node 0, which stays until the launchers of the other nodes are through.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ..comm.register import KEYS, somebody_trains, was_left, who_came

ANSWER = timedelta(seconds=30)  # for what is in the store already, or about to be
BACKLOG = 4096  # connections: all workers may come at once


class LaunchError(RuntimeError):
    """Why a run cannot start, in one line."""


def serve(port: int | None) -> dist.TCPStore:
    """The store, served by this process on `port`; None: on a free one, where only this machine can reach it.

    Raises LaunchError if it cannot listen there.
    """
    listener = _listener(port)
    return dist.TCPStore(
        "127.0.0.1", listener.getsockname()[1], is_master=True, wait_for_workers=False, timeout=ANSWER,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def _listener(port: int | None) -> socket.socket:
    if port is None:
        return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
        return socket.create_server(("", port), backlog=BACKLOG)  # IPv6 may be compiled in and switched off
    except OSError as error:
        raise LaunchError(f"cannot listen on port {port} of --rdzv: {error.strerror}") from error


def reach(host: str, port: int, wait: float, stopped: Callable[[], bool]) -> dist.TCPStore | None:
    """The store that node 0 serves at host:port, once it is there; None if `stopped()` comes true before.

    Raises LaunchError if there is none within `wait` seconds.
    """
    end = time.monotonic() + wait
    while not stopped():
        try:
            socket.create_connection((host, port), timeout=2.0).close()
        except OSError as error:  # refused, no route, or a name that does not resolve yet
            if time.monotonic() > end:
                raise LaunchError(
                    f"no store at {host}:{port} after {wait:g} s ({error}): is node 0's launcher running, "
                    "and was it given the same --rdzv?"
                ) from error
            time.sleep(0.3)
            continue
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=ANSWER)
        except RuntimeError as error:
            raise LaunchError(f"what listens at {host}:{port} is not the store of a run") from error
    return None


class Launchers:
    """What the launcher of `node` says to the others of a run of `nodes` nodes, in the store.

    Node 0 waits for the others at the end; who has said nothing for `silence` seconds is given up. The others give a
    sign of life every `beat` seconds, in a thread: a network that stands still must not stop the launcher.
    """

    def __init__(self, store: dist.Store, node: int, nodes: int, *, beat: float = 5.0, silence: float = 60.0) -> None:
        self._store, self.node, self.nodes = dist.PrefixStore("fused-dlam run", store), node, nodes
        self._members = dist.PrefixStore(f"{KEYS}0", store)
        self.beat, self.silence = beat, silence
        self.lost = False  # whether node 0 and the store are gone
        self._ending = self._said = self._leaving = False
        self._numbers: dict[str, int] = {}
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def greet(self, n: int) -> None:
        """Starts; raises LaunchError where node 0 was told other numbers, or this node is there twice."""
        mine = f"--nnodes {self.nodes} -n {n}"
        if self.node == 0:
            self._store.set("numbers", mine)
            return
        try:
            self._store.wait(["numbers"], ANSWER)
            theirs = self._store.get("numbers").decode()
            count = self._store.add(f"launchers of {self.node}", int(theirs == mine))
        except RuntimeError as error:
            raise LaunchError(f"node 0 does not answer: {str(error).splitlines()[0]}") from error
        if theirs != mine:
            raise LaunchError(f"node 0 runs with {theirs}, and this node with {mine}")
        if count > 1:
            raise LaunchError(f"another launcher was started with --node-rank {self.node}")
        self._thread.start()

    def say_ending(self) -> None:
        """That a worker has come to its end: nobody is started again after that, on any node."""
        if self._said:
            return
        if self.node == 0:
            self._store.set("ending", "")
        self._ending = self._said = True
        self._wake.set()

    def ending(self) -> bool:
        """Whether any launcher has said so. On nodes other than 0 up to `beat` seconds late."""
        if self.node == 0:
            self._ending = self._ending or self._store.check(["ending"])
        return self._ending

    def numbers(self) -> dict[str, int]:
        """The workers that were let in, by the names under which their processes were started.

        On nodes other than 0 up to `beat` seconds late.
        """
        if self.node == 0:
            self._numbers = who_came(self._members)
        return self._numbers

    def somebody_trains(self) -> bool | None:
        """Whether a worker may be alive, on any node, that could let a newcomer in. None: nobody knows."""
        try:
            return somebody_trains(self._members)
        except RuntimeError:  # node 0 is gone
            return None

    def was_left(self, name: str) -> bool:
        """Whether the process of this name has ended because the others had gone on without it."""
        try:
            return was_left(self._members, name)
        except RuntimeError:  # node 0 is gone
            return False

    def leave(self) -> None:
        """The others' last word: node 0 need not wait for this node."""
        self._leaving = True
        self._wake.set()
        self._thread.join(timeout=self.beat + 5.0)

    def wait_for_others(self, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Node 0 stays, as their workers need the store, until all others have left, are silent, or `stopped()`."""
        heard = {node: (-1, time.monotonic()) for node in range(1, self.nodes)}
        told = time.monotonic() + self.beat
        while heard and not stopped():
            for node, (beats, since) in list(heard.items()):
                now, count = time.monotonic(), self._store.add(f"beats of {node}", 0)
                if self._store.check([f"{node} is through"]):
                    del heard[node]
                elif count != beats:
                    heard[node] = count, now
                elif now - since > self.silence:
                    was = "was silent" if count else "did not come"
                    say(f"node {node} {was} for {self.silence:g} s: it is not waited for any longer")
                    del heard[node]
            if heard and time.monotonic() > told:
                say(f"waiting for the workers of {_nodes(list(heard))}, which need the store here")
                told = float("inf")
            time.sleep(0.1)

    def _live(self) -> None:
        try:
            while not self._leaving:
                self._store.add(f"beats of {self.node}", 1)
                if self._said:
                    self._store.set("ending", "")
                self._ending = self._ending or self._store.check(["ending"])
                self._numbers = who_came(self._members)
                self._wake.wait(self.beat)
                self._wake.clear()
            if self._said:
                self._store.set("ending", "")
            self._store.set(f"{self.node} is through", "")
        except RuntimeError:
            self.lost = True


def _nodes(nodes: list[int]) -> str:
    return f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {', '.join(map(str, nodes))}"
