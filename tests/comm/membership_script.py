"""A script of its own: workers that only agree on who is left, each a fork of it, over a store in a process of its own.

python membership_script.py: prints a line of JSON for each scenario: {"name": ..., "told": {worker: what it came to}}.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
from forks import HOST, fork, start_store

from fused_dlam.comm.membership import Membership
from fused_dlam.comm.register import Arrival

TIMEOUT = 20.0  # seconds; nothing here waits for it but what is to
DEADLINE = 90.0


class Deadly:
    """A store that kills its process before an operation: there are as many `left`."""

    def __init__(self, store):
        self.store, self.left, self.done = store, None, []

    def __getattr__(self, name):
        operation = getattr(self.store, name)

        def watched(*arguments):
            if self.left == len(self.done):
                os.kill(os.getpid(), signal.SIGKILL)
            self.done.append(name)
            return operation(*arguments)

        return watched


class Worker:
    """What a scenario's function gets."""

    def __init__(self, port, folder, number, n):
        self.port, self.folder, self.number, self.n, self.told = port, folder, number, n, {}

    def store(self):
        return dist.PrefixStore("members", dist.TCPStore(HOST, self.port, None, False))

    def member(self, timeout=TIMEOUT, machines=()):
        self.deadly = Deadly(self.store())
        self.membership = Membership(self.deadly, (HOST, self.port), self.number, self.n, timeout, machines)
        self.membership.meet()
        return self.membership

    def newcomer(self, timeout=TIMEOUT):
        self.deadly = Deadly(self.store())
        self.membership = Membership.newcomer(self.deadly, (HOST, self.port), timeout)
        return self.membership

    def arrival(self, step=0, **more):
        m = self.membership
        return Arrival(m.me, m.beacon.address, step, 0, **more)

    def agree(self, step=0, **more):
        self.tell(self.membership.agree(self.arrival(step, **more)))

    def tell(self, view):
        self.told.setdefault("views", []).append([view.generation, view.members, view.new, view.step])

    def say(self, what):
        (self.folder / what).touch()

    def hear(self, *whats):
        end = time.monotonic() + DEADLINE
        while not all((self.folder / what).exists() for what in whats):
            assert time.monotonic() < end, whats
            time.sleep(0.005)

    def everybody(self, what):
        """Returns when all have come here."""
        self.say(f"{what}{self.number}")
        self.hear(*(f"{what}{i}" for i in range(self.n)))

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


def act(function, arguments, named, worker):
    start = time.monotonic()
    try:
        function(worker, *arguments, **named)
        worker.told["outcome"] = "end"
    except Exception as error:
        worker.told |= {"outcome": type(error).__name__, "text": str(error)}
    worker.told["seconds"] = time.monotonic() - start
    file = worker.folder / f"{worker.number}.json"
    file.with_suffix(".part").write_text(json.dumps(worker.told))
    file.with_suffix(".part").rename(file)  # whole, when it is seen
    worker.hear("over")  # its beacon answers until then


class Scenario:
    """Workers, the store, and what this process does to them."""

    def __init__(self, folder):
        self.folder, self.pids, self.dead = Path(folder), {}, set()
        self.keeper, self.port = start_store()

    def start(self, number, n, function, *arguments, **named):
        worker = Worker(self.port, self.folder, number, n)
        self.pids[number] = fork(act, function, arguments, named, worker, out=str(self.folder / f"{number}.log"))

    def told(self, without=()):
        """What all came to who can; None for one that was killed."""
        end, told = time.monotonic() + DEADLINE, {}
        while len(told) < len(self.pids) - len(without) and time.monotonic() < end:
            for number, pid in self.pids.items():
                file = self.folder / f"{number}.json"
                if number in told or number in without:
                    continue
                if number not in self.dead and os.waitpid(pid, os.WNOHANG)[0]:
                    self.dead.add(number)
                if file.exists():
                    told[number] = json.loads(file.read_text())
                elif number in self.dead:
                    told[number] = None
            time.sleep(0.005)
        for number in set(self.pids) - set(told) - set(without):
            told[number] = {"outcome": "hangs"}
        return told

    def wait_for(self, number):
        """Until a worker has died."""
        os.waitpid(self.pids[number], 0)
        self.dead.add(number)

    def hear(self, *whats):
        Worker(0, self.folder, -1, 0).hear(*whats)

    def strike(self, number, how):
        os.kill(self.pids[number], how)

    def end(self):
        (self.folder / "over").touch()
        for number, pid in self.pids.items():
            if number not in self.dead:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        if self.keeper:
            self.kill_store()

    def kill_store(self):
        os.kill(self.keeper, signal.SIGKILL)
        os.waitpid(self.keeper, 0)
        self.keeper = None


def main(scenarios):
    for name, (function, *arguments) in scenarios.items():
        with tempfile.TemporaryDirectory(prefix="membership-") as folder:
            scenario = Scenario(folder)
            try:
                told = function(scenario, *arguments)
            finally:
                scenario.end()
        print(json.dumps({"name": name, "told": told}), flush=True)


if __name__ == "__main__":
    from membership_scenarios import SCENARIOS

    main({name: SCENARIOS[name] for name in sys.argv[1:] or SCENARIOS})
