"""Ends the workers that a killed launcher leaves behind. Run as a script: it needs nothing but the standard library.

`python reaper.py` reads lines `+pid` and `-pid` on its standard input. That ends when nobody is left who could write
there, which is when the launcher has gone, however it went. The process groups that are left then are killed.
`python reaper.py FD command ...` writes `+pid` of itself to FD and becomes the command: a worker that makes itself
known before it is one is known at every moment. A signal at the parent's death would not reach a worker's children.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


class Reaper:
    """The reaper's process, as the launcher sees it."""

    def __init__(self) -> None:
        listens, self.pipe = os.pipe()
        # A session of its own, and deaf: what ends the launcher does not end it too.
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__], stdin=listens, stdout=subprocess.DEVNULL, start_new_session=True
        )
        os.close(listens)

    def makes_known(self, command: list[str]) -> list[str]:
        """The command of a process that is known here before it becomes `command`; it needs the pipe passed to it."""
        return [sys.executable, "-I", "-S", __file__, str(self.pipe), *command]

    def forget(self, pid: int) -> None:
        """Before the process is waited for: after that its number may be another's."""
        try:
            os.write(self.pipe, b"-%d\n" % pid)
        except BrokenPipeError:  # somebody has killed the reaper: then workers may be left, and nothing else is lost
            pass

    def close(self) -> None:
        os.close(self.pipe)
        self.process.wait()


def _reap() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _become(pipe: int, command: list[str]) -> None:
    os.write(pipe, b"+%d\n" % os.getpid())
    os.close(pipe)
    os.execv(command[0], command)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _become(int(sys.argv[1]), sys.argv[2:])
    else:
        _reap()
