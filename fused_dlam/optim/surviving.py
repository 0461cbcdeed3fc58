"""The part of an optimizer that lives on when its neighbors change: what recovery.py asks of both optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..comm import generation, sharded
from ..comm.errors import ExchangeError, calling, current_call
from ..comm.membership import Membership
from ..comm.place import Layout, Place, layout
from ..topology import Topology
from .finishing import finish
from .frozen import writable
from .recovery import Recovery
from .succession import Succession
from .survival import Survival, come_in, opened

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from .frozen import Frozen
    from .options import Options

T = TypeVar("T")


class Surviving:
    """Who trains, and how another place is taken."""

    _recovery: Recovery | None = None  # with on_failure="continue"
    _begins = False  # whether the next step is the first of a round, and parameters are where x is
    _taken = 0  # in rounds: steps of the present one, alike on all ranks between two calls of step()
    _comes = False  # whether this worker comes to a run that is under way, and has not taken its state yet

    if TYPE_CHECKING:
        param_groups: list[dict[str, Any]]
        _frozen: Frozen
        _place_options: tuple[Any, float, str]
        _options: Options

        @property
        def _engine(self) -> Engine: ...
        @property
        def _step(self) -> int: ...

        def _resume(self, graph: Topology) -> None: ...
        def _set_step(self, step: int) -> None: ...
        def _rest(self) -> Any: ...
        def _take_rest(self, rest: Any) -> None: ...

    @property
    def steps_done(self) -> int:
        """Steps that have been taken. A worker that comes to a run that is under way begins its loop there."""
        return self._step

    @property
    def members(self) -> tuple[int, ...]:
        """The workers that train, in the order of their ranks: the rank of each at the start, or a newcomer's number.

        It changes with on_failure="continue" alone, after equally many steps on all of them.
        """
        if self._recovery is not None:
            return self._recovery.members
        return tuple(range(self._engine.place.workers.size))

    def finish(self) -> None:
        """At the end of training: stays until all workers are through, or gone. One that is lost holds nobody
        up, nor does one that does not answer for `timeout` seconds.

        With on_failure="raise" it returns at once. Not needed where the script ends with its loop.
        """
        if self._recovery is not None:
            finish(self._recovery)

    # -- what recovery.py asks for -----------------------------------------------------------------------------------

    def _together(self, call: Callable[[], T], undo: Callable[[T], Any] = lambda result: None) -> T:
        """A call that all ranks make: its result for all of them, also if one is lost in it. undo: takes one back."""
        if self._recovery is None:
            return call()
        if self._recovery.announces:
            raise RuntimeError(
                f"{current_call()} was called within on_members_changed, which is called in the midst of another call"
                " and makes none of all workers: let it set what the loop looks at"
            )
        if self._just_came:
            raise RuntimeError(
                f"this worker came to a run that is under way, at step {self._step}, and makes a call of all workers"
                f" ({current_call()}) before its first step there, while the others take that step: make it after"
                " step() in the loop, and what comes before the loop `if optimizer.steps_done == 0`"
            )
        return self._recovery.together(call, undo)

    def _exchange(self, advance: Callable[[], T]) -> T:
        """A step."""
        return advance() if self._recovery is None else self._recovery.step(advance)

    def _connect(self, membership: Membership) -> Place:
        """The groups of a new world, under a name that all its ranks know."""
        hierarchical, timeout, _ = self._place_options
        name = f"generation {membership.view.generation}"
        with calling(f"forming {name}"):  # no step: nothing is torn where it fails
            where, what = layout(None, hierarchical), f"groups of {name}"
            return where.connect(self._everything, timeout, False, what, name, membership.gone)

    @property
    def _everything(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _first_place(self, where: Layout, membership: Membership | None, advise: bool) -> Place:
        """In the constructor: the groups. A newcomer, if another is lost meanwhile, asks once more."""
        if not self._comes or membership is None:
            _, timeout, what = self._place_options
            lookout = None if membership is None else membership.gone
            return where.connect(self._everything, timeout, advise, what, "", lookout)
        while True:
            try:
                return self._connect(membership)
            except ExchangeError as error:
                if not error.lost:
                    raise
                generation.leave(error)
                come_in(membership)

    def _survive(self, survival: Survival, membership: Membership | None, graphs: Succession | None) -> None:
        """At the end of the constructor."""
        if membership is not None or not self._engine.place.alone:
            opened(self)  # type: ignore[arg-type]
        if membership is None or graphs is None:
            return
        self._recovery = Recovery(self, survival, membership, graphs)  # type: ignore[arg-type]
        self._tells(self._recovery.hold)
        membership.busy = True
        if self._comes:
            self._recovery.arrive(self._engine.place)
            self._comes = False
        else:
            place = self._engine.place
            place.workers.generation = place.inside.generation = ""  # no notes on who went first: that is agreed on
            membership.meet()
            graphs.look_ahead(self._engine.topology.n)

    @property
    def _just_came(self) -> bool:
        """Whether this worker came to a run that was under way, and has taken no step there yet."""
        return self._recovery is not None and self._recovery.came

    @property
    def _unsettled(self) -> bool:
        """Whether it is step() alone that knows who takes part in this step."""
        r = self._recovery
        return r is not None and (r.lost is not None or r.next is not None or r.admits or r.came)

    def _gone(self) -> str:
        """Why nobody should wait for all ranks any more, "" if nothing is known."""
        return "" if self._recovery is None else self._recovery.membership.gone()

    def _tells(self, hold: Callable[[ExchangeError], None]) -> None:
        """Hands errors of the backward pass to `hold`."""

    def _pause(self) -> None:
        """There are no neighbors for now."""

    def _facts(self) -> dict[str, str]:
        """What a newcomer must have in common with those to whom it comes."""
        engine = self._engine
        buckets = [(b.group, b.N, str(b.x.dtype), [tuple(s.p.shape) for s in b.slots]) for b in engine.buckets]
        return {
            "optimizer": type(self).__name__,
            "method": engine.rule.name,
            "schedule": engine.message.name,
            "topology": engine.topology.fingerprint,
            "layers": str([str(layer) for layer in engine.layers]),
            "layout of parameters": str(buckets),
            **self._options.facts(),
        }

    def _compare(self, place: Place, membership: Membership) -> None:
        """A newcomer that trains something else is not let in. Raises ValueError there, ExchangeError elsewhere."""
        view = membership.view
        facts = place.workers.gathered(self._facts(), "comparing what newcomers train")
        own = next(theirs for number, theirs in zip(view.members, facts, strict=True) if number not in view.new)
        for number, theirs in zip(view.members, facts, strict=True):
            differing = [name for name in own if theirs.get(name) != own[name]]
            if differing and number == membership.me:
                membership.close()  # counts as gone at once
                raise ValueError(
                    f"this worker comes to a run of another {differing[0]}: here {theirs.get(differing[0])}, there"
                    f" {own[differing[0]]}. Start it with the same script"
                )
            if differing:
                raise ExchangeError(f"worker {number}, which came, has another {differing[0]} and is not let in")

    @torch.no_grad()
    def _copy_rest(self, source: int, to: int) -> None:
        """A newcomer takes what is not in flat buffers: frozen parameters, and what the method remembers."""
        workers = self._engine.place.workers
        for p in (p for params in self._frozen.of_groups for p in params):
            workers.copy(writable(p) if workers.rank == to else sharded.local(p), source, to)
        rest = workers.copy_object(self._rest() if workers.rank == source else None, source, to)
        if workers.rank == to:
            self._take_rest(rest)

    @torch.no_grad()
    def _share_rest(self) -> None:
        """Ranks whose gradients are averaged step alike, and have ended the broken step each with its own: what is not
        in flat buffers becomes that of the first, as `regroup.settle` makes what is. Where ways are averaged, when a
        round ends, each steps by itself, and its inner optimizer's state and place in the round are its own.
        """
        if self._engine.steps_alone:
            return
        group = self._engine.averager
        for to in range(1, group.size):
            rest = group.copy_object(self._rest() if group.rank == 0 else None, 0, to)
            if group.rank == to:
                self._take_rest(rest)
