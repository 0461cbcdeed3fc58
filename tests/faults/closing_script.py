"""A script of its own: four workers that close and finish optimizers, all together or one alone, and lose one.

python closing_script.py FOLDER: leaves what each worker came to in FOLDER/<number>.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch._dynamo  # noqa: F401 -- else each worker imports it with its first optimizer
import torch.distributed as dist
from forks import fork, launched, start_store

import fused_dlam
from fused_dlam.comm import interruptible, process_group

N, STEPS, AT = 4, 8, 3
TIMEOUT = 600.0  # seconds: longer than the test lasts, so nobody may wait for it


class Worker:
    def __init__(self, folder, me):
        self.folder, self.me, self.x = folder, me, torch.nn.Parameter(torch.full((5,), float(me)))

    def train(self, at=lambda optimizer: False):
        """With an optimizer of its own: the members at the end. at: what to do at step AT; whether to go on no more."""
        optimizer = fused_dlam.GossipSGD([self.x], lr=0.1, on_failure="continue", timeout=TIMEOUT)
        sent = 0, 0
        while optimizer.steps_done < STEPS:
            if optimizer.steps_done == AT and at(optimizer):
                return None
            optimizer.zero_grad()
            self.x.square().sum().backward()
            optimizer.step()
            assert (optimizer.bytes_sent, optimizer.messages_sent) >= sent and optimizer.bytes_sent > 0
            sent = optimizer.bytes_sent, optimizer.messages_sent
        members = optimizer.members
        optimizer.close()
        optimizer.close()
        return members

    def run(self):
        dist.init_process_group("gloo")
        refused(ValueError, "min_workers is 5, and the world size is 4", on_failure="continue", min_workers=5)
        other = fused_dlam.GossipSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        collected = fused_dlam.Gossip(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
        refused(RuntimeError, "cannot have one of both kinds", on_failure="continue")
        other.close()
        del collected
        told = [self.train()]
        if self.me == 1:
            self.builds_slowly()
        told.append(self.train(self.dies))
        told.append(self.train(self.closes))
        if self.me < 2:
            self.finishes()
        (self.folder / f"{self.me}.json").write_text(json.dumps(told))
        while self.me == 2:  # its process lives on
            time.sleep(1.0)

    def builds_slowly(self):
        """Longer than workers wait for groups to be formed once they know of a dead one."""
        named = process_group._named

        def slow(*arguments, **options):
            process_group._named = named
            time.sleep(interruptible.LOOK + interruptible.GRACE + 0.4)
            return named(*arguments, **options)

        process_group._named = slow

    def finishes(self):
        """Twice with one that comes late, which says so before, and once with one that is stopped."""
        optimizer = fused_dlam.GossipSGD([self.x], lr=0.1, on_failure="continue", timeout=TIMEOUT)
        refused(RuntimeError, "cannot have one of both kinds", on_failure="raise")
        for late in (self.folder / "late once", self.folder / "late twice"):
            if self.me == 1:
                time.sleep(0.3)
                late.touch()
            optimizer.finish()
            assert late.exists()
        if self.me == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        optimizer._recovery.membership.timeout = 0.5
        optimizer.finish()
        optimizer.close()

    def dies(self, optimizer):
        if self.me == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def closes(self, optimizer):
        if self.me == 2:
            optimizer.close()
        return self.me == 2


def refused(kind, words, **options):
    try:
        fused_dlam.GossipSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, **options)
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"{options} is not refused")


def main(folder):
    keeper, port = start_store()
    pids = {}
    for me in range(N):
        launched(me, N, port)
        pids[me] = fork(Worker(folder, me).run, out=str(folder / f"{me}.log"))
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) or not os.WIFSTOPPED(
            os.waitpid(pids[1], os.WUNTRACED)[1]
        )
    finally:
        for me in (1, 2):
            os.kill(pids[me], signal.SIGKILL)
        os.kill(keeper, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    sys.exit(main(Path(sys.argv[1])))
