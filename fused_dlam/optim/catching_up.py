"""Those who are ahead wait for who catches up, as long as that takes steps: a round may last longer than `timeout`.

A worker that is behind says with each step that it takes alone that it goes on, and then that it is there. Where nobody
is behind nothing is said and nothing is looked at.

    <g>/steps/<number>   grows with each of its steps
    <g>/there/<number>   it has come to the step from which all go on
"""

from __future__ import annotations

import time

import torch.distributed as dist

from ..comm.errors import ExchangeError
from ..comm.membership import Membership

LOOK = 0.02  # seconds between two looks at the store
PROBE = 0.2  # seconds between two looks at the beacons


def takes_a_step(m: Membership) -> None:
    """Of a worker that is behind."""
    _say(m, "steps")


def wait(m: Membership) -> None:
    """Before all go on from one step: until those who were behind are there.

    Raises ExchangeError where one of them is gone, or took no step for `timeout` seconds, or others were lost.
    """
    g, start = m.view.generation, time.monotonic()
    behind = [a.number for a in m.view.arrivals if m.view.is_behind(a)]
    if m.me in behind:
        _say(m, "there")
    heard, probed = {i: (0, start) for i in behind if i != m.me}, start
    while heard:
        now = time.monotonic()
        for number, (steps, since) in list(heard.items()):
            if _heard(m, f"{g}/there/{number}"):
                del heard[number]
            elif (more := _heard(m, f"{g}/steps/{number}")) != steps:
                heard[number] = more, now
            elif now > since + m.timeout:
                error = ExchangeError(
                    f"worker {number} is behind, and has taken no step for {m.timeout:g} s (timeout=) to catch up"
                )
                error.lost = error.silent = True
                error.peer = m.view.rank(number)
                raise error
        if heard and now > probed + PROBE:
            probed = now
            why = m.gone()
            if why:
                error = ExchangeError(f"{why} while this worker waited for those who catch up")
                error.lost = True
                raise error
        if heard:
            time.sleep(LOOK)


def _say(m: Membership, what: str) -> None:
    try:
        m.store.add(f"{m.view.generation}/{what}/{m.me}", 1)
    except dist.DistError:  # the store is gone: the next loss ends the run, in words
        pass


def _heard(m: Membership, key: str) -> int:
    try:
        return int(m.store.add(key, 0))
    except dist.DistError as error:
        failed = ExchangeError(f"the store in which workers agree does not answer: {str(error).splitlines()[0][:120]}")
        failed.lost = True
        raise failed from None
