#!/usr/bin/env python3
"""Runs a distributed program on n rate-limited hosts that are network namespaces on one Linux machine.

    sudo python bench/netlab.py --hosts 8 --rate 200mbit -- python train.py
    sudo python bench/netlab.py --hosts 4 --ranks-per-host 4 -- python train.py      # 16 ranks, 4 network cards
    sudo python bench/netlab.py --hosts 4 --kill-rank 2 --after-line "step 10" -- python train.py

Each host has one veth to a bridge; the bridge has a namespace of its own, so nothing of the machine's own network is
touched and no packet leaves the lab. Both ends of each link are shaped with a token bucket (tbf). The command runs
once per rank with the variables that torch.distributed's env:// reads, and its output is prefixed with the rank.

Exit status: the first failing rank's (128 + signal), 124 after --timeout, 125 if the lab could not be built, 130 if
interrupted; a rank that --kill-rank ended does not count. Whatever happens, the lab is taken down.

Needs root, iproute2, and a kernel with netns, veth, bridge and sch_tbf. The hosts share the machine's cores: trust
only ratios between times of one run.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from netlab_hosts import COMMAND_DEADLINE, Lab, LabError, kill


def bits(text: str) -> float:
    """Bits per second: '200mbit' -> 2e8."""
    match = re.fullmatch(r"(\d+\.?\d*)([kmg]?)(bit)?", text.strip().lower())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"not a rate: {text!r} (say 200mbit)")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def host_rate(text: str) -> tuple[int, float]:
    """'3=50mbit' -> (3, 5e7)."""
    host, equals, rate = text.partition("=")
    if not equals or not host.isdigit():
        raise argparse.ArgumentTypeError(f"not HOST=RATE: {text!r} (say 3=50mbit)")
    return int(host), bits(rate)


class Ranks:
    """The command's processes in the lab, one per rank, and their output."""

    def __init__(self, lab: Lab, command: Sequence[str], per_host: int = 1, port: int = 29500, mark: str | None = None):
        self.lab, self.command, self.per_host, self.port, self.mark = lab, command, per_host, port, mark
        self.marked = threading.Event()  # a rank has printed a line that contains `mark`
        self.processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        self._printing = threading.Lock()

    def start(self) -> None:
        for rank in range(len(self.lab.rates) * self.per_host):
            host = rank // self.per_host
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.lab.namespace(host), *self.command],
                env=self._environment(rank, host), stdin=subprocess.DEVNULL, text=True, errors="replace",
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
            for source, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=self._copy, args=(rank, source, out), daemon=True)
                self._readers.append(reader)
                reader.start()

    def wait(self, timeout: float, lost: int | None = None) -> int:
        """The exit status, `lost` left out. Raises subprocess.TimeoutExpired."""
        code, end = 0, time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            returned = process.wait(max(0.1, end - time.monotonic()))
            if returned and rank != lost:
                say(f"rank {rank} exited with {returned}")
                code = code or (returned if returned > 0 else 128 - returned)
        return code

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                kill(os.killpg, process.pid)
        self.lab.kill_all()
        for process in self.processes:
            process.wait(COMMAND_DEADLINE)
        for reader in self._readers:
            reader.join(2)

    def _environment(self, rank: int, host: int) -> dict[str, str]:
        address, local = self.lab.address, rank % self.per_host
        own = {
            "RANK": rank, "WORLD_SIZE": len(self.lab.rates) * self.per_host,
            "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": self.per_host,
            "MASTER_ADDR": address(0), "MASTER_PORT": self.port, "GLOO_SOCKET_IFNAME": "eth0",
            "NETLAB_ADDR": address(host), "NETLAB_RATE": int(min(self.lab.rates)), "PYTHONUNBUFFERED": 1,
        }  # fmt: skip
        return {"OMP_NUM_THREADS": "1", **os.environ, **{key: str(value) for key, value in own.items()}}

    def _copy(self, rank: int, source: TextIO, out: TextIO) -> None:
        for line in source:
            with self._printing:
                out.write(f"[{rank}] {line}")
                out.flush()
            if self.mark and self.mark in line:
                self.marked.set()


def kill_on_cue(ranks: Ranks, options: argparse.Namespace, over: threading.Event) -> None:
    """Kills a rank when its time has come; returns early once `over` is set."""
    while options.after_line and not ranks.marked.wait(0.05):
        if over.is_set():
            return
    if not over.wait(options.after):
        say(f"t={time.time():.3f} kill -9 rank {options.kill_rank}")
        kill(os.killpg, ranks.processes[options.kill_rank].pid)


def say(text: str) -> None:
    print(f"[lab] {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hosts", type=int, default=4)
    add("--ranks-per-host", type=int, default=1)
    add("--rate", type=bits, default=bits("200mbit"), help="of each direction of each link (default 200mbit)")
    add("--rate-of", type=host_rate, action="append", default=[], metavar="HOST=RATE", help="a straggler's link")
    add("--cc", default="reno", help="TCP congestion control, one of tcp_allowed_congestion_control")
    add("--kill-rank", type=int, metavar="R", help="SIGKILL rank R ...")
    add("--after", type=float, default=0.0, metavar="S", help="... S seconds after the start")
    add("--after-line", metavar="TEXT", help="... or after a rank first prints a line with TEXT")
    add("--timeout", type=float, default=600.0, help="seconds after which everything is killed (exit status 124)")
    add("--master-port", type=int, default=29500)
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command: netlab.py [options] -- COMMAND ...")
    world = options.hosts * options.ranks_per_host
    if (options.kill_rank or 0) >= world:
        parser.error(f"--kill-rank {options.kill_rank}: the ranks are 0 to {world - 1}")
    return options, command


def main(argv: Sequence[str] | None = None) -> int:
    options, command = parse(argv)
    over = threading.Event()

    def interrupt(*_: object) -> None:
        if not over.is_set():  # nothing interrupts the teardown
            over.set()
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        with Lab(options.hosts, options.rate, dict(options.rate_of), options.cc) as lab:
            ranks = Ranks(lab, command, options.ranks_per_host, options.master_port, options.after_line)
            try:
                ranks.start()
                if options.kill_rank is not None:
                    threading.Thread(target=kill_on_cue, args=(ranks, options, over), daemon=True).start()
                return ranks.wait(options.timeout, lost=options.kill_rank)
            finally:
                over.set()
                ranks.stop()
    except subprocess.TimeoutExpired:
        say(f"not done after {options.timeout:g} s")
        return 124
    except LabError as error:
        say(str(error))
        return 125
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
