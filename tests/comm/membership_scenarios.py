"""The scenarios of membership_script.py: a function for each, and what its workers do."""

import os
import signal
import time
from unittest import mock

from fused_dlam.comm.beacon import refuses
from fused_dlam.comm.membership import Membership
from fused_dlam.comm.register import PROCESS, Excluded, was_left

OPERATIONS = 12  # more than one agreement takes, see `killed`


def begin(w, **options):
    """A member, once all have met."""
    member = w.member(**options)
    w.everybody("met")
    return member


# -- a worker that dies in an agreement --------------------------------------------------------------------------------


def decider(w, left):
    begin(w)
    w.hear("dead", "arrived")
    w.deadly.done.clear()
    w.deadly.left = left
    w.agree(step=4)
    w.told["operations"] = list(w.deadly.done)
    w.say("through")


def reader(w):
    """Decides nothing, and changes nothing in the store, before worker 0 is through or dead."""
    m = begin(w)
    w.hear("dead")
    first, decide, decision, look = m.addresses[0], m._decide, m._decision, m._arrivals

    def through():
        return (w.folder / "through").exists()

    def wait():
        while not (through() or refuses(first)):
            time.sleep(0.01)

    def patient(g, arrivals):
        wait()
        if not m.store.check([f"{g}/members"]):
            decide(g, arrivals)

    def reads(g):
        wait()
        return decision(g)

    def looks(g):
        w.say("arrived")
        return look(g)

    m._decide, m._decision, m._arrivals = patient, reads, looks
    w.agree(step=3)
    if 0 in m.view.members and not through():
        w.agree(step=3)


def victim(w):
    begin(w)
    w.die()


def killed(s, left):
    """Worker 0 is killed before an operation of its agreement; 2 is dead, 1 reads."""
    s.start(0, 3, decider, left)
    s.start(1, 3, reader)
    s.start(2, 3, victim)
    s.hear("met0", "met1", "met2")
    s.wait_for(2)
    (s.folder / "dead").touch()
    return s.told()


# -- decisions ---------------------------------------------------------------------------------------------------------


def decides(w, leaves_out=()):
    m = begin(w)
    decide = m._decide

    def at_once(g, arrivals):
        w.everybody("decides")
        decide(g, {i: arrival for i, arrival in arrivals.items() if i not in leaves_out})

    m._decide = at_once
    w.agree(step=w.number)


def deciders(s):
    s.start(0, 3, decides, (2,))
    s.start(1, 3, decides)
    s.start(2, 3, decides)
    return s.told()


def arrives(w, after=(), options=None, **more):
    begin(w, **(options or {}))
    w.hear(*after)
    w.agree(step=10 + w.number, **more)


def late(w, admitted):
    os.environ[PROCESS] = "2.0"  # as the launcher calls it, to which it tells that it was left
    m = begin(w)
    m.timeout = 1.0  # from here on: on a busy machine it takes longer to begin
    w.hear("through0", "through1")
    try:
        w.agree()
    except Excluded as error:
        w.told["excluded"] = str(error)
        w.told["left"] = [was_left(m.store, "2.0")]
    if admitted:
        w.say("renewed")
        w.tell(m.enter())
        w.told["me"] = m.me
        w.told["left"].append(was_left(m.store, "2.0"))


def in_time(w, admits):
    m = begin(w)
    m.timeout = 1.0  # from here on: on a busy machine it takes longer to begin
    w.agree(step=10 + w.number)
    w.say(f"through{w.number}")
    if admits:
        w.hear("renewed")
        while not m.store.check(["asks/3"]) or not m.asked():
            time.sleep(0.01)
        m.timeout = 20.0
        w.agree(step=20 + w.number)


def late_arrival(s, comes_back):
    s.start(0, 3, in_time, comes_back)
    s.start(1, 3, in_time, comes_back)
    s.start(2, 3, late, comes_back)
    return s.told()


def false_accusation(s):
    """Worker 1 is slow, and has been accused: its beacon answers, so it stays."""
    s.start(0, 3, accuser)
    s.start(1, 3, arrives, ("slept",))
    s.start(2, 3, arrives)
    s.hear("looked")
    time.sleep(1.0)
    (s.folder / "slept").touch()
    return s.told()


def accuser(w):
    m = begin(w)
    probe = m._dead

    def probes(missing, accused):
        assert 1 in accused
        found = probe(missing, accused)
        w.say("looked")
        return found

    m._dead = probes
    w.agree(step=10, accuses=(0, 1, 2))


def stopped(s, accused):
    """Worker 1 is stopped. Accused: its beacon is asked; else the timeout goes by."""
    options = None if accused else {"timeout": 2.0}
    for number in (0, 2):
        s.start(number, 3, arrives, ("stopped",), options, accuses=(1,) if accused else ())
    s.start(1, 3, arrives, ("never",), options)
    s.hear("met0", "met1", "met2")
    s.strike(1, signal.SIGSTOP)
    (s.folder / "stopped").touch()
    return s.told(without=(1,))


def a_machine_goes_as_one(s):
    machines = {"machines": [(0, 1), (2, 3)]}
    for number in range(3):
        s.start(number, 4, arrives, ("dead",), machines)
    s.start(3, 4, victim)
    s.wait_for(3)
    (s.folder / "dead").touch()
    return s.told()


def too_few(s):
    s.start(0, 2, few)
    s.start(1, 2, victim)
    return s.told()


def few(w):
    begin(w).min_workers = 2
    w.agree()


# -- the store ---------------------------------------------------------------------------------------------------------


def store_dies(s, when):
    for number in range(2):
        s.start(number, 2, waits_for_the_other, when)
    s.hear("ready0", "ready1")
    s.kill_store()
    (s.folder / "no store").touch()
    return s.told()


def waits_for_the_other(w, when):
    m = begin(w)
    if when == "before":
        w.say(f"ready{w.number}")
        w.hear("no store")
    elif w.number == 0:  # while it waits for worker 1
        look = m._arrivals

        def looks(g):
            w.say("ready0")
            return look(g)

        m._arrivals = looks
    else:
        w.say("ready1")
        w.hear("no store")
    w.agree()


# -- newcomers ---------------------------------------------------------------------------------------------------------


def hosts(w, asked):
    """A member that agrees anew once they have asked."""
    m = begin(w)
    w.say(f"host{w.number}")
    w.hear(*asked)
    w.agree(step=10 + w.number)
    w.told["asked"] = m.asked()


def comes(w, dies=None, timeout=None):
    w.hear("host0")
    m = w.newcomer()
    m.timeout = timeout or m.timeout  # it asks for ten times as long while others live
    store = m.store

    class Tells:
        def __getattr__(self, name):
            return getattr(store, name)

        def add(self, key, value):
            result = store.add(key, value)
            if key == "asked" and value:
                if dies == "asking":
                    w.die()
                w.say(f"asked{w.number}")
            return result

    m.store = Tells()
    with mock.patch("fused_dlam.comm.membership.ASK_AGAIN", 1000.0):
        view = m.enter()
    if dies == "admitted":
        w.die()
    w.tell(view)
    w.told["me"] = m.me


def newcomers(s, count):
    asked = [f"asked{2 + i}" for i in range(count)]
    for number in range(2):
        s.start(number, 2, hosts, asked)
    for i in range(count):
        s.start(2 + i, 2, comes)
    return s.told()


def newcomer_dies(s, when):
    asked = ["dead"] if when == "asking" else ["asked2"]
    for number in range(2):
        s.start(number, 2, hosts if when == "asking" else sees_it_die, asked)
    s.start(2, 2, comes, when)
    s.wait_for(2)
    (s.folder / "dead").touch()
    return s.told()


def sees_it_die(w, asked):
    begin(w)
    w.say(f"host{w.number}")
    w.hear(*asked)
    w.agree(step=10)
    w.hear("dead")
    w.agree(step=11)


def in_vain(s):
    s.start(0, 1, lets_nobody_in)
    s.start(1, 1, comes, None, 0.1)
    return s.told()


def lets_nobody_in(w):
    begin(w)
    w.say("host0")


def nobody_there(s):
    s.start(0, 1, alone)
    return s.told()


def alone(w):
    Membership.newcomer(w.store(), ("127.0.0.1", w.port), 1.0)


def asks_again(s):
    """Nobody looks for a while: the newcomer asks under another number, and is let in under that alone."""
    s.start(0, 1, looks_late)
    s.start(1, 1, impatient)
    return s.told()


def looks_late(w):
    m = begin(w)
    w.say("host0")
    while not m.store.check(["asks/2"]):
        time.sleep(0.01)
    time.sleep(0.1)  # between that and the count the newcomer has nothing to wait for
    w.agree(step=6)


def impatient(w):
    w.hear("host0")
    m = w.newcomer()
    with mock.patch("fused_dlam.comm.membership.ASK_AGAIN", 0.5):
        w.tell(m.enter())
    w.told["me"] = m.me


SCENARIOS = {
    **{f"killed after {done}": (killed, done) for done in range(OPERATIONS)},
    "deciders": (deciders,),
    "late": (late_arrival, False),
    "late, comes back": (late_arrival, True),
    "false accusation": (false_accusation,),
    "stopped, accused": (stopped, True),
    "stopped, not accused": (stopped, False),
    "machine": (a_machine_goes_as_one,),
    "too few": (too_few,),
    "store dies before": (store_dies, "before"),
    "store dies in it": (store_dies, "in it"),
    "newcomer": (newcomers, 1),
    "two newcomers": (newcomers, 2),
    "newcomer dies asking": (newcomer_dies, "asking"),
    "newcomer dies admitted": (newcomer_dies, "admitted"),
    "in vain": (in_vain,),
    "nobody there": (nobody_there,),
    "asks again": (asks_again,),
}
