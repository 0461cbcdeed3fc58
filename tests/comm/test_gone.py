"""Promise: a rank whose process was killed is named, by those of its machine and those of others, and nobody else is:
neither one that is stopped, nor one that has ended after it gave up."""

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from fused_dlam.comm import gone, last_words

RANKS = [0, 1, 2, 3]


@pytest.fixture
def store(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(last_words, "default_store", lambda prefix: dist.PrefixStore(prefix, store))
    return store


@pytest.fixture
def ranks():
    """The processes of ranks 1 to 3; this one is rank 0's."""
    started = {rank: subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(600)"]) for rank in RANKS[1:]}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def near(ranks):
    me = gone.own()
    processes = {0: me, **{rank: me._replace(pid=process.pid) for rank, process in ranks.items()}}
    found = gone.neighbors({**processes, 4: gone.Process("another machine", me.pid), 5: gone.Process("", me.pid)})
    assert set(found) == set(ranks)
    return found


@pytest.mark.parametrize("reaped", [False, True])
def test_who_was_killed(store, ranks, reaped):
    seen = near(ranks)
    ranks[1].kill()
    if reaped:
        ranks[1].wait()
    os.kill(ranks[2].pid, signal.SIGSTOP)
    assert gone.died("a", 3, RANKS, {}) == []  # of another machine, before one of this has looked
    ranks[3].kill()
    ranks[3].wait()
    assert gone.died("a", 0, RANKS, seen) == [1]
    assert gone.died("a", 2, RANKS, {}) == [1]
    assert gone.died("b", 0, RANKS, seen) == [1, 3]  # where rank 3 has not given up


def test_a_number_that_is_another_process_by_now(store, ranks):
    (pid, _) = near(ranks)[1]
    assert gone.died("a", 0, RANKS, {1: (pid, "17")}) == [1]


def test_without_a_store(monkeypatch, ranks):
    seen = near(ranks)
    ranks[1].kill()
    ranks[1].wait()
    monkeypatch.setattr(last_words, "default_store", lambda prefix: None)
    assert gone.died("a", 0, RANKS, seen) == []
