"""The end of training with on_failure="continue": no worker leaves while another may still need it to agree.

Each worker counts its calls, and says in the store how far it is. A second call, that of a second optimizer say, so
waits anew, and who is a call ahead is waited for by nobody.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from ..comm.beacon import which_answer
from ..comm.errors import ExchangeError, listed
from ..comm.membership import Membership
from ..comm.watch import log

if TYPE_CHECKING:
    from .recovery import Recovery

LOOK = 0.05  # seconds between two looks at the store
PROBE = 0.2  # seconds between two looks at the beacons: each leaves a connection in a stopped process's queue


def finish(recovery: Recovery) -> None:
    """Stays until all members are through or gone, and goes on with those that are left when one is lost.

    Gone is also who neither is through nor answers for `timeout` seconds. One that answers is waited for.
    """
    m, optimizer = recovery.membership, recovery.optimizer
    try:
        recovery.rejoin()
        m.finished += 1
        m.tell_finishes()
        waiting = Waiting(m)
        while waiting.goes_on():
            if m.others_agree():
                call, step = m.finished, optimizer._step
                recovery.recover(ExchangeError("other workers have lost one"))
                if recovery.next is not None or optimizer._step < step:  # the latter where it has come back
                    _leave(recovery, step)
                    return
                m.finished = max(m.finished, call)
                m.tell_finishes()  # it may have come back, under another number
            time.sleep(LOOK)
    except dist.DistError:  # the launcher is gone: there is nothing to hear of the others
        return


class Waiting:
    """For whom one call of finish() waits."""

    def __init__(self, membership: Membership):
        self.membership = membership
        self._probed, self._warned = 0.0, time.monotonic()
        self._heard = dict.fromkeys(membership.view.members, self._warned)  # when who is not through answered last

    def goes_on(self) -> bool:
        """Whether anybody is to be waited for."""
        m, now = self.membership, time.monotonic()
        missing = [i for i in m.view.members if i != m.me and m.finishes_of(i) < m.finished]
        if missing and now > self._probed + PROBE:
            heard = which_answer({i: m.addresses[i] for i in missing})
            lost = m.lost([i for i in missing if i not in heard])
            self._probed = now = time.monotonic()
            self._heard = {i: now if i in heard else self._heard.get(i, now) for i in missing if i not in lost}
        here = [i for i in missing if i in self._heard and now <= self._heard[i] + m.timeout]
        if missing and not here:
            silent = [i for i in missing if i in self._heard]
            if silent:
                log.warning(
                    "worker %d: finish() does not wait for %s any longer: no answer for %g s (timeout=)",
                    m.me, listed(silent, what="worker"), m.timeout,
                )  # fmt: skip
        elif here and now > self._warned + m.timeout:
            self._warned = now
            log.warning(
                "worker %d: finish() waits for %s, which did not call it yet", m.me, listed(here, what="worker")
            )
        return bool(here)


def _leave(recovery: Recovery, step: int) -> None:
    """The others are elsewhere, and would wait for steps that this worker, which is through, does not take."""
    place, recovery.next = recovery.next or recovery.optimizer._engine.place, None
    log.warning(
        "worker %d: finish() at step %d, and the others are at step %d: it leaves them. All workers must take equally"
        " many steps",
        recovery.membership.me, step, recovery.resumes,
    )  # fmt: skip
    recovery.membership.close()  # counts as gone at once
    place.abandon()
