"""What test_run.py has `fused-dlam run` start: `run_script.py FOLDER WHAT ...`. It tells, and is told, by files there.

torch is imported where a process group is needed alone: most of a start would be that.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER, WHAT = Path(sys.argv[1]), sys.argv[2]
ENV = {name: value for name, value in os.environ.items() if name.isupper()}
NEWCOMER = "FUSED_DLAM_NEWCOMER" in ENV
ME = int(ENV["GROUP_RANK"]) * int(ENV["LOCAL_WORLD_SIZE"]) + int(ENV["LOCAL_RANK"])


def tell(name, **content):
    """A file FOLDER/name that is there only when it is complete."""
    part = FOLDER / f"{name}.part{os.getpid()}"
    part.write_text(json.dumps({"pid": os.getpid(), "env": ENV, "args": sys.argv[3:], **content}))
    part.rename(FOLDER / name)


def wait_for(name):
    end = time.monotonic() + 120
    while not (FOLDER / name).exists():
        if time.monotonic() > end:
            sys.exit(99)
        time.sleep(0.02)


def child():
    """A process that a worker has started, as a data loader is: its number."""
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]).pid


def total():
    """The sum of 1 + rank over the process group of the environment."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    x = torch.ones(1) + dist.get_rank()
    dist.all_reduce(x)
    dist.barrier()
    dist.destroy_process_group()
    return x.item()


def calls():
    """How many have asked the store for this: it can be reached."""
    import torch.distributed as dist

    host, _, port = ENV["FUSED_DLAM_STORE"].rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False).add("calls", 1)


def members():
    """The store in which workers agree on who is in."""
    import torch.distributed as dist

    host, _, port = ENV["FUSED_DLAM_STORE"].rpartition(":")
    return dist.PrefixStore("fused_dlam/members/0", dist.TCPStore(host, int(port), is_master=False))


def sums():
    print("a whole line\nand a ", end="")
    print(f"part of {ME}", file=sys.stderr)
    tell(f"rank{ME}", total=total())


def fails():
    tell(f"rank{ME}", child=child())
    if ME == 1:
        wait_for("fail")
        sys.exit(3)
    wait_for("go")


def killed():
    if NEWCOMER and not (FOLDER / "newcomer").exists():
        tell("newcomer", total=total(), calls=calls())
        wait_for("let in")
        members().append("came", f"{ENV['FUSED_DLAM_PROCESS']} 3\n")
        wait_for("speak")
        print("is let in", flush=True)
    elif NEWCOMER:
        tell("second")
    else:
        tell(f"rank{ME}")
    wait_for(f"go{ME}")


def stopped():
    """Rank 0 ends properly when it is asked to, rank 1 never does."""

    def saves(*_):
        tell("saved")
        sys.exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if ME else saves)
    tell(f"rank{ME}", child=child())
    wait_for("never")


def nodes():
    """Rank 1 has more to do, and needs the store in the end."""
    result = total()
    if ME == 1:
        wait_for("go")
    tell(f"rank{ME}", total=result, calls=calls())


if __name__ == "__main__":
    {"sums": sums, "fails": fails, "killed": killed, "stopped": stopped, "nodes": nodes}[WHAT]()
