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
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

MTU = 9000
COMMAND_DEADLINE = 30.0  # seconds for one call of ip or tc; the slowest, deleting a namespace, takes 0.1


class LabError(RuntimeError):
    """The lab cannot be built here."""


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


def _run(*command: str, check: bool = True) -> str:
    try:
        done = subprocess.run(
            command, check=check, timeout=COMMAND_DEADLINE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        if not check:
            return ""
        raise LabError(f"{' '.join(command)}: {(error.output or str(error)).strip()}") from error
    return done.stdout


class Lab:
    """Rate-limited hosts on a bridge: a context manager. Host h is the namespace `namespace(h)`, at `address(h)`.

    Args:
        hosts, rate: how many, and the bits per second of each direction of each link.
        rate_of: other rates for some hosts.
        burst: bytes of the token bucket; default 2 ms at line rate, at least 16 KiB.
        queue_ms: depth of each port's queue.
        delay_ms: one-way delay, where the kernel has sch_netem.
        congestion: TCP's congestion control. A namespace inherits the machine's default. Under bbr one-peer exchanges
            lost 10 to 15 % of line rate, for each pair of hosts is used in bursts; under reno they took 1.03 times
            what their bytes take.
    """

    def __init__(
        self,
        hosts: int,
        rate: float,
        *,
        rate_of: Mapping[int, float] | None = None,
        burst: int | None = None,
        queue_ms: float = 50.0,
        delay_ms: float = 0.0,
        congestion: str = "reno",
    ):
        unknown = sorted(h for h in rate_of or {} if not 0 <= h < hosts)
        if unknown:
            raise LabError(f"a rate for host {unknown[0]}, but the hosts are 0 to {hosts - 1}")
        self.tag = f"nl{os.getpid()}"
        self.switch = f"{self.tag}sw"
        self.rates = [(rate_of or {}).get(h, rate) for h in range(hosts)]
        self.burst, self.queue_ms, self.delay_ms, self.congestion = burst, queue_ms, delay_ms, congestion
        self._made: list[str] = []

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()
        while self._made:
            _run("ip", "netns", "del", self._made.pop(), check=False)

    def kill_all(self) -> None:
        """Kills what runs on the hosts. A launcher's workers have sessions of their own: only this finds them all."""
        for name in self._made:
            for pid in _run("ip", "netns", "pids", name, check=False).split():
                if pid.isdigit():
                    _kill(os.kill, int(pid))

    def namespace(self, host: int) -> str:
        return f"{self.tag}h{host}"

    def address(self, host: int) -> str:
        return f"10.77.{host // 250}.{host % 250 + 1}"

    def set_link(self, host: int, state: str) -> None:
        """'down' pulls the host's cable (nobody hears of it), 'up' puts it back."""
        _run("ip", "-n", self.switch, "link", "set", f"p{host}", state)

    def _build(self) -> None:
        if os.geteuid() != 0:
            raise LabError("netlab makes network namespaces and so needs root: run it with sudo")
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise LabError(f"{' and '.join(missing)} not found: install iproute2")
        self._add_namespace(self.switch)
        bridge = ("type", "bridge", "stp_state", "0", "forward_delay", "0")
        _run("ip", "-n", self.switch, "link", "add", "br0", "mtu", str(MTU), *bridge)
        _run("ip", "-n", self.switch, "link", "set", "br0", "up")
        for host, rate in enumerate(self.rates):
            self._add_host(host, rate)

    def _add_namespace(self, name: str) -> None:
        self._made.append(name)  # before it is there: an interrupt may come at any time
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _add_host(self, host: int, rate: float) -> None:
        name, port = self.namespace(host), f"p{host}"
        self._add_namespace(name)
        inside = ("peer", "name", "eth0", "mtu", str(MTU), "netns", name)
        _run("ip", "-n", self.switch, "link", "add", port, "mtu", str(MTU), "type", "veth", *inside)
        _run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", name, "addr", "add", f"{self.address(host)}/16", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        # Refused (and an error here) unless it is in tcp_allowed_congestion_control.
        control = f"net.ipv4.tcp_congestion_control={self.congestion}"
        _run("ip", "netns", "exec", name, "sysctl", "-qw", control)
        burst = self.burst or max(16 << 10, int(rate / 8 * 0.002))
        limit = max(4 * burst, int(rate / 8 * self.queue_ms / 1000), 256 << 10)
        bucket = ("tbf", "rate", f"{int(rate)}bit", "burst", str(burst), "limit", str(limit))
        for where, device in ((name, "eth0"), (self.switch, port)):
            _run("tc", "-n", where, "qdisc", "add", "dev", device, "root", "handle", "1:", *bucket)
        if self.delay_ms:
            # At the bridge's port: there the sender's small-queue limit no longer counts the packet.
            delay = ("netem", "delay", f"{self.delay_ms}ms", "limit", "100000")
            _run("tc", "-n", self.switch, "qdisc", "add", "dev", port, "parent", "1:1", *delay)


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
                _kill(os.killpg, process.pid)
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


def inject_fault(lab: Lab, ranks: Ranks, options: argparse.Namespace, over: threading.Event) -> None:
    """Kills a rank or cuts a link when its time has come; returns early once `over` is set."""
    while options.after_line and not ranks.marked.wait(0.05):
        if over.is_set():
            return
    if over.wait(options.after):
        return
    if options.kill_rank is not None:
        say(f"t={time.time():.3f} kill -9 rank {options.kill_rank}")
        _kill(os.killpg, ranks.processes[options.kill_rank].pid)
    if options.cut_rank is not None:
        host = options.cut_rank // options.ranks_per_host
        say(f"t={time.time():.3f} link of host {host} down")
        lab.set_link(host, "down")
        if options.restore_after is not None and not over.wait(options.restore_after):
            say(f"t={time.time():.3f} link of host {host} up")
            lab.set_link(host, "up")


def _kill(how: Callable[[int, int], None], pid: int) -> None:
    try:
        how(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def say(text: str) -> None:
    print(f"[lab] {text}", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hosts", type=int, default=4)
    add("--ranks-per-host", type=int, default=1)
    add("--rate", type=bits, default=bits("200mbit"), help="of each direction of each link (default 200mbit)")
    add("--rate-of", type=host_rate, action="append", default=[], metavar="HOST=RATE", help="a straggler's link")
    add("--burst", type=int, metavar="BYTES", help="of the token bucket (default: 2 ms at line rate, >= 16 KiB)")
    add("--queue-ms", type=float, default=50.0, help="depth of each port's queue")
    add("--delay", type=float, default=0.0, metavar="MS", help="one-way delay (needs sch_netem)")
    add("--cc", default="reno", help="TCP congestion control, one of tcp_allowed_congestion_control")
    add("--kill-rank", type=int, metavar="R", help="SIGKILL rank R ...")
    add("--cut-rank", type=int, metavar="R", help="pull the cable of rank R's host ...")
    add("--after", type=float, default=0.0, metavar="S", help="... S seconds after the start")
    add("--after-line", metavar="TEXT", help="... or after a rank first prints a line with TEXT")
    add("--for", dest="restore_after", type=float, metavar="S", help="and put the cable back after S seconds")
    add("--timeout", type=float, default=600.0, help="seconds after which everything is killed (exit status 124)")
    add("--master-port", type=int, default=29500)
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command: netlab.py [options] -- COMMAND ...")
    world = options.hosts * options.ranks_per_host
    for name in ("kill_rank", "cut_rank"):
        if (getattr(options, name) or 0) >= world:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: the ranks are 0 to {world - 1}")
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
        with Lab(
            options.hosts, options.rate, rate_of=dict(options.rate_of), burst=options.burst,
            queue_ms=options.queue_ms, delay_ms=options.delay, congestion=options.cc,
        ) as lab:  # fmt: skip
            ranks = Ranks(lab, command, options.ranks_per_host, options.master_port, options.after_line)
            try:
                ranks.start()
                if options.kill_rank is not None or options.cut_rank is not None:
                    threading.Thread(target=inject_fault, args=(lab, ranks, options, over), daemon=True).start()
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
