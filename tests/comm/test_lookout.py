"""Promises of the lookout over NCCL, alone: what torch must be told first, and which waits it ends.

Whole runs: tests/faults/test_recovery_oracle.py, and the table of faults, over a transport that is like NCCL.
"""

import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fused_dlam.comm import lookout, watch
from fused_dlam.comm.errors import ExchangeError
from fused_dlam.comm.ledger import Ledger


class End:
    """One rank's end of a group whose operations end when they are aborted."""

    rank, ranks, backend, generation, broken, host_waits = 1, [4, 6], "nccl", "", False, True
    stages, ledger, interrupted, numbers = False, Ledger(), "", ()

    def __init__(self, why="", timeout=30.0):
        self.timeout, self.looks, self.why, self.aborted = timeout, 0, why, threading.Event()

    def lookout(self):
        self.looks += 1
        if isinstance(self.why, Exception):
            raise self.why
        return self.why

    def interrupt(self, why):
        self.interrupted = why
        self.aborted.set()

    def wait(self, seconds=20.0):
        with watch.Watched(self, "waiting for a message from", 3, 0):
            self.aborted.wait(seconds)


@pytest.fixture
def watched():
    ends = []

    def make(*arguments, **options):
        ends.append(End(*arguments, **options))
        watch.watch_over(ends[-1])
        return ends[-1]

    yield make
    for end in ends:
        watch.forget(end)


def test_a_wait_for_a_dead_worker_ends_and_names_it(watched):
    end = watched("worker 4 died")
    with pytest.raises(ExchangeError, match="step 3: waiting for a message from rank 4 failed.*worker 4 died") as error:
        end.wait()
    assert error.value.lost and not error.value.silent and error.value.peer == 4
    assert end.broken  # its groups are aborted, and not waited for, when they are given back


def test_one_that_lasts_for_timeout_is_silence(watched):
    end = watched(timeout=0.5)
    with pytest.raises(ExchangeError, match="nothing came of it in 0.5 s") as error:
        end.wait()
    assert error.value.lost and error.value.silent


@pytest.mark.parametrize("why", ["", RuntimeError("the store does not answer")])
def test_any_other_goes_on(watched, why):
    end = watched(why)
    end.wait(4 * lookout.LOOK)
    assert end.looks and not end.interrupted


def test_short_waits_ask_nobody(watched):
    end = watched("worker 4 died")
    start = time.monotonic()
    while time.monotonic() < start + 4 * lookout.LOOK:
        with watch.Watched(end, "waiting for a message from", 3, 0):
            time.sleep(0.001)
    assert not end.looks and not end.interrupted


def test_without_a_lookout_no_wait_is_ended(watched):
    end = watched(timeout=0.1)
    end.lookout = None
    end.wait(0.5)
    assert not end.interrupted


def test_a_wait_in_vain_that_ended_by_itself_is_told_of_too(watched):
    """What came just before the abort may be whole or not: nothing of it is used."""
    end = watched()
    with pytest.raises(ExchangeError):
        with watch.Watched(end, "waiting for a message from", 3, 0):
            end.interrupt("other workers have lost one")


@pytest.fixture
def environment(monkeypatch):
    for name in (lookout.HANDLING, *lookout.OTHERS):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name in (lookout.HANDLING, *lookout.OTHERS):
        os.environ.pop(name, None)


def world(environment, device):
    environment.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=device)))


def test_torch_is_told_to_leave_errors_alone(environment):
    world(environment, None)
    lookout.prepare()
    assert os.environ[lookout.HANDLING] == "0" and os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    lookout.prepare()


@pytest.mark.parametrize("chosen", ["1", "2", "3"])
def test_who_has_chosen_otherwise_is_told(environment, chosen):
    world(environment, None)
    environment.setenv(lookout.HANDLING, chosen)
    with pytest.raises(ValueError, match=f"ASYNC_ERROR_HANDLING is {chosen}.*Unset it"):
        lookout.prepare()


def test_an_eager_world_is_refused(environment):
    world(environment, 0)
    with pytest.raises(ValueError, match="leave device_id out"):
        lookout.prepare()
    assert lookout.HANDLING not in os.environ
