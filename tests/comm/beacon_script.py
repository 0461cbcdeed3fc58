"""A script of its own: beacons of processes that are killed, stopped, busy, forked and besieged.

python beacon_script.py prints a line of JSON: {what: what was seen}.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import threading
import time

from forks import HOST, fork, start_store

from fused_dlam.comm.beacon import Beacon, answers, refuses

PATIENCE = 60.0  # seconds, for a machine that does other things; nothing here takes as long


def owner(pipe, port, then):
    """A process with a beacon, which does something else."""
    beacon = Beacon((HOST, port))
    host, own = beacon.address
    if then not in (waits, computes):  # which never end
        then(beacon)
    os.write(pipe, f"{host} {own}\n".encode())
    if then in (waits, computes):
        then(beacon)
    time.sleep(PATIENCE)


def start(port, then):
    reads, writes = os.pipe()
    pid = fork(owner, writes, port, then)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        host, own = pipe.readline().split()
    return pid, (host, int(own))


def end(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def waits(beacon):
    """In the kernel, where Python's lock is free."""
    socket.socketpair()[0].recv(1)


def computes(beacon):
    """With Python's lock, but for its turns."""
    while True:
        sum(range(1000))


def has_a_child(beacon):
    """As a data loader's worker is: it lives on when its parent is dead."""
    parent, (read, write) = os.getpid(), os.pipe()
    if os.fork() == 0:
        os.write(write, b"1")  # it has closed what is not its own: a parent that dies before it does would be seen late
        while os.getppid() == parent:
            time.sleep(0.01)
        time.sleep(3.0)
        os._exit(0)
    os.read(read, 1)


def had_a_child(beacon):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def never_reads(beacon):
    """Its thread would end with an error."""

    def forbidden(self, *arguments):
        raise AssertionError("the beacon reads")

    for name in ("recv", "recv_into", "recvfrom", "recvmsg", "makefile"):
        setattr(socket.socket, name, forbidden)


def closes(beacon):
    beacon.close()
    (thread,) = [t for t in threading.enumerate() if t.name == "fused_dlam-beacon"] or [None]
    if thread is not None:
        thread.join(PATIENCE)
    assert thread is None or not thread.is_alive()


def soon(condition):
    """Seconds until it holds, None if it does not."""
    begin = time.monotonic()
    while time.monotonic() < begin + PATIENCE:
        if condition():
            return time.monotonic() - begin
        time.sleep(0.001)
    return None


def lives(port, then):
    pid, address = start(port, then)
    seen = [answers(address, PATIENCE), refuses(address, PATIENCE)]
    end(pid)
    return [*seen, refuses(address, PATIENCE)]


def killed(port):
    pid, address = start(port, waits)
    before = answers(address, PATIENCE)
    os.kill(pid, signal.SIGKILL)
    seconds = soon(lambda: refuses(address))
    os.waitpid(pid, 0)
    return before, seconds, answers(address)


def stopped(port):
    pid, address = start(port, waits)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    seen = [refuses(address), answers(address, 0.3)]
    os.kill(pid, signal.SIGCONT)
    seen.append(answers(address, PATIENCE))
    end(pid)
    return seen


def closed(port):
    pid, address = start(port, closes)
    gone = refuses(address, PATIENCE)
    alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
    end(pid)
    return gone, alive


def besieged(port, garbage):
    """1000 connections stay open: some of their owners have sent a lot, and none has read."""
    pid, address = start(port, never_reads)
    with contextlib.ExitStack() as held:
        for k in range(1000):
            caller = held.enter_context(socket.create_connection(address, PATIENCE))
            if garbage:
                caller.setblocking(False)
                with contextlib.suppress(OSError):
                    caller.send(b"\0garbage\n" * (k + 1))
        during = answers(address, PATIENCE)
    after = answers(address, PATIENCE), refuses(address, PATIENCE)
    end(pid)
    return during, *after


def main():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096) if most > 0 else 4096, most))
    keeper, port = start_store()
    try:
        told = {then.__name__: lives(port, then) for then in (waits, computes, has_a_child, had_a_child)}
        told |= {"killed": killed(port), "stopped": stopped(port), "closed": closed(port)}
        told |= {"nothing": besieged(port, False), "garbage": besieged(port, True)}
    finally:
        end(keeper)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
