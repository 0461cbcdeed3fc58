"""One worker of `fused-dlam run`: a process group of its own, whose output is passed on line by line."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from .reaper import Reaper

LONGEST = 1 << 16  # bytes of a line: what is longer is passed on in parts
_one_at_a_time = threading.Lock()


class Worker:
    """A running process.

    Args:
        rank: its global rank at the start.
        former: the one in whose place it is started, as a newcomer.

    `number` is the worker's for life: its rank at the start. A newcomer has that of `former` until it was let in, where
    `renumber` is called. Raises OSError if the process cannot be started.
    """

    def __init__(
        self, rank: int, former: Worker | None, command: list[str], env: dict[str, str], reaper: Reaper
    ) -> None:
        self.rank, self.newcomer, self.started, self._reaper = rank, former is not None, time.monotonic(), reaper
        self.number: int = rank if former is None else former.number
        self.waits = self.newcomer  # to be let in
        self.name = env["FUSED_DLAM_PROCESS"]
        self.process = subprocess.Popen(
            reaper.makes_known(command), env=env, pass_fds=[reaper.pipe], start_new_session=True, bufsize=0,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._readers = [
            threading.Thread(target=pass_on, args=(source, target, self._prefix), daemon=True)
            for source, target in ((self.process.stdout, 1), (self.process.stderr, 2))
        ]
        for reader in self._readers:
            reader.start()

    def __str__(self) -> str:
        return f"the newcomer for worker {self.number}" if self.waits else f"worker {self.number}"

    def _prefix(self) -> bytes:
        return b"[new for %d] " % self.number if self.waits else b"[%d] " % self.number

    def renumber(self, number: int) -> int:
        """It was let in under this number: the one that it has had."""
        former, self.number, self.waits = self.number, number, False
        return former

    def ended(self) -> bool:
        """Whether it has; its number stays its own until `bury`."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def bury(self) -> int:
        """Ends what an ended worker has left running; returns its exit code, or minus the number of a signal.

        Its data loaders would hold copies of its connections, by which the others know that it lives.
        """
        self.kill()
        self._reaper.forget(self.process.pid)
        code = self.process.wait()
        for reader in self._readers:  # the last words, before what is said about them
            reader.join(timeout=1.0)  # a daemon that it has started, in a session of its own, may hold the pipe
        return code

    def terminate(self) -> None:
        """Asks the worker to end, and not its children: how they end is the worker's business while it lives."""
        os.kill(self.process.pid, signal.SIGTERM)  # subprocess's own would bury one that has just ended

    def kill(self) -> None:
        """Ends it and its children."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def how(code: int) -> str:
    """In words, what `Worker.bury` returned."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"


def pass_on(source: BinaryIO, target: int, prefix: Callable[[], bytes]) -> None:
    """Writes the lines of `source` to the descriptor `target`, each with its prefix, until `source` ends.

    A line ends with a newline or a carriage return, as progress bars have it. Lines of several sources are not mixed.
    """
    rest = b""
    while chunk := source.read(LONGEST):
        pieces = (rest + chunk).splitlines(keepends=True)
        rest = b"" if pieces[-1].endswith(b"\n") else pieces.pop()  # a \r at the end may be half of \r\n
        if len(rest) >= LONGEST:
            pieces.append(rest + b"\n")
            rest = b""
        _write(target, prefix(), pieces)
    if rest:
        _write(target, prefix(), [rest.rstrip(b"\r") + b"\n"])


def _write(target: int, prefix: bytes, pieces: list[bytes]) -> None:
    text = b"".join(piece if piece == b"\r" else prefix + piece for piece in pieces)
    with _one_at_a_time:
        try:
            while text:
                text = text[os.write(target, text) :]
        except OSError:  # nobody reads any more, as with `| head`: the workers are not to stop for that
            pass
