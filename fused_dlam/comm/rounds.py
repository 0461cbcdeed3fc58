"""One exchange of a list of tensors: started, waited for, combined; and the `Handle` of one that is under way.

flat buffers   mean inside the machine, this rank's part of it   where machines are workers
send           one message to each destination, or an all-reduce where W = J
arrive         the host waits for what the neighbors sent, and until its own has gone
combine        y = W x
gather         the parts of a machine's ranks, each of which has combined its own
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import ExchangeError
from .links import Links, combined, times
from .packing import Bundle, as_bytes, from_bytes, wide
from .party import Party, named
from .transfer import Mean, Transfer
from .waiter import Orphan
from .watch import log


class Round:
    """One exchange, under way from its construction on.

    Args:
        tag: of its messages, the same on all ranks that exchange.
        kept: the tensors may change before it is over, so they are copied.
    """

    def __init__(
        self,
        party: Party,
        tensors: Sequence[torch.Tensor],
        links: Links,
        step: int | None,
        tag: int,
        kept: bool = False,
    ):
        self.party, self.links, self.step = party, links, step
        self._bundle, place = Bundle(tensors), party.place
        self._whole = [self._inside(flat) for flat in self._bundle.flats] if place.parts > 1 else []
        self._flats = [place.part(flat) for flat in self._whole] or self._bundle.flats
        self._means: list[tuple[torch.Tensor, Mean]] = []
        self._transfer: Transfer | None = None
        self._rows: list[torch.Tensor] = []
        if links.mean:
            for flat in self._flats:
                mean = flat.to(wide(flat.dtype), copy=True)
                self._means.append((mean, Mean(party.workers, mean, step, party.workers.control)))
            return
        if kept and not self._whole:
            self._flats = [flat.clone() for flat in self._flats]
        if links.sources or links.destinations:  # one without neighbors sends nothing, but has its own share to come
            self._send(tag)

    def _inside(self, flat: torch.Tensor) -> torch.Tensor:
        """The mean over the machine's ranks, with zeros at its end so that it has a part for each of them."""
        inside = self.party.place.inside
        whole = flat.new_zeros(-(-flat.numel() // inside.size) * inside.size, dtype=wide(flat.dtype))
        whole[: flat.numel()] = flat
        if flat.numel():
            inside.mean(whole, self.step)
        return whole.to(flat.dtype)

    def _send(self, tag: int) -> None:
        message, links = as_bytes(self._flats), self.links
        self._rows = [torch.empty_like(message) for _ in links.sources]
        self._transfer = Transfer(self.party.workers, self._rows, links.peers, self.step, tag)
        scaled = {c: as_bytes([times(flat, c) for flat in self._flats]) for _, c in links.destinations if c != 1}
        self._transfer.send([scaled.get(c, message) for _, c in links.destinations])

    @property
    def arrived(self) -> bool | None:
        """Whether the host would not wait any more; None where only a wait tells."""
        if self._transfer is not None:
            return self._transfer.arrived
        return all(mean.arrived for _, mean in self._means)

    def arrive(self) -> None:
        """Until the messages are here and the own ones have gone."""
        if self._transfer is not None:
            self._transfer.wait_delivered()
            self._transfer.wait_sent()

    def finish(self) -> list[torch.Tensor]:
        """y = W x, each tensor with memory of its own."""
        self.arrive()
        place = self.party.place
        if self.links.mean:
            for _, mean in self._means:
                mean.wait_received()
            flats = [mean.to(flat.dtype) for flat, (mean, _) in zip(self._flats, self._means, strict=True)]
        else:
            if self._transfer is not None:
                self._transfer.wait_received()
            received = [from_bytes(row, self._flats) for row in self._rows]
            flats = [combined(flat, [row[k] for row in received], self.links) for k, flat in enumerate(self._flats)]
        for whole, part in zip(self._whole, flats, strict=bool(self._whole)):
            if whole.numel():
                place.part(whole).copy_(part)
                place.gather(whole, self.step)
        if self._whole:
            flats = [whole[: flat.numel()] for whole, flat in zip(self._whole, self._bundle.flats, strict=True)]
        return self._bundle.opened(flats)

    def abandon(self) -> None:
        """Until it is over, for nobody. On another thread, so nothing is launched on a device but copies."""
        self.arrive()
        for _, mean in self._means:
            mean.wait_received()


class Handle:
    """An exchange under way, whose tensors may change at once: `wait()` returns what the call would have returned.

    One whose result nobody asks for is finished in the background: its messages are taken and given as they must be,
    and later calls are not concerned. Where that fails a warning says so, and the next call connects anew.
    """

    def __init__(self, call: str, party: Party, round: Round, give: Callable[[list[torch.Tensor]], Any]):
        self._call, self._party, self._round, self._give = call, party, round, give
        self._waiting: Orphan | None = None
        self._result: Any = None
        self._error: ExchangeError | None = None
        self._over = False
        if party.workers.size > 1:
            party.waiter  # noqa: B018 -- its thread starts now: in a collection none can be started

    def __repr__(self) -> str:
        return f"<{self._call}(), {'waited for' if self._over else 'under way'}>"

    @property
    def done(self) -> bool:
        """Whether `wait()` would return, or raise, without waiting for another rank."""
        if self._over:
            return True
        arrived = self._round.arrived
        if arrived is not None and self._waiting is None:
            return arrived
        self._hand_over(asked=True)
        assert self._waiting is not None
        return self._waiting.done.is_set()

    def wait(self) -> Any:
        """The result, the same at every call.

        Raises ExchangeError, which names the call, if a peer does not answer within `timeout` seconds from here on.
        """
        if not self._over:
            try:
                self._result = self._give(self._finished())
            except ExchangeError as error:
                self._error = error
            self._over = True
            del self._round, self._give
        if self._error is not None:
            raise self._error
        return self._result

    def _finished(self) -> list[torch.Tensor]:
        workers = self._party.workers
        with named(self._call, self._round.step), workers.placed():
            if self._waiting is not None:
                with workers.watched("waiting for the neighbors' messages", self._round.step, counts=False):
                    if not self._waiting.within(self._party.timeout):
                        raise RuntimeError(f"Timed out waiting {self._party.timeout:g}s for messages")
            return self._round.finish()

    def _hand_over(self, asked: bool) -> None:
        """Lets another thread wait."""
        if self._waiting is None:
            holdings = self._party.workers.holdings
            work = _Background(self._call, self._round, asked)
            self._waiting = self._party.waiter.take([work], posted=None if holdings is None else holdings.posted)

    def __del__(self) -> None:
        over = getattr(self, "_over", True)  # built in part, if there was an error
        if not over and self._party.workers.backend == "gloo" and not sys.is_finalizing():
            self._hand_over(asked=False)


class _Background:
    """What a thread waits for in the place of one of torch's works."""

    def __init__(self, call: str, round: Round, asked: bool):
        self._call, self._round, self._asked = call, round, asked

    def wait(self) -> None:
        try:
            with named(self._call, self._round.step):
                self._round.arrive() if self._asked else self._round.abandon()
        except ExchangeError as error:
            if not self._asked:
                log.warning("an exchange whose result nobody waited for failed: %s", error)
            raise
