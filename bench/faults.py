#!/usr/bin/env python3
"""Faults on eight hosts with links of 200 Mbit/s: kill -9 of any rank, two at once, one in a recovery, a cut link.

    sudo python bench/faults.py                      all cases, a line of JSON each
    sudo python bench/faults.py "kill 0" "cut 2"     some of them

Hosts are network namespaces (netlab_hosts.py); the store has a host of its own, as a launcher's node that does not
train would be. After each case the same training runs undisturbed with the survivors' data alone, twice, from other
initial values: the accuracy of the workers' mean is to be within their noise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from netlab_hosts import Lab, LabError, kill, run

HERE = Path(__file__).parent
PORT = 29400
KEEPER = (
    "import sys, time, torch.distributed as d;"
    "s = d.TCPStore(sys.argv[1], int(sys.argv[2]), None, True, wait_for_workers=False); print('UP', flush=True);"
    "time.sleep(3600)"
)
# name: what happens, as (kind, rank, after which line of it); None: once anybody recovers
CASES = {
    "nothing": [],
    "kill 3": [("kill", 3, "STEP50")],
    "kill 0": [("kill", 0, "STEP50")],
    "kill 2 and 5": [("kill", 2, "STEP50"), ("kill", 5, "STEP50")],
    "kill 4, and 6 in the recovery": [("kill", 4, "STEP50"), ("kill", 6, None)],
    "cut 2": [("cut", 2, "STEP50")],
}


class Workers:
    """Processes on the lab's hosts, and what they print."""

    def __init__(self, lab: Lab, parts: list[int], timeout: float, seed: int = 0):
        self.lab, self.parts, self.timeout, self.seed = lab, parts, timeout, seed
        self.processes: list[subprocess.Popen] = []
        self.lines: dict[int, list[str]] = {}
        self.struck: dict[int, float] = {}
        self.ends: dict[int, dict] = {}
        self.errors: dict[int, list[str]] = {}

    def start(self, total: int) -> None:
        run("ip", "-n", self.lab.switch, "addr", "add", "10.77.200.1/16", "dev", "br0", check=False)
        inside = ["ip", "netns", "exec", self.lab.switch]
        self.keeper = subprocess.Popen(
            [*inside, sys.executable, "-c", KEEPER, "10.77.200.1", str(PORT)], stdout=subprocess.PIPE, text=True
        )
        assert self.keeper.stdout is not None
        self.keeper.stdout.readline()
        for rank, part in enumerate(self.parts):
            own = {
                "RANK": rank, "WORLD_SIZE": len(self.parts), "MASTER_ADDR": "10.77.200.1", "MASTER_PORT": PORT,
                "TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1,
                "DATA": part, "PARTS": total, "TIMEOUT": self.timeout, "SEED": self.seed, "PYTHONUNBUFFERED": 1,
            }  # fmt: skip
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.lab.namespace(rank), sys.executable, str(HERE / "faults_worker.py")],
                env={**os.environ, **{k: str(v) for k, v in own.items()}}, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            self.processes.append(process)
            self.lines[rank], self.errors[rank] = [], []
            threading.Thread(target=self._read, args=(rank, process.stdout, self.lines[rank]), daemon=True).start()
            threading.Thread(target=self._read, args=(rank, process.stderr, self.errors[rank]), daemon=True).start()

    def _read(self, rank: int, source, lines: list[str]) -> None:
        for line in source:
            lines.append(line.rstrip())
            if line.startswith("END "):
                self.ends[rank] = json.loads(line[4:])

    def follow(self, faults: list[tuple], deadline: float) -> None:
        """Until all that are not struck have ended."""
        waiting, end = list(faults), time.monotonic() + deadline
        gone = {rank for _, rank, _ in faults}
        while time.monotonic() < end:
            for fault in list(waiting):
                kind, rank, mark = fault
                if mark is None:
                    due = self.struck and any("RECOVERS" in lines for r, lines in self.lines.items() if r != rank)
                else:
                    due = mark in self.lines[rank]
                if due:
                    waiting.remove(fault)
                    self.struck[rank] = time.time()
                    if kind == "kill":
                        kill(os.killpg, self.processes[rank].pid)
                    else:
                        run("ip", "-n", self.lab.switch, "link", "set", f"p{rank}", "down")
            if all(p.poll() is not None for r, p in enumerate(self.processes) if r not in gone):
                return
            time.sleep(0.002)
        raise SystemExit(f"not done after {deadline:g} s: {[p.poll() for p in self.processes]}, {self.errors}")

    def stop(self) -> None:
        self.lab.kill_all()
        self.keeper.kill()
        for process in (*self.processes, self.keeper):
            process.wait(30)


def case(name: str, options: argparse.Namespace) -> dict:
    faults = CASES[name]
    gone = {rank for _, rank, _ in faults}
    left = [rank for rank in range(options.hosts) if rank not in gone]
    timeout = options.cut_timeout if any(kind == "cut" for kind, *_ in faults) else options.timeout
    disturbed = once(list(range(options.hosts)), faults, timeout, options)
    ends = {rank: disturbed.ends.get(rank) for rank in left}
    missing = [rank for rank, end in ends.items() if end is None]
    if missing:
        raise SystemExit(f"{name}: ranks {missing} did not end: {[disturbed.errors[rank][-3:] for rank in missing]}")
    members = {tuple(end["members"]) for end in ends.values()}
    out: dict = {"case": name, "members": sorted(members), "test": mean(end["test"] for end in ends.values())}
    downs = [
        min(later) - hit
        for hit in disturbed.struck.values()
        for end in ends.values()
        if (later := [t for t in end["ends"] if t > hit])
    ]
    if downs:
        out["until all go on, s"] = round(max(downs), 2)
        events = [event for end in ends.values() for event in end["events"]]
        out["CPU per recovery, s"] = round(max(event["cpu"] for event in events), 3)
    out["good"] = members == {tuple(left)}
    if faults and not options.no_reference:
        tests = [mean(e["test"] for e in once(left, [], timeout, options, s).ends.values()) for s in (1, 2)]
        out["undisturbed, survivors' data"] = [round(test, 4) for test in tests]
    return out


def once(parts: list[int], faults: list[tuple], timeout: float, options: argparse.Namespace, seed: int = 0) -> Workers:
    with Lab(len(parts), options.rate) as lab:
        workers = Workers(lab, parts, timeout, seed)
        try:
            workers.start(options.hosts)
            workers.follow(faults, options.deadline)
            time.sleep(0.2)  # the readers' last lines
        finally:
            workers.stop()
    return workers


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="*", help=f"of {', '.join(CASES)}")
    add("--hosts", type=int, default=8)
    add("--rate", type=float, default=2e8, help="bits per second")
    add("--timeout", type=float, default=60.0)
    add("--cut-timeout", type=float, default=10.0)
    add("--deadline", type=float, default=300.0)
    add("--no-reference", action="store_true", help="without the undisturbed runs")
    options = parser.parse_args(argv)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    good = True
    try:
        for name in options.cases or CASES:
            out = case(name, options)
            good &= out["good"]
            print(re.sub(r"(\d\.\d{4})\d+", r"\1", json.dumps(out)), flush=True)
    except LabError as error:
        print(f"faults.py: {error}", file=sys.stderr)
        return 125
    return not good


if __name__ == "__main__":
    sys.exit(main())
