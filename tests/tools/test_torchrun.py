"""Promises of fused_dlam/tools/README.md about torchrun: how survivors live on, and how all restart."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("torchrun_script.py")
DEADLINE = 240  # seconds: for a machine that stands still


def torchrun(folder, what, *options):
    log = (folder / f"{what}{len(list(folder.iterdir()))}.log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, SCRIPT, folder, what],
        stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def logs(folder):
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))


def wait(condition, folder):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.05)


def listens(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_with_one_agent_per_worker_survivors_live_on(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--nnodes", "3", "--nproc-per-node", "1", "--max-restarts", "0", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7")  # fmt: skip
    agents = [torchrun(tmp_path, "agents", *options)]
    try:
        wait(lambda: listens(port), tmp_path)  # the first one has the store
        agents += [torchrun(tmp_path, "agents", *options) for _ in range(2)]
        names = [tmp_path / f"rank{rank}" for rank in range(3)]
        wait(lambda: all(name.exists() for name in names), tmp_path)
        told = [json.loads(name.read_text()) for name in names]
        assert all(t["total"] == 3 for t in told)
        victim = next(t for t in told if t["parent"] == agents[1].pid)
        os.kill(victim["pid"], signal.SIGKILL)
        assert agents[1].wait(DEADLINE) != 0
        assert agents[0].poll() is None and agents[2].poll() is None
        (tmp_path / "go").touch()
        done = [tmp_path / f"done{t['rank']}" for t in told if t is not victim]
        wait(lambda: all(path.exists() for path in done), tmp_path)
        assert sorted(json.loads(path.read_text())["calls"] for path in done) == [1, 2]
    finally:  # those of the survivors wait for the third one's agent
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(DEADLINE)


def test_all_restart_from_a_checkpoint(tmp_path):
    run = torchrun(tmp_path, "restarts", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    try:
        assert run.wait(DEADLINE) == 0, logs(tmp_path)
    finally:
        run.terminate()
    for rank in range(2):
        told = json.loads((tmp_path / f"end{rank}").read_text())
        assert (told["restart"], told["first"], told["last"]) == (1, 20, 30)
