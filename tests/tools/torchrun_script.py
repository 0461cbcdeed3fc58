"""What test_torchrun.py has torchrun start: `torchrun_script.py FOLDER agents|restarts`."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

FOLDER = Path(sys.argv[1])
PAGE = Path(__file__).resolve().parents[2] / "fused_dlam" / "tools" / "README.md"
RANK, RESTART = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
STEPS, SAVED_EVERY, KILLED_AT = 30, 10, 25


def tell(name, **content):
    part = FOLDER / f"{name}.part{os.getpid()}"
    part.write_text(json.dumps({"pid": os.getpid(), "parent": os.getppid(), "rank": RANK, **content}))
    part.rename(FOLDER / name)


def agents():
    """Each worker waits for the test; the store must answer then."""
    dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    tell(f"rank{RANK}", total=x.item())
    end = time.monotonic() + 240
    while not (FOLDER / "go").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    tell(f"done{RANK}", calls=store.add("calls", 1))


def restarts():
    """The page's lines, and a training that saves itself. Rank 1 is killed, the first time."""
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)), {})
    from fused_dlam import GossipSGD, load_checkpoint, save_checkpoint

    torch.manual_seed(RANK)
    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    optimizer = GossipSGD(model.parameters(), lr=0.01, timeout=60)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    if (FOLDER / "last").exists():
        load_checkpoint(FOLDER / "last", model, optimizer, scheduler=scheduler)
    first = scheduler.last_epoch
    for step in range(first, STEPS):
        if (RANK, RESTART, step) == (1, 0, KILLED_AT):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % SAVED_EVERY == 0:
            save_checkpoint(FOLDER / "last", model, optimizer, scheduler=scheduler)
    tell(f"end{RANK}", first=first, last=scheduler.last_epoch, restart=RESTART)
    dist.destroy_process_group()


if __name__ == "__main__":
    {"agents": agents, "restarts": restarts}[sys.argv[2]]()
