"""What host threads learn from each other: events, queues and locks that carry vector clocks along.

Without them nothing that one thread did would be known to another, and with one clock for the whole host a courier's
wait for a device would pass for the training thread's.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from fake_clocks import Agent

if TYPE_CHECKING:
    from fake_cuda import Machine


def carrying_event(machine: Machine):
    class CarryingEvent(threading.Event):
        def set(self):
            self.clock = dict(machine.host().clock)
            super().set()

        def wait(self, timeout=None):
            done = super().wait(timeout)
            machine.host().learn(getattr(self, "clock", {}))
            return done

    return CarryingEvent


def carrying_queue(machine: Machine):
    real = queue.SimpleQueue

    class CarryingQueue:
        def __init__(self):
            self.queue = real()

        def put(self, item):
            self.queue.put((item, dict(machine.host().clock)))

        def get(self, *args, **kwargs):
            item, clock = self.queue.get(*args, **kwargs)
            machine.host().learn(clock)
            return item

        def __getattr__(self, name):
            return getattr(self.queue, name)

    return CarryingQueue


def carrying_lock(machine: Machine, make):
    class CarryingLock:
        def __init__(self):
            self.lock, self.clock = make(), Agent("lock")

        def acquire(self, *args, **kwargs):
            got = self.lock.acquire(*args, **kwargs)
            if got:
                machine.host().learn(self.clock.clock)
            return got

        def release(self):
            self.clock.learn(machine.host().clock)
            self.lock.release()

        __enter__ = acquire

        def __exit__(self, *error):
            self.release()

        def __getattr__(self, name):
            return getattr(self.lock, name)

    return CarryingLock
