"""`Gossip`'s steps around an outer method: H inner ones, then an exchange (rounds.py has the equations)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..comm.errors import ExchangeError, calling
from ..engine.anchored import AnchoredBucket
from ..engine.health import Health
from ..engine.message import Message
from .frozen import Frozen
from .joining_rounds import JoiningRounds
from .options import Options
from .rounds import COUNTS, EVERY, MEMORY, OUTER, Rounds, check_every


class OuterSteps(JoiningRounds):
    """The part of a `Gossip` that has rounds."""

    _rounds: Rounds | None
    _stepped: int | None
    _loss: Any
    _options: Options
    _frozen: Frozen
    _health: Health
    _thaw: Callable[[], None]
    _local_step: Callable[[Any, bool, bool], Any]
    _overflowed: Callable[[], bool]

    @property
    def every(self) -> int:
        """H, inner steps between two exchanges. May be set between any two steps: to the same on all ranks, or with
        `local_steps=True` to any on each."""
        return 1 if self._rounds is None else self._rounds.every

    @every.setter
    def every(self, every: int) -> None:
        if self._rounds is None:
            if check_every(every) != 1:
                raise ValueError("every= was 1 at construction, without outer=: build with the number that is meant")
            return
        self._rounds.every = check_every(every)
        self._rounds.note(self.param_groups)

    @property
    def steps_done(self) -> int:
        """Steps that have been taken, inner ones too. A worker that comes to a run that is under way begins its loop
        there."""
        return self._step if self._rounds is None else self._rounds.batches

    @property
    def _begins(self) -> bool:  # type: ignore[override]
        return self._rounds is not None and self._rounds.taken == 0

    @property
    def _taken(self) -> int:  # type: ignore[override]
        return 0 if self._rounds is None or self._rounds.unequal else self._rounds.taken

    _anew = False  # whether the next step begins a round because `synchronize` has ended one

    def synchronize(self) -> None:
        """Ends what was started for the next exchange and drops it, so that parameters may be changed. On all ranks.

        With every=H the round ends too, without an exchange: the next step begins one at the parameters as they are
        then, what a script loads included. Where ways are averaged by all-reduce (DiLoCo) it begins at their mean.
        """
        super().synchronize()
        if self._rounds is not None:
            self._rounds.begin_anew(self.param_groups)
            self._anew, self._stepped, self._loss = True, None, None

    @property
    def _moment(self) -> Any:
        """A name of the next step: inner ones have the number of one exchange."""
        return self._step if self._rounds is None else (self._step, self._rounds.batches)

    @property
    def _position(self) -> str:
        if self._rounds is None or self._rounds.unequal:
            return super()._position
        return f"step {self._rounds.batches} (exchange {self._step})"

    def _inner_step(self, closure: Callable[[], Any] | None, gradients: bool = True) -> Any:
        """One within a round. Nothing is waited for, and nothing leaves but a part of x."""
        rounds, engine = self._rounds, self._engine
        assert rounds is not None
        loss = self._advance_inner(closure, gradients)
        rounds.note(self.param_groups)
        try:
            engine.ahead.send(rounds.share)
        except ExchangeError as error:
            if self._recovery is None or not error.lost:
                raise
            self._recovery.hold(error)
        return loss

    def _advance_inner(self, closure: Callable[[], Any] | None, gradients: bool) -> Any:
        rounds = self._rounds
        assert rounds is not None
        skip = self._ready(gradients)
        if rounds.taken == 0:
            self._start_round()
        loss = self._local_step(closure, gradients, skip)
        rounds.step((gradients or self._machine_steps) and not skip)
        return loss

    def _ready(self, gradients: bool) -> bool:
        """Before the inner optimizer's step, of any kind. Returns whether it is left out."""
        skip = self._overflow_elsewhere
        if gradients:
            self._look_for_gradients()
            self._take_part(True, scaled=getattr(self, "found_inf", None) is not None)
            skip = self._overflowed()
        self._thaw()
        self._engine.refresh()
        return skip

    def _start_round(self) -> None:
        """What a script has written into parameters between two rounds counts as theirs, and not as a way gone."""
        engine, workers = self._engine, self._engine.place.workers
        sent = {index for index, flight in engine.flights.items() if flight.message is not None}
        for b in engine.buckets:
            assert isinstance(b, AnchoredBucket)
            if b.index not in sent:
                b.anchor()
                engine.ahead.rewrite(b)
                if self._anew and engine.message is Message.GRADIENT:  # what averages ways alone must begin as one
                    workers.finite_mean(b.x)
                    b.publish()
            elif b.moved():
                raise RuntimeError(
                    "a parameter was changed between two rounds, while the x that it began with was being sent"
                    " (schedule='awc'). Call optimizer.synchronize() on all ranks before changing parameters, for"
                    " instance before model.load_state_dict()."
                )
        self._anew = False

    def _end_round(self, closure: Callable[[], Any] | None, gradients: bool = True) -> Any:
        """The round's last inner step, and its exchange. Called again when that failed it goes on, alone."""
        with calling("step() that ends a round"):
            return self._last_step_and_exchange(closure, gradients)

    def _last_step_and_exchange(self, closure: Callable[[], Any] | None, gradients: bool) -> Any:
        engine, rounds, groups = self._engine, self._rounds, self.param_groups
        assert rounds is not None
        if self._stepped != self._step:
            self._loss = self._advance_inner(closure, gradients)
            self._stepped = self._step
        engine.check_whole()
        rounds.agree(engine, self._step, self._joining, groups)
        if engine.step is None:  # else an attempt at this exchange raised: it goes on from there
            rounds.begin(engine, self._step, groups, self._options.compress)
        for b in engine.buckets if engine.message is Message.GRADIENT else ():
            assert isinstance(b, AnchoredBucket)
            b.travel(rounds.weight)
        self._health.look(self._step)
        engine.complete(1 / rounds.every if engine.message.leaves_early else 0.0)
        rounds.end(groups)
        for group in groups:
            group["gossip_step"] += 1
        rounds.note(groups)
        loss, self._loss, self._stepped = self._loss, None, None
        return loss

    def _enter_round(self, group: dict[str, Any]) -> None:
        """A new group's entries."""
        rounds = self._rounds
        if rounds is not None:
            group.update({**rounds.entries, **{k: group[k] for k in rounds.entries if k in group}})
            group[MEMORY] = {}
            rounds.note([group])
            of = rounds.settings_of(group)
            rounds.check(of)
            rounds.certificate.check(of)


def forget_rounds(group: dict[str, Any]) -> None:
    """Takes out of a group what a run in rounds has left there: another optimizer's, or a checkpoint's."""
    if "gossip_outer" in group:
        group["gossip_step"] = group.get("gossip_batches", 0)  # a step is a batch again
        for name in [name for name in group if name.startswith(OUTER) or name in (*COUNTS, EVERY, "gossip_outer")]:
            del group[name]
