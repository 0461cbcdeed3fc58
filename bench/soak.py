#!/usr/bin/env python3
"""Random faults against on_failure="continue": kills, stops, cuts, delays, joins, at any moment, recoveries included.

    python bench/soak.py --seeds 0:200             a line for each schedule, and what became of it
    python bench/soak.py --seeds 7 --modes kill    one of them
    sudo python bench/soak.py --lab                each worker on a host of its own, whose link may be cut too

Workers are forks of this process, so that a schedule takes seconds; the store has a process of its own, as a launcher
gives it. With --lab hosts are network namespaces with links of 200 Mbit/s (netlab_hosts.py). Held after each schedule:
nobody hangs; no survivor fails; all agree on who is left, and that is who was not killed; each survivor took one local
step in every step(); parameters are finite and together; the centered buffers have mean zero; the loss has fallen; a
newcomer's call before its first step is refused. Exit status 1 if one schedule is bad.

Times: from a kill until the last worker goes on. A machine that does other work makes them longer.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch._dynamo  # noqa: F401 -- else each worker imports it with its first optimizer
from netlab_hosts import Lab
from netlab_hosts import run as ip
from soak_processes import HOST, fork, fork_quietly, free_port, keep_store, on_host
from soak_schedule import MODES, Schedule, draw, lost
from soak_worker import KINDS, run

from fused_dlam.optim import checkpoint  # noqa: F401

RATE = 2e8  # bits per second of each link of the lab


class Run:
    """One schedule: workers, the faults as they come due, and what was found."""

    def __init__(self, schedule: Schedule, options: argparse.Namespace, lab: Lab | None = None):
        self.schedule, self.options, self.lab = schedule, options, lab
        self.folder = Path(tempfile.mkdtemp(prefix=f"soak{schedule.seed}-", dir=options.folder))
        self.cells = memoryview(mmap.mmap(-1, 8 * 128)).cast("q")
        self.pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.struck: dict[int, float] = {}  # when a worker was killed or stopped
        self.continued: list[tuple[float, int]] = []  # when one that is delayed goes on
        self.newcomer: int | None = None

    def start(self, number: int, newcomer: bool = False) -> None:
        o, per_machine = self.options, 2 if self.schedule.optimizer == "hierarchical" else 1
        host = None if self.lab is None else self.lab.namespace(number)
        self.pids[number] = fork(
            on_host, host, run, number, o.n, self.store, per_machine, newcomer, self.schedule.optimizer, o.steps,
            o.timeout, o.pause, self.cells, self.folder, out=self.folder / f"{number}.log",
        )  # fmt: skip

    def go(self) -> dict:
        address, port, host = HOST, free_port(), None
        if self.lab is not None:
            address, host = "10.77.200.1", self.lab.switch
            ip("ip", "-n", host, "addr", "add", f"{address}/16", "dev", "br0")
        self.store = f"{address}:{port}"
        keeper = fork(on_host, host, keep_store, address, port)
        time.sleep(0.2)
        start = time.time()
        for number in range(self.options.n):
            self.start(number)
        try:
            while time.time() < start + self.options.deadline:
                self.reap()
                self.strike()
                gone = lost(self.schedule, self.options.n, set(self.struck))
                expected = set(self.pids) - gone
                if expected <= set(self.codes) and not (self.schedule.joins and self.newcomer is None and self.struck):
                    break
                time.sleep(0.001)
        finally:
            gone = lost(self.schedule, self.options.n, set(self.struck))
            hung = [i for i in self.pids if i not in self.codes and i not in gone]
            for number in [i for i in self.pids if i not in self.codes]:
                os.kill(self.pids[number], signal.SIGKILL)
                os.waitpid(self.pids[number], 0)
            os.kill(keeper, signal.SIGKILL)
            os.waitpid(keeper, 0)
        return self.report(hung, gone, time.time() - start)

    def reap(self) -> None:
        for number, pid in self.pids.items():
            if number not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[number] = os.waitstatus_to_exitcode(status)

    def strike(self) -> None:
        now = time.time()
        for when, pid in [c for c in self.continued if c[0] <= now]:
            os.kill(pid, signal.SIGCONT)
            self.continued.remove((when, pid))
        for fault in [f for f in self.schedule.faults if f.due is None or f.due > 0]:
            if fault.due is None:
                if fault.step is None:
                    due = any(self.cells[64 + i] for i in range(self.options.n) if i != fault.worker)
                else:
                    due = self.cells[fault.worker] >= fault.step
                if due:
                    fault.due = now + fault.after
            if fault.due is not None and fault.due <= now:
                fault.due = -1.0
                if fault.worker in self.codes:
                    continue
                pid = self.pids[fault.worker]
                if fault.kind == "cut":
                    assert self.lab is not None
                    ip("ip", "-n", self.lab.switch, "link", "set", f"p{fault.worker}", "down")
                else:
                    os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
                if fault.kind == "delay":
                    self.continued.append((now + 0.3 * self.options.timeout, pid))
                else:
                    self.struck[fault.worker] = now
        if self.schedule.joins and self.struck and self.newcomer is None and now > max(self.struck.values()) + 0.5:
            self.newcomer = self.options.n
            self.start(self.newcomer, newcomer=True)

    def report(self, hung: list[int], gone: set[int], wall: float) -> dict:
        bad = [f"worker {i} hangs" for i in hung]
        failed = {i: code for i, code in self.codes.items() if code and i not in gone}
        if self.newcomer in failed and "RunEnded" in (self.folder / f"{self.newcomer}.log").read_text():
            failed.pop(self.newcomer)  # it asked when the others were through
        bad += [f"worker {i} ends with {code}" for i, code in failed.items()]
        found = {i: self.folder / f"{i}.json" for i in self.pids if i not in gone}
        ends = {i: json.loads(path.read_text()) for i, path in found.items() if path.exists()}
        out = {"seed": self.schedule.seed, "wall": wall}
        if ends:
            bad += list(self.wrong(ends))
            events = [event for end in ends.values() for event in end["events"]]
            down = [
                min(times) - hit  # until this worker went on
                for hit in self.struck.values()
                for end in ends.values()
                if (times := [t for t in end["times"] if t > hit])
            ]
            if down:
                out["down"] = max(down)
            if events:
                out["recovery"] = max(event["seconds"] for event in events)
                out["cpu"] = max(event["cpu"] for event in events)
            out["test"] = statistics.mean(end["test"] for end in ends.values())
        else:
            bad.append("nobody came to the end")
        return {**out, "bad": bad, "folder": str(self.folder)}

    def wrong(self, ends: dict[int, dict]):
        steps, members = self.options.steps, {tuple(end["members"]) for end in ends.values()}
        if len(members) > 1:
            yield f"they do not agree on who is left: {members}"
        numbers = {end["number"] for end in ends.values()}
        if not numbers <= set(next(iter(members))):
            yield f"{numbers} came to the end, and {members} count"
        for i, end in ends.items():
            if i == self.newcomer and "before its first step" not in end["early"]:
                yield f"the newcomer's call before its first step was not refused: {end['early']!r}"
            if end["done"] != steps or end["calls"] != steps - end["began"]:
                yield f"worker {i} took {end['calls']} steps from {end['began']} on, to {end['done']}"
            falls = 0.9 if self.schedule.optimizer == "slowmo" else 0.7
            if not end["after"] < falls * end["before"] and end["began"] == 0:
                yield f"worker {i}'s loss went from {end['before']:.3g} to {end['after']:.3g}"
        tensors = [torch.load(self.folder / f"{i}.pt") for i in ends]
        x, p = (torch.stack([t[name] for t in tensors]).double() for name in ("x", "p"))
        if not torch.isfinite(x).all():
            yield "a parameter is not finite"
        apart = ((x - x.mean(0)).norm(dim=1).max() / x.mean(0).norm()).item()
        if apart > (0.1 if self.schedule.optimizer == "slowmo" else 0.05):  # undisturbed 0.03 to 0.05
            yield f"{apart:.3g} apart"
        scale = p.norm(dim=1).mean()
        if scale > 0 and p.mean(0).norm() / scale > 1e-3:
            yield f"the centered buffers' mean is {p.mean(0).norm() / scale:.3g} of them"


def one(seed: int, options: argparse.Namespace) -> dict:
    modes = options.modes.split(",") if options.modes else [*MODES, *(["cut"] if options.lab else [])]
    modes, kinds = tuple(modes), tuple(options.optimizers.split(","))
    schedule = draw(seed, options.n, options.steps, modes, kinds)
    waits = any(fault.kind != "kill" for fault in schedule.faults)
    options = argparse.Namespace(**{**vars(options), "timeout": options.timeout or (6.0 if waits else 30.0)})
    with Lab(options.n + 1, RATE) if options.lab else nullcontext() as lab:
        report = Run(schedule, options, lab).go()
    what = f"{schedule.optimizer}: {'; '.join(map(str, schedule.faults))}{'; join' if schedule.joins else ''}"
    figures = " ".join(f"{k}={report[k]:.3g}" for k in ("down", "recovery", "cpu", "test", "wall") if k in report)
    print(f"{'BAD' if report['bad'] else 'ok '} seed {seed} [{what}] {figures}", flush=True)
    for line in report["bad"]:
        print(f"    {line}   {report['folder']}", flush=True)
    if not report["bad"] and not options.keep:
        shutil.rmtree(report["folder"])
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", default="0:20", help="one, or FIRST:END")
    add("--modes", help=f"default: {','.join(MODES)}; with --lab cut as well")
    add("--lab", action="store_true", help="each worker on a host of its own; needs root")
    add("--optimizers", default=",".join(KINDS))
    add("-n", type=int, default=8)
    add("--steps", type=int, default=60)
    add("--pause", type=float, default=0.01, help="seconds of computing per step")
    add("--timeout", type=float, help="default 30, and 6 where a worker is stopped, cut off or delayed")
    add("--deadline", type=float, default=180.0, help="seconds after which a schedule hangs")
    add("--folder", default=tempfile.gettempdir())
    add("--keep", action="store_true", help="the logs of good schedules too")
    options = parser.parse_args(argv)
    if "cut" in (options.modes or "").split(",") and not options.lab:
        parser.error("links are cut with --lab alone")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    first, _, end = options.seeds.partition(":")
    reports = []
    for seed in range(int(first), int(end or int(first) + 1)):
        read, write = os.pipe()
        pid = fork_quietly(one_into, write, seed, options)  # there are no threads here, and none may be when it forks
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        reports.append(json.loads(text) if text else {"seed": seed, "bad": ["the schedule itself failed"]})
    bad = [report["seed"] for report in reports if report["bad"]]
    for name in ("down", "recovery", "cpu"):
        values = [report[name] for report in reports if name in report]
        if values:
            print(f"{name}: median {statistics.median(values):.3g} s, largest {max(values):.3g} s, of {len(values)}")
    print(f"{len(reports)} schedules, {len(bad)} bad{': seeds ' + ', '.join(map(str, bad)) if bad else ''}")
    return bool(bad)


def one_into(pipe: int, seed: int, options: argparse.Namespace) -> None:
    os.write(pipe, json.dumps(one(seed, options)).encode())


if __name__ == "__main__":
    sys.exit(main())
