"""The end of training with on_failure="continue": no worker leaves while another may still need it to agree."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from ..comm.errors import ExchangeError
from ..comm.watch import log

if TYPE_CHECKING:
    from .recovery import Recovery


def finish(recovery: Recovery) -> None:
    """Stays until all members are through or gone, and goes on with those that are left when one is lost."""
    m = recovery.membership
    try:
        recovery.rejoin()
        m.store.set(f"done/{m.me}", "")
        while True:
            waiting = [i for i in m.view.members if i != m.me and not m.store.check([f"done/{i}"])]
            if not waiting or len(m.lost(waiting)) == len(waiting):
                return
            if m.others_agree():
                recovery.recover(ExchangeError("other workers have lost one"))
                if recovery.next is not None:
                    _leave(recovery)
                    return
            time.sleep(0.05)
    except dist.DistError:  # the launcher is gone: there is nothing to hear of the others
        return


def _leave(recovery: Recovery) -> None:
    """The others are further, and would wait for steps that this worker, which is through, does not take."""
    place, recovery.next = recovery.next, None
    assert place is not None
    log.warning(
        "worker %d: finish() at step %d, and the others are at step %d: it leaves them. All workers must take equally"
        " many steps",
        recovery.membership.me, recovery.optimizer._step, recovery.resumes,
    )  # fmt: skip
    recovery.membership.close()  # counts as gone at once
    place.abandon()
