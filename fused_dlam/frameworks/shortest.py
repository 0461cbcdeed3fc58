"""Training data that end on all ranks when they end on one: all must call step() equally often."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

log = logging.getLogger("fused_dlam")


class Shortest:
    """A dataloader around another one. Its attributes are the other's.

    Where all ranks know how many batches they have, the smallest number is agreed on once. Else ranks ask each other
    before every batch, an all-reduce of one number, and all stop when one has none.
    """

    def __init__(self, loader: Any, on_all: Callable[[bool], bool], batches: int | None):
        vars(self).update(_loader=loader, _on_all=on_all, _batches=batches)

    @staticmethod
    def of(loader: Any, on_all: Callable[[bool], bool], smallest: Callable[[int], int]) -> Any:
        """The loader itself if it has equally many batches on all ranks. All ranks must call it.

        Args:
            on_all: whether something is so on all ranks.
            smallest: the smallest of all ranks' numbers.
        """
        own = _batches_of(loader)
        if not on_all(own is not None):
            return Shortest(loader, on_all, None)
        assert own is not None
        least = smallest(own)
        if on_all(own == least):
            return loader
        if own > least:
            log.warning(
                "this rank has %d batches, another one %d: all stop there, in every epoch. A DistributedSampler, or an"
                " equal share for every rank, leaves nothing out",
                own, least,
            )  # fmt: skip
        return Shortest(loader, on_all, least)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        if self._batches is not None:
            seen = 0
            for batch in islice(batches, self._batches):
                seen += 1
                yield batch
            if seen < self._batches:
                raise RuntimeError(
                    f"the dataloader has {seen} batches, though it said that it had {_batches_of(self._loader)}: other"
                    " ranks count on that. Correct its length, or let it have none"
                )
            return
        nothing = object()
        while self._on_all((batch := next(batches, nothing)) is not nothing):
            yield batch

    def __len__(self) -> int:
        if self._batches is None:
            raise TypeError("a dataloader that has no length on some rank")
        return self._batches

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # in a copy that is being made
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._loader, name, value)


def _batches_of(loader: Any) -> int | None:
    """How many batches a loader has, None if it does not know: a stream's length is a guess."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
