"""Promise: a launcher, and a newcomer that asks, know whether anybody is left who could let a newcomer in.

Members, closed optimizers and newcomers of one process, which has a beacon for each of them, over a launcher's store.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fused_dlam.comm.membership import Membership
from fused_dlam.comm.register import KEYS, Arrival, RunEnded
from fused_dlam.tools.keeper import Launchers, reach, serve

TIMEOUT = 600.0  # seconds: nobody may wait for it


class Run:
    def __init__(self):
        self.server = serve(None)
        self.launchers = Launchers(self.server, 0, 1)
        self.members = [Membership(self.keys(), self.towards, i, 2, TIMEOUT) for i in range(2)]
        for member in self.members:
            member.meet()

    @property
    def towards(self):
        return "127.0.0.1", self.server.port

    def keys(self):
        return dist.PrefixStore(f"{KEYS}0", reach(*self.towards, 10, lambda: False))

    def newcomer(self):
        """One that has been let in by worker 0, the last one."""
        one, first = Membership.newcomer(self.keys(), self.towards, TIMEOUT), self.members[0]
        with ThreadPoolExecutor(1) as pool:
            entered = pool.submit(one.enter)
            while not first.asked():
                time.sleep(0.01)
            first.agree(Arrival(0, first.beacon.address, 5, 0))
            assert entered.result().members == (0, 2)
        return one


def test_nobody_has_begun():
    assert Launchers(serve(None), 0, 1).somebody_trains() is None


def test_of_two_one_after_the_other_is_lost():
    run = Run()
    assert run.launchers.somebody_trains()
    run.members[0].close()
    assert run.launchers.somebody_trains()
    run.members[1].close()
    assert run.launchers.somebody_trains() is False
    run.members[1].renew()  # another optimizer of that process
    assert run.launchers.somebody_trains()


def test_a_newcomer_that_was_let_in_counts_until_it_has_to_ask_again(monkeypatch):
    """All others are lost before its groups stand: it knows that nobody is there, and the launcher that it waits."""
    run = Run()
    run.members[1].close()
    monkeypatch.setenv("FUSED_DLAM_PROCESS", "1.1")
    newcomer = run.newcomer()
    assert run.launchers.numbers() == {"1.1": 2}
    run.members[0].close()
    assert run.launchers.somebody_trains()
    with pytest.raises(RunEnded, match="nobody is left who could let this worker in.*from a checkpoint"):
        newcomer.enter()
    assert run.launchers.somebody_trains() is False
