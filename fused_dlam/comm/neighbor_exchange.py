"""`neighbor_exchange`: a weighted sum with neighbors that each rank names for itself, with any weights."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist

from .linear import Exchange, exchanged, gradients, refuse_gradient
from .links import Links
from .packing import averaged, device_of, shapes, types
from .party import Party, connect, named
from .place import layout

NAME = "neighbor_exchange"


def neighbor_exchange(
    x: Any,
    sources: Mapping[int, float] | Iterable[int],
    destinations: Mapping[int, float] | Iterable[int] = (),
    self_weight: float | None = None,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
    *,
    check: bool = True,
    async_op: bool = False,
) -> Any:
    """self_weight x + sum over sources j of weight_j (scale x)_j, where (scale x)_j is what rank j sends here.

    What each rank knows of itself is enough, and nothing need sum to one: columns, sums, negative weights. All ranks of
    the group call it, those without neighbors too. Ranks are numbers inside `group`: 0 to its size - 1.

    Args:
        x: a floating-point or complex tensor, or a list or tuple of them, which travel in one message.
        sources: {rank: weight}, or ranks: then each has the weight 1/(their number + 1). The rank itself is none.
        destinations: {rank: scale}, or ranks: then x is sent as it is. What is scaled is rounded to x's type once more.
        self_weight: None stands for one minus the sum of the weights of `sources`.
        check: the ranks first tell each other what they were given, in one small all-gather. Where two contradict each
            other all ranks raise the same ValueError, and nothing is sent. Without it a contradiction is a deadline.
        group, timeout, async_op: see `neighbor_allreduce`, as for types, roundings and gradients: the gradient goes
            back from each rank to its sources, scaled by their weights.

    A value of weight or scale zero is sent, and not used: 0 times what is not finite is 0.

    Raises TypeError for an x that `neighbor_allreduce` refuses; ValueError, on all ranks if check=True, for a rank that
    is not in the group, is named twice, or names itself, for a weight that is not a finite real number, for shapes,
    types or gradients that differ between neighbors, and if only one of two says that they exchange; ExchangeError if a
    peer does not answer, after which the next call connects anew.
    """
    tensors = averaged(x, NAME)
    if async_op:
        refuse_gradient(tensors, NAME)
    found = layout(group, False)
    me = dist.get_rank(group) if found.size > 1 else 0
    links, problem = None, ""
    try:
        links = _links(sources, destinations, self_weight, found.size, me)
    except ValueError as error:
        problem = str(error)
        if not check or found.size == 1:
            raise ValueError(f"neighbor_exchange(): {problem}") from None
    with named(NAME):
        party = connect(found, device_of(tensors), timeout)
        if check and found.size > 1:
            into = () if links is None else tuple(j for j, _ in links.sources)
            out = () if links is None else tuple(i for i, _ in links.destinations)
            _compare(party, _Says(me, problem, into, out, shapes(tensors), types(tensors), gradients(tensors)))
        assert links is not None
        return exchanged(x, tensors, Exchange(NAME, found, timeout, links), async_op)


def _links(sources: Any, destinations: Any, self_weight: Any, size: int, me: int) -> Links:
    into = _numbered("sources", sources, size, me)
    out = _numbered("destinations", destinations, size, me)
    each = 1 / (len(into) + 1)
    own = None if self_weight is None else _real("self_weight", self_weight)
    return Links(
        own,
        tuple((j, each if w is None else w) for j, w in sorted(into.items())),
        tuple((i, 1.0 if c is None else c) for i, c in sorted(out.items())),
    )


def _numbered(what: str, given: Any, size: int, me: int) -> dict[int, float | None]:
    """{rank: number}, or None in the number's place where there is none."""
    pairs: list[tuple[Any, float | None]]
    if isinstance(given, Mapping):
        pairs = [(rank, _real(f"{what}[{rank!r}]", number)) for rank, number in given.items()]
    else:
        try:
            pairs = [(rank, None) for rank in given]
        except TypeError:
            raise ValueError(f"{what} must be ranks, or {{rank: number}}, not {given!r}") from None
    out: dict[int, float | None] = {}
    for rank, number in pairs:
        try:
            j = operator.index(rank)
        except TypeError:
            raise ValueError(f"{what} has {rank!r}, which is no rank") from None
        if not 0 <= j < size:
            raise ValueError(f"{what} has rank {j}, and the group has ranks 0 to {size - 1}")
        if j == me:
            raise ValueError(f"{what} has rank {j}, which is this rank itself: its own share is self_weight")
        if j in out:
            raise ValueError(f"{what} has rank {j} twice")
        out[j] = number
    return out


def _real(what: str, number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise ValueError(f"{what} must be a finite real number, not {number!r}")
    return float(number)


class _Says(NamedTuple):
    """What a rank was given."""

    rank: int
    problem: str
    sources: tuple[int, ...]
    destinations: tuple[int, ...]
    shapes: str
    types: str
    gradients: str


def _compare(party: Party, mine: _Says) -> None:
    """Raises the same ValueError on all ranks where what they say does not fit together."""
    said = party.gathered(NAME, tuple(mine), "comparing who exchanges with whom")
    ranks = sorted(_Says(*words) for words in said.values())
    wrong = [f"rank {r.rank}: {r.problem}" for r in ranks if r.problem]
    if not wrong:
        wrong = _contradictions(ranks)
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"neighbor_exchange(): {'; '.join(wrong[:8])}{more}. Nothing was sent")


def _contradictions(ranks: list[_Says]) -> list[str]:
    wrong = []
    for r in ranks:
        for i in r.destinations:
            if r.rank not in ranks[i].sources:
                wrong.append(f"rank {r.rank} sends to rank {i}, and rank {i} does not list it as a source")
            else:
                for mine, other in ((r.shapes, ranks[i].shapes), (r.types, ranks[i].types)):
                    if mine != other:
                        wrong.append(f"rank {r.rank} sends {mine} to rank {i}, whose own is {other}")
        for j in r.sources:
            if r.rank not in ranks[j].destinations:
                wrong.append(f"rank {r.rank} lists rank {j} as a source, and rank {j} does not send to it")
    if not wrong:  # all ranks make the exchange in the backward pass
        wrong = [
            f"gradients flow through what rank {r.rank} passes as {r.gradients}, and rank 0's as {ranks[0].gradients}"
            for r in ranks
            if r.gradients != ranks[0].gradients
        ]
    return wrong
