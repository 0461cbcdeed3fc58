"""Who is in: agreement among the workers that are left, over a store that no worker hosts. No leader, no all-reduce.

One generation per change. A worker that cannot go on (a closed connection, silence, a request to let somebody in) gives
up its process groups, which closes its connections, so that whoever waits for it follows. Then, in the store:

    <g>/arrived   a line of each worker that arrives (`Arrival`)                  `append`
    <g>/members   the decision, written once by whoever is first                  `compare_set`

Any worker that has arrived may decide as soon as each missing one is known to be dead: its beacon refuses, or it is
accused of silence and its beacon does not answer (one that merely waits for a silent one does), or `timeout` has
passed. Two deciders write the same key: one wins, and both read what is there. The store is one process, so there is
one list per generation, and nobody's death, that of the first to arrive included, blocks it.

A worker has a number for life: its rank at the start. Newcomers get the numbers after that.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

import torch.distributed as dist

from .beacon import Address, Beacon, answers, refuses, which
from .errors import ExchangeError, listed
from .register import LEFT, PROCESS, Arrival, Excluded, RunEnded, View, address_of, arrival_of, somebody_trains
from .watch import log

POLL = 0.01  # seconds between two looks at the store
PROBE = 0.1  # seconds between two looks at the beacons of those who are missing
ASK_AGAIN = 10.0  # seconds after which a newcomer asks anew
# Members have all been there a moment ago when their groups are formed, which takes 0.1 s: who is silent was stopped.
SILENT_WHILE_FORMING = 3.0
PATIENCE = 10  # times `timeout`, for which a newcomer asks while others live


class Membership:
    """One worker's part in it.

    Args:
        store: keys of this job's own, in a store that no worker hosts.
        towards: that store's address.
        me, n: this worker's number, and how many there were at the start.
        timeout: seconds of silence that count as death.
        machines: the numbers of each machine's workers, if a machine goes as one.
    """

    def __init__(
        self,
        store: dist.Store,
        towards: Address,
        me: int,
        n: int,
        timeout: float,
        machines: Sequence[Sequence[int]] = (),
    ):
        self.store, self.towards, self.me, self.n, self.timeout = store, towards, me, n, timeout
        self.machines = [tuple(machine) for machine in machines]
        self.min_workers, self.busy = 1, False  # busy: whether an optimizer uses it
        self.backend = "gloo"  # of the worlds that are formed
        self.finished = 0  # how many calls of finish() this worker has come to; `done/<number>` in the store
        self.highest = n - 1  # the largest number that was ever a member's
        self.beacon = Beacon(towards)
        self.addresses: dict[int, Address] = {}
        self.suspects: set[int] = set()  # members that did not answer while a group was formed
        self.view = View(0, tuple(range(n)), (), 0, ())
        if me >= 0:
            self.store.set(f"address/{me}", json.dumps(self.beacon.address))

    def renew(self) -> None:
        """Another beacon, by which this process counts from here on. Who knows the former one takes it for dead: so
        this worker forgets the others' until `meet`, for they do the same.
        """
        self.beacon.close()
        self.addresses = {}
        self.beacon = Beacon(self.towards)
        self.store.set(f"address/{self.me}", json.dumps(self.beacon.address))

    def meet(self) -> None:
        """Learns the members' addresses, at the start, and anew for each optimizer after a first that was closed.

        All have said theirs before they built the groups that stand by now. Raises ExchangeError, naming who has not.
        """
        end, missing = time.monotonic() + self.timeout, list(self.view.members)
        while missing:
            if self.store.check([f"address/{missing[0]}"]):
                number = missing.pop(0)
                self.addresses[number] = address_of(self.store, number)
            elif time.monotonic() > end:
                raise ExchangeError(
                    f"rank {self.me}: {listed(missing)} did not build the optimizer within {self.timeout:g} s"
                )
            else:
                time.sleep(POLL)
        self.store.set("n", str(self.n))  # by all, alike: any of them may be lost before it has

    # -- newcomers ---------------------------------------------------------------------------------------------------

    @classmethod
    def newcomer(cls, store: dist.Store, towards: Address, timeout: float) -> Membership:
        """Of a worker that was not there at the start. It has no number until it asks, in `enter`."""
        end = time.monotonic() + timeout
        while not store.check(["n"]):
            if time.monotonic() > end:
                raise RunEnded(f"nobody has begun to train within {timeout:g} s: there is nothing to join")
            time.sleep(POLL)
        n = int(store.get("n"))
        return cls(store, towards, -1, n, timeout)

    def enter(self) -> View:
        """Asks until the others have decided on a generation that has this worker in it.

        Raises RunEnded once none of them lives, or after ten times `timeout`.
        """
        if self.me in self.view.members:  # under a number that is given up here: nobody is to wait for it
            self.beacon.close()
            self.beacon = Beacon(self.towards)
        self._ask()
        mine, start = {self.me}, time.monotonic()
        asked = looked = start
        while time.monotonic() < start + PATIENCE * self.timeout:
            g = int(self.store.add("generation", 0))
            if g > self.view.generation:
                view = self._decision(g)
                admitted = mine & set(view.new)
                if admitted:
                    self.view, self.me = view, max(admitted)
                    self._catch_up_finishes()
                    if PROCESS in os.environ:
                        self.store.delete_key(LEFT + os.environ[PROCESS])
                    self.store.append("came", f"{os.environ.get(PROCESS, '-')} {self.me}\n")  # type: ignore[attr-defined]
                    return view
            if time.monotonic() > looked + 1.0:
                looked = time.monotonic()
                if not somebody_trains(self.store):
                    raise RunEnded(
                        "nobody is left who could let this worker in: the others have ended, or were lost. Restart from"
                        " a checkpoint"
                    )
            if time.monotonic() > asked + ASK_AGAIN:  # whoever looked may have died
                asked = time.monotonic()
                log.warning("this worker has asked to be let in for %.0f s", asked - start)
                self._ask()
                mine.add(self.me)
            time.sleep(5 * POLL)
        raise RunEnded(
            f"this worker asked to be let in for {time.monotonic() - start:.0f} s and was not: the others do not look"
            " (admit_every=)"
        )

    def _ask(self) -> None:
        """Under a new number: an old one may have been looked at."""
        self.store.delete_key(f"asks/{self.me}")
        self.me = self.n - 1 + self.store.add("numbers", 1)
        self.store.set(f"address/{self.me}", json.dumps(self.beacon.address))
        self.store.set(f"asks/{self.me}", "")
        self.store.add("asked", 1)  # last: from here on it is found

    def _catch_up_finishes(self) -> None:
        """A newcomer has come to as many as all members have: what one of them is yet to call, it is to call too."""
        theirs = [self.finishes_of(i) for i in self.view.members if i not in self.view.new]
        self.finished = max(self.finished, min(theirs, default=0))
        self.tell_finishes()

    def tell_finishes(self) -> None:
        """To the others, how many calls of finish() this worker has come to."""
        self.store.set(f"done/{self.me}", str(self.finished))

    def finishes_of(self, number: int) -> int:
        key = f"done/{number}"
        return int(self.store.get(key)) if self.store.check([key]) else 0

    def asked(self) -> bool:
        """Whether somebody wants in. For one worker to look at now and then: two messages to the store."""
        return int(self.store.add("asked", 0)) > int(self.store.add("admitted", 0))

    # -- agreeing ----------------------------------------------------------------------------------------------------

    def agree(self, arrival: Arrival) -> View:
        """The next generation.

        Raises Excluded if it was decided without this worker, RunEnded if too few are left or the store is gone.
        """
        try:
            view = self._agree(arrival)
        except dist.DistError as error:
            raise RunEnded(
                f"worker {self.me}: workers were lost, and the store in which the others agree does not answer"
                f" ({str(error).splitlines()[0][:120]}): the process that keeps it, the launcher, is gone. Restart from"
                " a checkpoint"
            ) from None
        if self.me not in view.members:
            self._say_left()
            raise Excluded(
                f"the others went on without worker {self.me} in generation {view.generation}: it was silent for longer"
                f" than {self.timeout:g} s (timeout=), or a worker of its machine was"
            )
        self.view = view
        if len(view.members) < self.min_workers:
            self._say_left()
            left = len(view.members)
            are = "worker is" if left == 1 else "workers are"
            raise RunEnded(f"{left} {are} left, and min_workers is {self.min_workers}")
        return view

    def _say_left(self) -> None:
        """To the launcher: that this worker ends with an error is no failure, if others come to a good end."""
        if PROCESS in os.environ:
            try:
                self.store.set(LEFT + os.environ[PROCESS], "")
            except dist.DistError:  # the launcher has gone
                pass

    def others_agree(self) -> bool:
        """Whether another worker has begun the next generation, and waits for this one."""
        return self.store.check([f"{self.view.generation + 1}/arrived"])

    def gone(self) -> str:
        """Why nobody should wait for all members any more, "" if nothing is known."""
        if self.others_agree():
            return "other workers have lost one"
        dead = self.lost(self.view.members)
        return f"{listed(dead, what='worker')} died" if dead else ""

    def _agree(self, arrival: Arrival) -> View:
        old, g = self.view.members, self.view.generation + 1
        self.store.append(f"{g}/arrived", json.dumps(arrival) + "\n")  # type: ignore[attr-defined]
        start, probed, dead = time.monotonic(), -1.0, set[int]()
        while not self.store.check([f"{g}/members"]):
            arrivals = self._arrivals(g)
            waited = time.monotonic() - start
            missing = [i for i in old if i not in arrivals and i not in dead]
            if missing and waited > probed + PROBE:
                probed = waited
                accused = {i for a in arrivals.values() for i in a.accuses}
                dead |= self._dead(missing, accused)
                missing = [i for i in missing if i not in dead]
            if not missing or waited > self.timeout:
                self._decide(g, arrivals)
                break
            time.sleep(POLL)
        return self._decision(g)

    def _dead(self, missing: Sequence[int], accused: set[int]) -> set[int]:
        """Those who are certainly gone."""
        return which(lambda i: self._is_gone(i, i in accused), missing)

    def _is_gone(self, number: int, accused: bool) -> bool:
        address = self.addresses[number]
        return refuses(address) or (accused and not answers(address))

    def gone_while_forming(self, waited: float) -> list[int]:
        """Members that are gone; and once a wait has lasted, those that do not answer, which are accused next time."""
        gone = self.lost(self.view.members)
        if not gone and waited > SILENT_WHILE_FORMING:
            others = [i for i in self.view.members if i != self.me]
            gone = sorted(which(lambda i: not answers(self.addresses[i]), others))
            self.suspects |= set(gone)
        return gone

    def lost(self, members: Sequence[int]) -> list[int]:
        """Those of `members` whose process is certainly gone."""
        return [i for i in members if i != self.me and i in self.addresses and refuses(self.addresses[i])]

    def _arrivals(self, g: int) -> dict[int, Arrival]:
        """Who has arrived, by number. One message to the store."""
        lines = (json.loads(line) for line in self.store.get(f"{g}/arrived").decode().splitlines())
        return {line[0]: arrival_of(line) for line in lines}

    def _decide(self, g: int, arrivals: dict[int, Arrival]) -> None:
        members = [i for i in self.view.members if i in arrivals]
        for machine in self.machines:  # goes as one
            if not set(machine) <= set(members):
                members = [i for i in members if i not in machine]
        asked, new, looked, waits = int(self.store.add("asked", 0)), [], 0, False
        here = [arrivals[i] for i in members]
        addresses = {i: arrivals[i].address for i in members}
        # Between a call that all make together and the next step there is no place at which a newcomer's loop begins.
        in_call = any(arrival.in_call for arrival in here)
        if in_call and not self.machines:
            waits = asked > int(self.store.add("admitted", 0))
        elif here and not self.machines:
            looked = asked
            for i in range(self.n, self.n + int(self.store.add("numbers", 0))):
                if i not in self.view.members and i > self.highest and self.store.check([f"asks/{i}"]):
                    address = address_of(self.store, i)
                    if not refuses(address):
                        addresses[i] = address
                        new.append(i)
        calls = max((arrival.calls for arrival in here), default=0)
        foremost = [arrival for arrival in here if arrival.calls == calls]
        done = all(arrival.in_call and arrival.has_result for arrival in foremost)
        step = max((arrival.after if done else arrival.step for arrival in foremost), default=0)
        decision = [[*members, *new], new, step, here, addresses, looked, waits]
        self.store.compare_set(f"{g}/members", "", json.dumps(decision))

    def _decision(self, g: int) -> View:
        members, new, step, arrivals, addresses, looked, waits = json.loads(self.store.get(f"{g}/members"))
        self.addresses = {int(i): tuple(address) for i, address in addresses.items()}
        self.highest = max([self.highest, *members])
        # Everybody who reads it tells the newcomers: the one who decided may be gone.
        self._raise_to("generation", g)
        self._raise_to("admitted", looked)
        return View(g, tuple(members), tuple(new), step, tuple(map(arrival_of, arrivals)), waits)

    def _raise_to(self, key: str, value: int) -> None:
        """A number in the store that only grows."""
        while (now := int(self.store.add(key, 0))) < value:
            self.store.compare_set(key, str(now), str(value))

    def close(self) -> None:
        """From here on this worker counts as dead, though its process may live."""
        self.beacon.close()
