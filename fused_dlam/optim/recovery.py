"""Going on without workers that are lost, and with those that come.

    RUN -> an exchange fails (or somebody asks to be let in, or the others agree already)
        -> GIVE UP   the groups: connections close, so whoever waits for this worker follows
        -> END       the broken step alone, bucket by bucket (engine/regroup.py)
        -> AGREE     on who is left, and on the largest step (comm/membership.py)
        -> FORM      their world and groups (comm/generation.py); another loss: AGREE again
        -> CATCH UP  who was behind takes the steps up to the largest alone; the others wait for it (catching_up.py)
        -> SETTLE    copies for newcomers, centered buffers, and all go on in one step

Every rank takes one local step in every step(), so loops, schedules and counters stay alike on all ranks.

In rounds (`Gossip` with every=H) "step" above is an exchange, and there is more time between two of them than
`timeout`, perhaps. So a worker looks now and then, in the steps between, whether the others agree, and agrees before
its step is taken: no exchange has begun then, and none is broken. All go on after equally many steps of one round,
unless they take unlike numbers.

Calls outside of steps (`averaged`, checkpoints) are made by all together. A rank may have come through one in which
another has failed, and must not make it again alone. So such a call ends with a confirmation, and who fails says how
far it came: if anyone is past the call, or all have its result, it is done for all; else all make it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..comm import generation
from ..comm.errors import ExchangeError, listed
from ..comm.membership import Membership
from ..comm.place import Place
from ..comm.register import Arrival, Excluded, RunEnded, View
from ..comm.watch import log
from ..engine import regroup
from . import catching_up, mixed_precision
from .succession import Succession
from .survival import Members, Survival

if TYPE_CHECKING:
    from .shared import GossipOptimizer

T = TypeVar("T")
TRIES = 4  # agreements in a row in which somebody waits who cannot be let in
LOOK = 1.0  # seconds between two looks whether the others agree, and at most a tenth of `timeout`
FUTILE = 5  # generations in a row that lose nobody and do not stand: then it is no loss that ends them


class Recovery:
    """One optimizer's way through losses. `events` tells of each, for tests and benchmarks."""

    def __init__(self, optimizer: GossipOptimizer, chosen: Survival, membership: Membership, graphs: Succession):
        self.optimizer, self.chosen, self.membership, self.graphs = optimizer, chosen, membership, graphs
        self.told: ExchangeError | None = None  # an error of the backward pass: step() deals with it
        # calls outside of steps that have ended, alike on all ranks between steps
        self.calls = max((arrival.calls for arrival in membership.view.arrivals), default=0)
        self.in_call: int | None = None  # the step at which this worker stood when the present call began
        self.has_result = False
        self._done = False  # whether all have that call's result
        self.take_back: Callable[[], Any] | None = None  # undoes what this worker has of the call
        self.lost: tuple[int, ...] | None = None  # the groups were given up; whom this worker accuses of it
        self.resumes = 0  # the step from which all go on together
        self.next: Place | None = None  # where, while this worker catches up
        self.events: list[dict[str, Any]] = []
        view = membership.view
        self._stale = False  # whether this worker came back in the midst of its loop
        self.members = tuple(number for number in view.members if number not in view.new)
        self._store_failed = False
        self._looked = -1  # steps over `admit_every`, when it was last asked who waits
        self._next_look = 0.0  # when it is to be looked whether the others agree
        self._tries = 0  # how often in a row somebody waited in vain
        self._admits_from: int | None = None  # of somebody who waits: how many calls are to have ended first
        self.empty = False  # whether this worker was let in, and has not taken a neighbor's state yet
        self.came = False  # whether this worker came to a run that is under way, and has taken no step there yet
        self._news: Members | None = None  # that the script was not told of yet
        self.announces = False  # within the script's function for them
        self._since = 0.0, 0.0, ""  # when the groups were given up, the CPU time then, and why

    def arrive(self, place: Place) -> None:
        """A newcomer, whose groups stand, takes its neighbor's state."""
        self.resumes, self.next = self.membership.view.step, place
        self.optimizer._set_step(self.resumes)
        self.came = self.empty = True
        self._go_on()

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self, advance: Callable[[], T]) -> T:
        """`advance` is the optimizer's step; called again after a failure it does the rest, alone."""
        self.rejoin()
        self._announce()
        # A machine's ranks hear of a loss in each inner step, and take that one alone, all of them.
        early = self.admits or self.optimizer._engine.steps_alone
        error = self._reason()
        if error is not None and early and self.optimizer._engine.step is None:  # no exchange begins here: none breaks
            self._give_up(error)
            self.rejoin()
            self._announce()
            error = None
        if self.next is not None:
            catching_up.takes_a_step(self.membership)
        if error is None:
            try:
                return self._taken(advance)
            except ExchangeError as failure:
                if not failure.lost:  # a peer is there, and does something else
                    raise
                error = failure
        self._give_up(error)
        return self._taken(advance)

    def _taken(self, advance: Callable[[], T]) -> T:
        result = advance()
        self.came = False
        return result

    @property
    def admits(self) -> bool:
        """Whether the next step begins with an agreement, in which somebody is let in."""
        return self._admits_from is not None and self.calls >= self._admits_from

    def _reason(self) -> ExchangeError | None:
        """Why this step does not begin as the last one did."""
        error, self.told = self.told, None
        if error is None and self.admits:
            error = ExchangeError("somebody asks to be let in")
        return error or self._others_agree() or self._somebody_asks()

    def _others_agree(self) -> ExchangeError | None:
        """In rounds, now and then: who is not a neighbor of a lost worker would hear of it in the next exchange."""
        now = time.monotonic()
        if not self.optimizer._engine.anchored or now < self._next_look or self._store_failed:
            return None
        self._next_look = now + min(LOOK, self.membership.timeout / 10)
        return ExchangeError("other workers have lost one") if self._ask(self.membership.others_agree) else None

    def _ask(self, question: Callable[[], bool]) -> bool:
        try:
            return question()
        except RuntimeError:  # the store is gone: training goes on
            self._store_failed = True
            log.warning("the store in which workers agree does not answer: the next loss will end the run")
            return False

    def hold(self, error: ExchangeError) -> None:
        """An exchange failed where nothing can be done about it: in the backward pass."""
        self.told = self.told or error

    def _somebody_asks(self) -> ExchangeError | None:
        """A join is a fault without a victim. One worker looks, now and then.

        Where a call of all workers follows on the broken step, before the others know of it, nobody is let in there:
        all agree once more when the next step begins, see `admits`.
        """
        every, view = self.chosen.admit_every, self.membership.view
        first = self.membership.me == view.members[0] and self.next is None and self._admits_from is None
        due = bool(every) and self.optimizer.steps_done // every != self._looked
        self._looked = self.optimizer.steps_done // (every or 1)
        if not (first and due) or self._store_failed or self.membership.machines:
            return None
        return ExchangeError("somebody asks to be let in") if self._ask(self.membership.asked) else None

    # -- calls outside of steps --------------------------------------------------------------------------------------

    def together(self, call: Callable[[], T], undo: Callable[[T], Any] = lambda result: None) -> T:
        """Makes a call that all ranks make, again and again until all who are left have its result.

        undo: takes back a result that does not count, of which the others are to see nothing when they go on.
        """
        if self.in_call is not None:
            return call()
        self.in_call, self._done = self.optimizer._step, False
        try:
            self.rejoin()
            if self.next is not None:
                raise RuntimeError(
                    f"worker {self.membership.me} makes a call of all workers at step {self.in_call}, and the others"
                    f" are at step {self.resumes}: they are past it"
                )
            while True:
                self.has_result = False
                try:
                    result = call()
                    self.has_result, self.take_back = True, partial(undo, result)
                    self.optimizer._engine.place.confirm()
                except ExchangeError as error:
                    if not error.lost:
                        raise
                    if not (self.recover(error) and self.has_result):
                        continue
                self.calls += 1
                self.take_back = None
                return result
        finally:
            self._take_back()
            self.in_call = None

    def _take_back(self) -> None:
        undo, self.take_back, self.has_result = self.take_back, None, False
        if undo is not None:
            undo()

    # -- a loss ------------------------------------------------------------------------------------------------------

    def recover(self, error: ExchangeError) -> bool:
        """In a call: until this worker goes on, or is to catch up. Returns whether the call is done for all."""
        self._give_up(error)
        done = self._agree()
        if not done:
            self._take_back()
        if self._is_there:
            self._go_on()
        return done

    def rejoin(self) -> None:
        """Before a step, or a call, what was lost in the last one is made up for.

        Not at once: between a step and the calls that the script makes after it there is no place for a newcomer, whose
        loop begins with a step.
        """
        if self.lost is not None:
            self._agree()
        if self.next is not None and self._is_there:
            self._go_on()

    @property
    def _stands_at(self) -> int:
        """A call may change the step, as loading a checkpoint does."""
        return self.optimizer._step if self.in_call is None or self._done else self.in_call

    @property
    def _is_there(self) -> bool:
        """Whether this worker has caught up with those who are foremost. Who takes another's state is where that is."""
        there = self.resumes, self.membership.view.taken
        return self.empty or (self._stands_at, self.optimizer._taken) >= there

    def _accused(self, error: ExchangeError) -> tuple[int, ...]:
        """The workers for which this one has waited `timeout` in vain. A closed connection accuses nobody."""
        members = self.membership.view.members
        if not error.silent:
            return ()
        return tuple(members) if error.peer is None else (members[error.peer],)

    def _give_up(self, error: ExchangeError) -> None:
        """From here on this worker is alone, and who waits for it learns of it."""
        if self.lost is None:
            self._since = time.monotonic(), time.process_time(), str(error)
        self.lost, self.told, self._admits_from = self._accused(error), None, None
        pending, self.next = self.next, None
        if pending is not None:  # it was catching up, and another was lost
            pending.abandon()
        place = self.optimizer._engine.place
        regroup.isolate(self.optimizer._engine)
        self.optimizer._pause()
        mixed_precision.alone(self.optimizer)
        generation.leave(error, place)

    def _agree(self) -> bool:
        """Until the groups of a generation stand. Returns whether the present call is done for all."""
        membership, accused, done, futile = self.membership, self.lost or (), False, 0
        while True:
            before = membership.view.members
            arrival = Arrival(
                membership.me, membership.beacon.address, self._stands_at, self.calls, self.has_result,
                self.in_call is not None, (*accused, *membership.suspects), self.optimizer._step, self.optimizer._taken,
            )  # fmt: skip
            try:
                if self.empty:  # a member without a state would go on with its own
                    raise Excluded(f"worker {membership.me} was let in, and a worker was lost before it had its state")
                view = membership.agree(arrival)
                self._done = done = done or self._is_done(view)
            except Excluded as error:
                view = self._come_back(error)
            try:
                generation.form(membership)
                self.next = self.optimizer._connect(membership)
                break
            except ExchangeError as error:
                log.info("another worker was lost: %s", error)
                accused = self._accused(error)
                generation.leave(error)
                futile = futile + 1 if view.members == before else 0
                if futile == FUTILE:
                    raise RunEnded(
                        f"worker {membership.me}: workers {view.members} are all there, and their groups could not be"
                        f" built {FUTILE} times in a row: {error}"
                    ) from None
        membership.suspects.clear()
        self.lost, self.resumes = None, view.step
        start, cpu, why = self._since
        self.events.append(
            {
                "generation": view.generation, "members": view.members, "why": why, "began": start,
                "seconds": time.monotonic() - start, "cpu": time.process_time() - cpu, "step": self.resumes,
            }
        )  # fmt: skip
        return done

    def _is_done(self, view: View) -> bool:
        if self.in_call is None:
            return False
        others = view.arrivals
        return any(a.calls > self.calls for a in others) or all(a.has_result for a in others if a.calls == self.calls)

    def _come_back(self, error: Excluded) -> View:
        """The others went on while this worker was silent: it comes as a newcomer, with their state and step."""
        if self.membership.machines or self.in_call is not None:  # nobody comes to machines, or into a call
            raise error
        log.warning("%s. It asks to be let in again, and takes the others' state", error)
        view = self.membership.enter()
        self.calls = max((arrival.calls for arrival in view.arrivals), default=self.calls)
        self.empty = self._stale = True
        self.optimizer._set_step(view.step)
        self.optimizer.zero_grad()  # of parameters that it will not have any more
        return view

    # -- going on ----------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """All are at the same step: the first in the new place."""
        optimizer, engine = self.optimizer, self.optimizer._engine
        while True:
            place, view = self.next, self.membership.view
            assert place is not None
            try:
                catching_up.wait(self.membership)
                self.next = None
                graph = self.graphs(place.workers.size)
                regroup.enter(engine, place, graph)
                place.workers.numbers = place.inside.numbers = view.members
                new = [view.rank(number) for number in view.new]
                if new:
                    optimizer._compare(place, self.membership)
                if optimizer._begins:
                    regroup.meet_anchors(engine)
                regroup.settle(engine, new)
                for rank in new:
                    optimizer._copy_rest(regroup.left_of(rank, new, place.workers.size), rank)
                optimizer._share_rest()
                break
            except ExchangeError as error:
                self._give_up(error)
                self._agree()
                if not self._is_there:
                    return
        self.empty = False
        if optimizer._begins:
            regroup.meet_anchors(engine, back=True)
        optimizer._resume(graph)
        self._tries = (self._tries + 1) % TRIES if view.asked else 0
        if self._tries:  # after the call in which some were, all with the same step
            self._admits_from = 1 + max(arrival.calls for arrival in view.arrivals if arrival.in_call)
            optimizer._pause()  # nothing leaves in the backward pass: that step's members are agreed on when it begins
        engine.stale, self._stale = self._stale, False
        if self.events:
            start, cpu, _ = self._since
            self.events[-1].update(seconds=time.monotonic() - start, cpu=time.process_time() - cpu)
        lost = tuple(number for number in self.members if number not in view.members)
        came = tuple(number for number in view.members if number not in self.members)
        self.members = view.members
        self._tell(graph.name, lost, came)
        self._news = Members(view.members, lost, came, view.step)
        if not self.came:  # else in the first step: the script has no optimizer yet
            self._announce()

    def _announce(self) -> None:
        news, self._news = self._news, None
        if news is None or self.chosen.on_members_changed is None:
            return
        self.announces = True
        try:
            with torch.enable_grad():
                self.chosen.on_members_changed(news)
        finally:
            self.announces = False

    def _tell(self, graph: str, lost: tuple[int, ...], came: tuple[int, ...]) -> None:
        view = self.membership.view
        parts = [f"lost {listed(lost, what='worker')}"] if lost else []
        parts += [f"{listed(came, what='worker')} came"] if came else []
        seconds = f" after {self.events[-1]['seconds']:.2f} s" if self.events else ""
        log.warning(
            "worker %d, now rank %d of %d: %s; going on at step %d over %s%s",
            self.membership.me, view.rank(self.membership.me), len(view.members),
            " and ".join(parts) or "no worker was lost, connections were", view.step, graph, seconds,
        )  # fmt: skip
