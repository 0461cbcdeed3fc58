"""Promises of `fused-dlam run`:

- it starts what torchrun starts: env:// finds the store, which no worker serves; lines carry ranks;
- a worker that dies is reported and takes nobody with it but its own children; a newcomer starts in a world of its own;
- however it ends, by itself, by Ctrl-C or by SIGKILL, nothing that it has started is left;
- node 0 stays for the others; who does not come or goes is named;
- wrong usage is one line.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fused_dlam.comm.register import KEYS, LEFT
from fused_dlam.tools.cli import main
from fused_dlam.tools.keeper import LaunchError, Launchers, reach, serve
from fused_dlam.tools.run import exit_status
from fused_dlam.tools.worker_process import how, pass_on

SCRIPT = Path(__file__).with_name("run_script.py")
DEADLINE = 120  # seconds: for a machine that stands still, not for the code


class Launcher:
    """A running launcher; `folder` is what its script tells and is told by."""

    def __init__(self, folder, what, *options, script=(SCRIPT,), args=()):
        self.folder, self.out = folder, folder / f"out{len(list(folder.iterdir()))}"
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fused_dlam", "run", *map(str, options), *script, folder, what, *args],
                cwd=SCRIPT.parent, stdout=out, stderr=subprocess.PIPE, text=True, env=env,
            )  # fmt: skip
        self.late = threading.Timer(DEADLINE, self.process.kill)
        self.late.start()
        self.err = ""

    def until(self, text):
        """Reads what it says until a line has `text` in it: that line."""
        for line in self.process.stderr:
            self.err += line
            if text in line:
                return line
        raise AssertionError(f"no {text!r} in:\n{self.err}")

    def end(self):
        """Its exit code."""
        self.err += self.process.stderr.read()
        code = self.process.wait()
        self.late.cancel()
        return code

    def told(self, name):
        """What the script has told, when it has."""
        wait(lambda: (self.folder / name).exists() or self.process.poll() is not None)
        return json.loads((self.folder / name).read_text())

    def tell(self, *names):
        for name in names:
            (self.folder / name).touch()


@pytest.fixture
def launcher(tmp_path):
    started = []

    def start(*args, **kwargs):
        started.append(Launcher(tmp_path, *args, **kwargs))
        return started[-1]

    yield start
    for one in started:
        one.late.cancel()
        one.process.terminate()
        one.process.communicate()


def wait(condition):
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- one machine -------------------------------------------------------------------------------------------------------


def test_three_workers_find_each_other(launcher):
    args = ("-n", "9", "--help", "--", "nosuch.py:rule")  # the script's own
    run = launcher("sums", "-n", 3, args=args)
    assert run.end() == 0, run.err
    for rank in range(3):
        told = run.told(f"rank{rank}")
        assert told["total"] == 6.0 and told["args"] == list(args)
        env = told["env"]
        assert (env["RANK"], env["LOCAL_RANK"], env["GROUP_RANK"]) == (str(rank), str(rank), "0")
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "3" and env["OMP_NUM_THREADS"] == "1"
        assert env["FUSED_DLAM_STORE"] == f"127.0.0.1:{env['MASTER_PORT']}" and env["MASTER_ADDR"] == "127.0.0.1"
        assert env["TORCHELASTIC_RESTART_COUNT"] == "0" and "FUSED_DLAM_NEWCOMER" not in env
    lines = run.out.read_text().splitlines()
    assert sorted(lines) == sorted(f"[{r}] {text}" for r in range(3) for text in ("a whole line", "and a "))
    assert sorted(run.err.splitlines()) == [f"[{r}] part of {r}" for r in range(3)]


def test_a_worker_that_fails_takes_its_children_with_it_and_nobody_else(launcher):
    run = launcher("fails", "-n", 3, script=("-m", SCRIPT.stem))
    told = [run.told(f"rank{rank}") for rank in range(3)]
    run.tell("fail")
    line = run.until("worker 1")
    assert line.startswith("fused-dlam run: worker 1 ended with exit code 3 after ")
    assert line.endswith(" s; 2 of 3 workers here go on\n")
    assert [alive(t["pid"]) for t in told] == [True, False, True]
    wait(lambda: not alive(told[1]["child"]))
    assert alive(told[0]["child"]) and alive(told[2]["child"])
    run.tell("go")
    assert run.end() == 3 and "worker" not in run.err.replace(line, "")
    wait(lambda: not any(alive(t[key]) for t in told for key in ("pid", "child")))


def test_a_killed_worker_is_started_again_as_a_newcomer(launcher):
    """Twice, as told; and not when the run is ending."""
    run = launcher("killed", "-n", 3, "--restart", 2)
    pids = [run.told(f"rank{rank}")["pid"] for rank in range(3)]
    os.kill(pids[1], signal.SIGKILL)
    line = run.until("worker 1")
    assert "worker 1 was killed by SIGKILL after" in line and "a newcomer is started in its place (1 of 2)" in line
    newcomer = run.told("newcomer")
    assert newcomer["total"] == 1.0 and newcomer["calls"] == 1  # alone, and at the store
    env = newcomer["env"]
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("0", "1", "127.0.0.1", "0")
    assert env["LOCAL_RANK"] == "1" and "TORCHELASTIC_USE_AGENT_STORE" not in env
    run.tell("let in")
    assert run.until("worker 3").endswith("run: worker 3 has come, in the place of worker 1\n")
    run.tell("speak")
    wait(lambda: "[3] is let in\n" in run.out.read_text())
    os.kill(newcomer["pid"], signal.SIGTERM)
    assert "worker 3 was killed by SIGTERM" in (line := run.until("by SIGTERM")) and "(2 of 2)" in line
    os.kill(run.told("second")["pid"], signal.SIGKILL)
    line = run.until("newcomer for")
    assert "the newcomer for worker 3 was killed" in line and line.endswith("; 2 of 3 workers here go on\n")
    run.tell("go2")
    wait(lambda: not Path(f"/proc/{pids[2]}").exists())  # the launcher has seen it
    os.kill(pids[0], signal.SIGKILL)
    assert "newcomer" not in run.until("worker 0")
    assert run.end() == 0


def test_nobody_is_left_who_could_let_a_newcomer_in(launcher):
    """It does not wait in vain, and nobody else is started."""
    run = launcher("killed", "-n", 2, "--restart", 2)
    pids = [run.told(f"rank{rank}")["pid"] for rank in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    run.until("worker 1")
    newcomer = run.told("newcomer")["pid"]
    os.kill(pids[0], signal.SIGKILL)
    assert "newcomer" not in run.until("worker 0")
    assert run.end() == 128 + signal.SIGKILL
    assert "the run is over: all workers were lost" in run.err and "from a checkpoint" in run.err
    wait(lambda: not alive(newcomer))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_ends_the_launcher_ends_its_workers(number, code, launcher):
    run = launcher("stopped", "-n", 2, "--grace", 1)
    told = [run.told(f"rank{rank}") for rank in range(2)]
    run.process.send_signal(number)
    assert run.end() == code
    assert run.told("saved")["pid"] == told[0]["pid"]  # it had the time to
    assert f"{number.name}: 2 workers are asked to end" in run.err and "worker 1 is killed" in run.err
    assert "worker 0" not in run.err
    wait(lambda: not any(alive(t[key]) for t in told for key in ("pid", "child")))


def test_a_killed_launcher_leaves_nothing(launcher):
    run = launcher("stopped", "-n", 2)
    told = [run.told(f"rank{rank}") for rank in range(2)]
    reaper = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    assert len(reaper) == 3  # with the workers
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    wait(lambda: not any(alive(t[key]) for t in told for key in ("pid", "child")))
    wait(lambda: not any(map(alive, reaper)))


def test_exit_status():
    for ends, status in (
        ([(0, False), (0, False)], 0),
        ([(-9, False), (0, False)], 0),  # killed: the others have gone on without it
        ([(0, False), (3, False), (4, False)], 3),  # who failed first
        ([(-9, False), (1, False)], 1),
        ([(-9, False), (-15, False)], 137),  # nobody is left
        ([(0, False), (1, True)], 0),  # a newcomer that was not let in, or one that was left behind
        ([(-9, False), (1, True)], 137),
        ([(1, True)], 1),
    ):
        assert exit_status(ends) == status, ends
    assert how(3) == "ended with exit code 3" and how(-11) == "was killed by SIGSEGV" and how(-40).endswith("signal 40")


class Source:
    """A pipe that is read in these chunks."""

    def __init__(self, chunks):
        self.chunks = iter(chunks)

    def read(self, size):
        return next(self.chunks, b"")


@pytest.mark.parametrize(
    "chunks, out",
    [
        ([b"one\ntw", b"o\n\nend"], b"<one\n<two\n<\n<end\n"),
        ([b"\r 1%", b"\r 2%", b"\rdone\n"], b"\r< 1%\r< 2%\r<done\n"),  # a progress bar
        ([b"dos\r", b"\nend\r\n"], b"<dos\r\n<end\r\n"),
        ([b"x" * 65536, b"y" * 9, b"z\n"], b"<" + b"x" * 65536 + b"\n<yyyyyyyyyz\n"),
        ([], b""),
    ],
)
def test_lines_are_passed_on_behind_a_prefix(chunks, out, tmp_path):
    with (tmp_path / "out").open("wb") as target:
        pass_on(Source(chunks), target.fileno(), lambda: b"<")
    assert (tmp_path / "out").read_bytes() == out


def test_nobody_reads_any_more():
    listens, writes = os.pipe()
    os.close(listens)
    pass_on(Source([b"one\n", b"two\n"]), writes, bytes)
    os.close(writes)


# -- several machines --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_nodes(launcher):
    """The second one comes first, and works longer: it needs the store, which lives in the first one's launcher."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("-n", 1, "--nnodes", 2, "--rdzv", f"127.0.0.1:{port}", "--node-rank")
    second = launcher("nodes", *options, 1)
    first = launcher("nodes", *options, 0)
    assert "waiting for the workers of node 1" in first.until("waiting")
    env = first.told("rank0")["env"]
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("0", "0", "2", "1")
    first.tell("go")
    assert (second.end(), first.end()) == (0, 0), first.err + second.err
    told = second.told("rank1")
    env = told["env"]
    assert (
        told["total"] == 3.0
        and told["calls"] == 2
        and (env["RANK"], env["LOCAL_RANK"], env["GROUP_RANK"]) == ("1", "0", "1")
    )
    assert env["FUSED_DLAM_STORE"] == f"127.0.0.1:{port}"


def test_who_was_left_behind():
    server = serve(None)
    launchers = Launchers(server, 0, 1)
    dist.PrefixStore(f"{KEYS}0", server).set(f"{LEFT}2.0", "")
    assert launchers.was_left("2.0") and not launchers.was_left("2.1")


def never():
    return False


def test_launchers_that_were_told_unlike_things():
    server = serve(None)
    Launchers(server, 0, 3).greet(4)
    store = reach("127.0.0.1", server.port, 10, never)
    with pytest.raises(LaunchError, match="node 0 runs with --nnodes 3 -n 4, and this node with --nnodes 3 -n 5"):
        Launchers(store, 1, 3).greet(5)
    one = Launchers(store, 1, 3)
    one.greet(4)
    with pytest.raises(LaunchError, match="another launcher was started with --node-rank 1"):
        Launchers(store, 1, 3).greet(4)
    one.leave()


def test_node_0_waits_for_who_lives_and_names_who_does_not():
    """Of three others one is through, one does not come, and one gives its last sign of life."""
    server = serve(None)
    keeper = Launchers(server, 0, 4, silence=1.0, beat=0.1)
    keeper.greet(1)
    others = [Launchers(reach("127.0.0.1", server.port, 10, never), node, 4, beat=0.1) for node in (1, 2)]
    for other in others:
        other.greet(1)
    others[0].say_ending()
    wait(keeper.ending)
    wait(others[1].ending)
    others[0].leave()
    said = []

    def say(text):
        said.append(text)
        if "node 3" in text:  # node 2 lives, and falls silent only now
            others[1]._leaving, others[1]._store = True, Mute()
            others[1]._wake.set()

    keeper.wait_for_others(never, say)
    assert said == [
        "waiting for the workers of nodes 2, 3, which need the store here",
        "node 3 did not come for 1 s: it is not waited for any longer",
        "node 2 was silent for 1 s: it is not waited for any longer",
    ]
    assert not others[0].lost and others[1].lost


class Mute:
    """A store that is gone."""

    def __getattr__(self, name):
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_is_not_there():
    server = serve(None)
    with pytest.raises(LaunchError, match=f"cannot listen on port {server.port} of --rdzv: Address already in use"):
        serve(server.port)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(LaunchError, match=rf"no store at 127.0.0.1:{port} after 0.1 s .*refused.*same --rdzv"):
        reach("127.0.0.1", port, 0.1, never)
    assert reach("127.0.0.1", port, 60, lambda: True) is None  # interrupted


# -- wrong calls -------------------------------------------------------------------------------------------------------

WRONG = [
    ("", "the following arguments are required: -n, SCRIPT"),
    ("-n 2", "the following arguments are required: SCRIPT"),
    ("SCRIPT", "the following arguments are required: -n"),
    ("-n 0 SCRIPT", "-n: must be at least 1, not 0"),
    ("-n two SCRIPT", "-n: a whole number is needed, not 'two'"),
    ("-n 2 nosuch.py", "there is no file nosuch.py"),
    ("-n 2 -m nosuch.module", "there is no module nosuch.module"),
    ("-n 2 --nosuch SCRIPT", "unrecognized arguments: --nosuch"),
    ("-n 2 --restart -1 SCRIPT", "--restart"),
    ("-n 2 --grace soon SCRIPT", "--grace: a number of seconds is needed, not 'soon'"),
    ("-n 2 --nnodes 2 --node-rank 0 SCRIPT", "--nnodes 2 needs --node-rank, a number of its own on each node, and"),
    ("-n 2 --nnodes 2 --rdzv host:29500 SCRIPT", "--nnodes 2 needs --node-rank"),
    ("-n 2 --nnodes 2 --rdzv host:29500 --node-rank 2 SCRIPT", "--node-rank must be below --nnodes 2, not 2"),
    ("-n 2 --node-rank 1 SCRIPT", "--node-rank must be below --nnodes 1, not 1"),
    *(
        (
            f"-n 2 --nnodes 2 --node-rank 0 --rdzv {a} SCRIPT",
            f"HOST:PORT is needed, with a port from 1 to 65535, not '{a}'",
        )
        for a in ("host", "host:", ":29500", "host:0", "host:65536", "host:http", "::1:29500")
    ),
]


@pytest.mark.parametrize("line, message", WRONG)
def test_a_wrong_call_is_one_line_and_exit_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["run", *line.replace("SCRIPT", str(SCRIPT)).split()])
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert message in err and err.startswith("fused-dlam run: error: ") and err.count("\n") == 1


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    out = capsys.readouterr().out
    assert "usage: fused-dlam run -n N [options] [-m] SCRIPT [its arguments]" in out and "exit status" in out
    assert max(map(len, out.splitlines())) <= 120
