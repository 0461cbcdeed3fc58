"""A script of its own: processes with mailboxes that end in every way; prints how, as JSON lines.

python mailbox_script.py FOLDER SCENARIOS...: every process is a fork of this one, which has imported everything, and
leaves through the end of the interpreter. A scenario's line: {"name", "codes": by rank, "told": {rank: what it says}}.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.utils.data

from fused_dlam import Mailbox

N, VICTIM, DEADLINE = 4, 1, 60.0


class Rank:
    """One rank's push-sum, at a pace of its own."""

    def __init__(self, rank, folder, timeout, numbers):
        self.rank, self.folder, self.p, self.k = rank, folder, 1.0, 0
        self.x = torch.randn(numbers, dtype=torch.float64)
        self.box = Mailbox(self.x, "one-peer-exponential", timeout=timeout)
        self.longest = 0.0  # of a step, without its pause

    def step(self):
        time.sleep(0.004)
        start = time.monotonic()
        dx, dp = self.box.collect()
        self.x, self.p = self.x + dx, self.p + dp
        if self.box.push(self.x, self.p, step=self.k):
            self.x, self.p = self.x / 2, self.p / 2
        self.k += 1
        self.longest = max(self.longest, time.monotonic() - start)

    def run(self, steps):
        for _ in range(steps):
            self.step()

    def until_lost(self):
        """Seconds from the victim's last word to its loss here."""
        end = time.monotonic() + DEADLINE
        while VICTIM not in self.box.lost and time.monotonic() < end:
            self.step()
        now = time.monotonic()
        assert VICTIM in self.box.lost, self.box.lost
        with open(f"{self.folder}/last") as file:
            return now - float(file.read())

    def last_word(self):
        with open(f"{self.folder}/soon", "w") as file:
            file.write(str(time.monotonic()))
        os.rename(f"{self.folder}/soon", f"{self.folder}/last")

    def after_a_loss(self):
        out = {"noticed": self.until_lost(), "longest": self.longest}
        self.run(20)
        with self.box.drained():
            pass
        self.box.close()
        return out


def exits(me):
    """All end without close, one after the other."""
    me.run(30 + 30 * me.rank)


def raises(me):
    me.run(30)
    if me.rank == VICTIM:
        me.last_word()
        raise ValueError("of its own")
    return {"noticed": me.until_lost()}


def destroys(me):
    """The script destroys all process groups before, as many do."""
    me.run(30)
    dist.barrier()
    dist.destroy_process_group()
    me.run(30)


def leaves(me):
    """By os._exit."""
    me.run(30)
    if me.rank == VICTIM:
        me.last_word()
        os._exit(3)
    return me.after_a_loss()


def killed(me):
    me.run(30)
    if me.rank == VICTIM:
        me.last_word()
        os.kill(os.getpid(), signal.SIGKILL)
    return me.after_a_loss()


def killed_on_the_way(me):
    """While it sends a long message, and receives one."""
    if me.rank == VICTIM:
        threading.Timer(0.3, lambda: (me.last_word(), os.kill(os.getpid(), signal.SIGKILL))).start()
        while True:
            me.step()
    return me.after_a_loss()


def killed_with_loaders(me):
    """Forked data loaders have copies of its connections, and live on for a while."""
    loader = iter(torch.utils.data.DataLoader(range(1000), num_workers=2))
    next(loader)
    return killed(me)


def stopped(me):
    """The victim is continued when all others have ended, and finds itself alone."""
    me.run(30)
    if me.rank == VICTIM:
        me.last_word()
        os.kill(os.getpid(), signal.SIGSTOP)
        end = time.monotonic() + DEADLINE
        while len(me.box.lost) < N - 1 and time.monotonic() < end:
            me.step()
        me.box.close()
        return {"lost": sorted(me.box.lost)}
    return me.after_a_loss()


def stopped_at_the_end(me):
    """All others end, without close, while the victim is stopped."""
    me.run(30)
    if me.rank == VICTIM:
        os.kill(os.getpid(), signal.SIGSTOP)


SCENARIOS = {f.__name__: f for f in
             (exits, raises, destroys, leaves, killed, killed_on_the_way,
              killed_with_loaders, stopped, stopped_at_the_end)}  # fmt: skip
TIMEOUTS, NUMBERS = {"stopped": 2.0}, {"killed_on_the_way": 4 << 20}


def work(rank, name, folder):
    store = dist.FileStore(f"{folder}/store", N)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=N, timeout=timedelta(seconds=DEADLINE))
    me = Rank(rank, folder, DEADLINE, NUMBERS.get(name, 1000))
    if name in TIMEOUTS:  # not while it is built, on a busy machine
        me.box._post.timeout = TIMEOUTS[name]
    told = SCENARIOS[name](me)
    with open(f"{folder}/told{rank}", "w") as file:
        json.dump(told, file)
    return me if rank % 2 else None  # some have let go of their mailbox before the interpreter ends


def main(folder, names):
    torch.set_num_threads(1)
    gc.freeze()
    for number, name in enumerate(names):
        here = f"{folder}/{number}"
        os.makedirs(here)
        children = []
        for rank in range(N):
            child = os.fork()
            if child == 0:
                try:
                    global kept
                    kept = work(rank, name, here)
                except Exception:
                    traceback.print_exc()
                    sys.exit(1)
                sys.exit(0)
            children.append(child)
        codes, end = {}, time.monotonic() + 2 * DEADLINE
        while len(codes) < N and time.monotonic() < end:
            for rank, child in enumerate(children):
                done, status = os.waitpid(child, os.WNOHANG) if rank not in codes else (0, 0)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
            if len(codes) == N - 1 and name.startswith("stopped"):
                os.kill(children[VICTIM], signal.SIGCONT)
            time.sleep(0.01)
        for rank, child in enumerate(children):
            if rank not in codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[rank] = "hung"
        told = {}
        for rank in range(N):
            if os.path.exists(f"{here}/told{rank}"):
                with open(f"{here}/told{rank}") as file:
                    told[rank] = json.load(file)
        print(json.dumps({"name": name, "codes": [codes[rank] for rank in range(N)], "told": told}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
