"""Promises about bench/netlab.py (skipped without root, iproute2 and network namespaces):

- a link carries no more than its rate, and most of it;
- the command's failure is the lab's exit status, a killed rank's is not;
- no namespace is left, whether the command ends, hangs, starts daemons or the lab is told to stop.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest
from namespaces import needs_namespaces

NETLAB = Path(__file__).resolve().parents[2] / "bench" / "netlab.py"
sys.path.append(str(NETLAB.parent))  # netlab_hosts
_spec = util.spec_from_file_location("netlab", NETLAB)
netlab = util.module_from_spec(_spec)
_spec.loader.exec_module(netlab)


# Host 1 sends host 0 one second's worth of bytes at 40 Mbit/s; host 0 prints how long that took.
TRANSFER = """
import os, socket, time
address, size = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 5_000_000
if os.environ["RANK"] == "0":
    with socket.create_server(address) as server:
        server.settimeout(10)
        connection, _ = server.accept()
        connection.settimeout(10)
        left, start = size, None
        while left and (got := len(connection.recv(1 << 20))):
            left, start = left - got, start or time.monotonic()
    print("seconds", time.monotonic() - start, "left", left)
else:
    end = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection(address, timeout=1)
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)
    connection.settimeout(10)
    connection.sendall(bytes(size))
"""


def lab(*arguments, stop_after=None):
    """Runs netlab; (exit status, output, namespaces it left)."""
    command = [sys.executable, str(NETLAB), "--hosts", "2", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if stop_after is not None:
        for line in process.stdout:
            if stop_after in line:
                break
        process.send_signal(signal.SIGTERM)
    try:
        output, _ = process.communicate(timeout=40)
    finally:
        process.kill()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10).stdout
    return process.returncode, output, [line for line in listed.split("\n") if line.startswith(f"nl{process.pid}")]


def running_sleeps():
    """The arguments of all `sleep`s on this machine."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name, *arguments = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended
            continue
        if name == "sleep":
            found.update(arguments)
    return found


@needs_namespaces
def test_the_rate_limit_is_in_force():
    code, output, left = lab("--rate", "40mbit", "--timeout", "30", "--", sys.executable, "-c", TRANSFER)
    assert code == 0 and left == [], output
    words = output.split()
    assert words[words.index("left") + 1] == "0"
    # Never faster than the rate (5 MB at 40 Mbit/s: 1 s, headers add 1 %, the bucket takes off 2 ms); slower if the
    # machine is busy.
    assert 0.95 < float(words[words.index("seconds") + 1]) < 4


@needs_namespaces
def test_hosts_are_apart_and_a_failure_is_reported():
    script = "ls /sys/class/net; echo at $NETLAB_ADDR $WORLD_SIZE; exit $((RANK * 3))"
    code, output, left = lab("--rate", "1gbit", "--", "sh", "-c", script)
    assert code == 3 and left == []
    assert "[0] at 10.77.0.1 2\n" in output and "[1] at 10.77.0.2 2\n" in output
    assert {line.split()[1] for line in output.split("\n") if line.endswith((" eth0", " lo"))} == {"eth0", "lo"}


@needs_namespaces
def test_a_rank_is_killed_on_cue():
    script = "echo ready; [ $RANK = 1 ] && exec sleep 60; exit 0"
    code, output, left = lab("--kill-rank", "1", "--after-line", "ready", "--", "sh", "-c", script)
    assert code == 0 and left == [] and "kill -9 rank 1" in output


@needs_namespaces
def test_nothing_is_left_of_a_command_that_hangs():
    start = time.monotonic()
    script = "setsid sleep 61.25 & sleep 62"  # a daemon in a session of its own, as a launcher's workers are
    code, _, left = lab("--timeout", "1", "--", "sh", "-c", script)
    assert code == 124 and left == [] and time.monotonic() - start < 30
    assert "61.25" not in running_sleeps()


@needs_namespaces
def test_nothing_is_left_when_it_is_told_to_stop():
    code, _, left = lab("--", "sh", "-c", "echo ready; sleep 60", stop_after="ready")
    assert code == 130 and left == []


@needs_namespaces
def test_nothing_is_left_when_it_cannot_be_built():
    code, output, left = lab("--cc", "no_such_control", "--", "true")
    assert code == 125 and left == [] and "tcp_congestion_control" in output


def test_rates_are_read():
    assert [netlab.bits(t) for t in ("200mbit", "1.5G", "9600")] == [2e8, 1.5e9, 9600]
    assert netlab.host_rate("3=50mbit") == (3, 5e7)
    for wrong in ("fast", "0mbit", "-5mbit", "5mbyte"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a rate"):
            netlab.bits(wrong)
    with pytest.raises(argparse.ArgumentTypeError, match="HOST=RATE"):
        netlab.host_rate("50mbit")


def test_impossible_labs_are_refused(monkeypatch, capsys):
    with pytest.raises(netlab.LabError, match="hosts are 0 to 1"):
        netlab.Lab(2, 1e8, rate_of={2: 1e6})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(netlab.LabError, match="needs root"), netlab.Lab(2, 1e8):
        pass
    with pytest.raises(SystemExit):
        netlab.main(["--hosts", "2"])
    assert "no command" in capsys.readouterr().err
