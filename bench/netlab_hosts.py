"""The hosts of bench/netlab.py: network namespaces on a bridge, each with a rate-limited link."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping

MTU = 9000
BURST, QUEUE = 0.002, 0.05  # seconds at line rate: the token bucket's bytes, and the depth of each port's queue
COMMAND_DEADLINE = 30.0  # seconds for one call of ip or tc; the slowest, deleting a namespace, takes 0.1


class LabError(RuntimeError):
    """The lab cannot be built here."""


def kill(how: Callable[[int, int], None], pid: int) -> None:
    try:
        how(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run(*command: str, check: bool = True) -> str:
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
        congestion: TCP's congestion control. A namespace inherits the machine's default. Under bbr one-peer exchanges
            lost 10 to 15 % of line rate, for each pair of hosts is used in bursts; under reno they took 1.03 times
            what their bytes take.
    """

    def __init__(self, hosts: int, rate: float, rate_of: Mapping[int, float] | None = None, congestion: str = "reno"):
        unknown = sorted(h for h in rate_of or {} if not 0 <= h < hosts)
        if unknown:
            raise LabError(f"a rate for host {unknown[0]}, but the hosts are 0 to {hosts - 1}")
        self.tag = f"nl{os.getpid()}"
        self.switch = f"{self.tag}sw"
        self.rates = [(rate_of or {}).get(h, rate) for h in range(hosts)]
        self.congestion = congestion
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
            run("ip", "netns", "del", self._made.pop(), check=False)

    def kill_all(self) -> None:
        """Kills what runs on the hosts. A launcher's workers have sessions of their own: only this finds them all."""
        for name in self._made:
            for pid in run("ip", "netns", "pids", name, check=False).split():
                if pid.isdigit():
                    kill(os.kill, int(pid))

    def namespace(self, host: int) -> str:
        return f"{self.tag}h{host}"

    def address(self, host: int) -> str:
        return f"10.77.{host // 250}.{host % 250 + 1}"

    def _build(self) -> None:
        if os.geteuid() != 0:
            raise LabError("netlab makes network namespaces and so needs root: run it with sudo")
        missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
        if missing:
            raise LabError(f"{' and '.join(missing)} not found: install iproute2")
        self._add_namespace(self.switch)
        bridge = ("type", "bridge", "stp_state", "0", "forward_delay", "0")
        run("ip", "-n", self.switch, "link", "add", "br0", "mtu", str(MTU), *bridge)
        run("ip", "-n", self.switch, "link", "set", "br0", "up")
        for host, rate in enumerate(self.rates):
            self._add_host(host, rate)

    def _add_namespace(self, name: str) -> None:
        self._made.append(name)  # before it is there: an interrupt may come at any time
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def _add_host(self, host: int, rate: float) -> None:
        name, port = self.namespace(host), f"p{host}"
        self._add_namespace(name)
        inside = ("peer", "name", "eth0", "mtu", str(MTU), "netns", name)
        run("ip", "-n", self.switch, "link", "add", port, "mtu", str(MTU), "type", "veth", *inside)
        run("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", name, "addr", "add", f"{self.address(host)}/16", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")
        # Refused, and an error here, unless it is in tcp_allowed_congestion_control.
        run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={self.congestion}")
        burst = max(16 << 10, int(rate / 8 * BURST))
        limit = max(4 * burst, int(rate / 8 * QUEUE), 256 << 10)
        bucket = ("tbf", "rate", f"{int(rate)}bit", "burst", str(burst), "limit", str(limit))
        for where, device in ((name, "eth0"), (self.switch, port)):
            run("tc", "-n", where, "qdisc", "add", "dev", device, "root", "handle", "1:", *bucket)
