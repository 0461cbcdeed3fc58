"""`fused-dlam run`: starts the workers of this machine, and leaves the others alone when one of them dies."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

from .cli import Parser, count
from .keeper import LaunchError, Launchers, reach, serve
from .reaper import Reaper
from .worker_process import Worker, how

WHAT_FOR = """\
Starts N workers of a training script on this machine, as torchrun does, with two differences that an optimizer with
on_failure="continue" needs: a worker that dies takes no other with it, and the store through which workers find each
other lives in this launcher (on node 0), not in a worker. Scripts call init_process_group("gloo") as under torchrun.
"""
MORE = """\
output       Each line is passed on behind its worker's number: its rank at the start, and for a newcomer the next one
             that was free. One that ends with an error is reported; the others go on.
exit status  0 if a worker of this machine ended with 0 and no other ended with an error of its own. One that was killed
             by a signal, or was started again by --restart, or ended because the others had gone on without it (it was
             stopped, say), does not count as long as another one ended with 0. Else the exit code of the first worker
             that failed (128 + the signal's number if signals ended all). 2 for wrong usage, 130 after Ctrl-C, 143
             after SIGTERM.
signals      Ctrl-C and SIGTERM: all workers get SIGTERM, and SIGKILL after --grace seconds or at a second Ctrl-C. If
             this launcher is killed, its workers are killed too.
network      One port is listened on: with one node on 127.0.0.1 alone, with several on --rdzv's port of node 0, by all
             its interfaces. Who reaches it can disturb the run; what is started stands on the command line alone.
"""
POLL = 0.05  # seconds
AFTER_KILL = 10.0  # seconds that the system may take to end a killed process


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code of the section "exit status" above."""
    arguments = _parsed(argv)
    try:
        return Node(arguments).run()
    except LaunchError as error:
        say(f"error: {error}")
        return 1


def say(text: str) -> None:
    """One line, in one write: workers write there too."""
    try:
        os.write(2, f"fused-dlam run: {text}\n".encode())
    except OSError:  # nobody reads any more
        pass


def exit_status(ends: list[tuple[int, bool]]) -> int:
    """Of (exit code or minus a signal's number, whether it is spare), each rank's last process, as they ended.

    Spare: a newcomer, or one without which the others had gone on.
    """
    wrong = [code for code, spare in ends if code > 0 and not spare]
    if wrong:
        return wrong[0]
    if any(code == 0 for code, _ in ends):
        return 0
    first = ends[0][0]
    return first if first > 0 else 128 - first


# -- one machine -------------------------------------------------------------------------------------------------------


class Node:
    """The workers of this machine."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a = arguments
        self.world = arguments.nnodes * arguments.n
        self.signals: list[int] = []
        self.running: list[Worker] = []
        self.ends: dict[int, tuple[int, bool]] = {}  # by rank, in their order
        self.restarts: dict[int, int] = {}  # by rank
        self.over = False  # whether nobody is left who could let a newcomer in

    def run(self) -> int:
        """Returns the exit code. Raises LaunchError if the run cannot start."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # children of a process that ignores it cannot be waited for
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, _: self.signals.append(number))
        if self.a.node_rank == 0:
            store = serve(self.a.rdzv[1] if self.a.rdzv else None)
            host, port = self.a.rdzv or ("127.0.0.1", store.port)
        else:
            host, port = self.a.rdzv
            reached = reach(host, port, self.a.wait, self._stopped)
            if reached is None:
                return 128 + self.signals[0]
            store = reached
        self.launchers = Launchers(store, self.a.node_rank, self.a.nnodes)
        self.launchers.greet(self.a.n)
        self.env = self._environment(host, port)
        self.reaper = Reaper()
        try:
            try:
                for local in range(self.a.n):
                    self._start(self.a.node_rank * self.a.n + local)
            except OSError as error:
                raise LaunchError(f"a worker cannot be started: {error}") from error
            self._watch()
            if self.signals:
                self._stop()
        finally:  # whatever went wrong here, no worker stays
            for worker in self.running:
                worker.kill()
            self.reaper.close()
        self._part()
        return 128 + self.signals[0] if self.signals else exit_status(list(self.ends.values()))

    def _environment(self, host: str, port: int) -> dict[str, str]:
        """What all workers of this machine have in common."""
        env = dict(os.environ)
        env.pop("FUSED_DLAM_NEWCOMER", None)
        if self.a.n > 1:
            env.setdefault("OMP_NUM_THREADS", "1")
        return {
            **env,
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.a.n),
            "GROUP_RANK": str(self.a.node_rank),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # init_process_group: rank 0 does not serve the store
            "TORCHELASTIC_RESTART_COUNT": "0",
            "FUSED_DLAM_STORE": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        }

    def _start(self, rank: int, former: Worker | None = None) -> None:
        """A worker of this machine. A newcomer begins in a world of its own, and is let in through the store."""
        local, name = rank - self.a.node_rank * self.a.n, f"{rank}.{self.restarts.get(rank, 0)}"
        env = {**self.env, "RANK": str(rank), "LOCAL_RANK": str(local), "FUSED_DLAM_PROCESS": name}
        if former is not None:
            del env["TORCHELASTIC_USE_AGENT_STORE"]
            env.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", FUSED_DLAM_NEWCOMER="1")
        how_run = ["-m"] if self.a.m else []
        command = [sys.executable, "-u", *how_run, self.a.script, *self.a.args]
        self.running.append(Worker(rank, former, command, env, self.reaper))

    def _stopped(self) -> bool:
        return bool(self.signals)

    def _watch(self) -> None:
        """Until all workers have ended, or a signal has come."""
        lost = False
        while self.running and not self.signals and not self.over:
            time.sleep(POLL)
            self._learn()
            dead = [worker for worker in self._ended() if self.ends[worker.rank][0] != 0]
            if any(code == 0 for code, _ in self.ends.values()):
                self.launchers.say_ending()
            for worker in dead:
                self._report(worker)
            if self.launchers.lost and not lost:
                lost = True
                say("node 0's launcher is gone, and the store with it: the workers here cannot survive another loss")
        if self.over:
            say("the run is over: all workers were lost, nobody can let a newcomer in. Restart from a checkpoint")

    def _learn(self) -> None:
        """The numbers of workers that were let in."""
        numbers = self.launchers.numbers()
        for worker in self.running:
            number = numbers.get(worker.name, worker.number)
            if number != worker.number:
                say(f"worker {number} has come, in the place of worker {worker.renumber(number)}")

    def _report(self, worker: Worker) -> None:
        """Says how it died and, if it may be, starts it again. The others are left alone."""
        rank, made, left = worker.rank, self.restarts.get(worker.rank, 0), len(self.running)
        words = f"{worker} {how(self.ends[rank][0])} after {time.monotonic() - worker.started:.1f} s"
        self.over = self.over or self._is_over()
        if made < self.a.restart and not self.over and not self.launchers.ending() and not self.signals:
            self.restarts[rank] = made + 1
            try:
                self._start(rank, worker)
                words += f"; a newcomer is started in its place ({made + 1} of {self.a.restart})"
            except OSError as error:
                words += f"; no newcomer can be started: {error}"
        elif left and not self.over:
            words += f"; {left} of {self.a.n} workers here go on"
        say(words)

    def _is_over(self) -> bool:
        """Whether all who train are dead, on all machines, so that no newcomer can be let in."""
        if not self.a.restart or self.launchers.ending() or any(not worker.newcomer for worker in self.running):
            return False
        trains = self.launchers.somebody_trains() if self.running or self.a.nnodes > 1 else False
        return self.a.nnodes == 1 if trains is None else not trains

    def _ended(self) -> list[Worker]:
        """Those that have ended since it was last asked. They are no longer running."""
        ended = [worker for worker in self.running if worker.ended()]
        for worker in ended:
            self.running.remove(worker)
            self.ends.pop(worker.rank, None)
            code = worker.bury()
            self.ends[worker.rank] = code, worker.newcomer or (code > 0 and self.launchers.was_left(worker.name))
        return ended

    def _stop(self) -> None:
        """Ends all workers: by SIGTERM, and after the grace time by SIGKILL."""
        say(f"{signal.Signals(self.signals[0]).name}: {len(self.running)} workers are asked to end")
        for worker in self.running:
            worker.terminate()
        self._wait(self.a.grace, patient=True)
        for worker in self.running:
            say(f"{worker} is killed: it has not ended")
            worker.kill()
        self._wait(AFTER_KILL, patient=False)
        for worker in self.running:
            say(f"{worker}, process {worker.process.pid}, cannot be killed")

    def _wait(self, seconds: float, patient: bool) -> None:
        """For running workers to end. The patient ones leave at a second signal."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end and not (patient and len(self.signals) > 1):
            self._ended()
            time.sleep(POLL)

    def _part(self) -> None:
        """From the other nodes."""
        if self.a.node_rank > 0:
            self.launchers.leave()
        elif not self.signals:
            self.launchers.wait_for_others(self._stopped, say)


# -- the command line --------------------------------------------------------------------------------------------------


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "fused-dlam run", usage="fused-dlam run -n N [options] [-m] SCRIPT [its arguments]", description=WHAT_FOR,
        epilog=MORE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("-n", type=count, required=True, metavar="N", help="workers on this machine, on each the same")
    parser.add_argument("--restart", type=_from_zero, default=0, metavar="K", help="how often a rank that dies is "
                        "started again, as a newcomer that asks to be let in (0)")  # fmt: skip
    parser.add_argument("--grace", type=_seconds, default=10.0, metavar="S", help="seconds between SIGTERM and SIGKILL "
                        "when the run is stopped (10)")  # fmt: skip
    parser.add_argument("--nnodes", type=count, default=1, metavar="M", help="machines, each with a launcher (1)")
    parser.add_argument("--node-rank", type=_from_zero, metavar="R", help="which one this is, from 0 on")
    parser.add_argument("--rdzv", type=_address, metavar="HOST:PORT", help="where node 0 is reached; of use with "
                        "several nodes only")  # fmt: skip
    parser.add_argument("--wait", type=_seconds, default=600.0, metavar="S", help="seconds that other nodes wait for "
                        "node 0 (600)")  # fmt: skip
    parser.add_argument("-m", action="store_true", help="SCRIPT is a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file")
    parser.add_argument("args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.nnodes == 1:
        a.rdzv = None  # a free port cannot be taken
        a.node_rank = a.node_rank or 0
    elif a.rdzv is None or a.node_rank is None:
        parser.error(f"--nnodes {a.nnodes} needs --node-rank, a number of its own on each node, and --rdzv HOST:PORT")
    if a.node_rank >= a.nnodes:
        parser.error(f"--node-rank must be below --nnodes {a.nnodes}, not {a.node_rank}")
    if a.m:
        sys.path.insert(0, os.getcwd())  # as python -m does
        if importlib.util.find_spec(a.script.partition(".")[0]) is None:
            parser.error(f"there is no module {a.script}")
    elif not Path(a.script).is_file():
        parser.error(f"there is no file {a.script}")
    return a


def _from_zero(text: str) -> int:
    """An argument that is a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on is needed, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    """An argument that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds is needed, not {text!r}")
    return value


def _address(text: str) -> tuple[str, int]:
    """An argument HOST:PORT, as a pair; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise argparse.ArgumentTypeError(f"HOST:PORT is needed, with a port from 1 to 65535, not {text!r}")
    return host, int(port)
