"""`pair_average`: the mean of two ranks, who name each other."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch
import torch.distributed as dist

from ..topology import Peers
from .linear import Exchange, gradients, mixed
from .lines import Line, connect, named
from .links import Links
from .packing import alike, averaged, device_of, shapes, types
from .place import layout
from .transfer import Transfer

NAME = "pair_average"
HEADER = 512  # bytes: a hash of what a rank brings, and as much of it in words as there is room for


def pair_average(
    tensor: Any, partner: int | None, group: dist.ProcessGroup | None = None, timeout: float = 600.0
) -> Any:
    """(x + x_partner) / 2: a new tensor, with the same bits on both ranks.

    Args:
        tensor: a floating-point or complex tensor, or a list or tuple of them, which travel in one message.
        partner: the other's number inside `group`; it must call with this rank's. None: this rank sits out, and gets a
            copy.
        group: the process group; default: all ranks. At the first call in a group, whichever function it is, all its
            ranks connect, so all must make one (None will do); after that a pair needs nobody else.
        timeout: seconds a wait may take, fixed by the first call in a group.

    The two first tell each other shapes and types, in a small message. Differentiable as `neighbor_allreduce` is: both
    make the exchange in the backward pass.

    Raises TypeError for what `neighbor_allreduce` refuses; ValueError for a partner that is not in the group, or this
    rank itself, and on both ranks if shapes, types or gradients differ; ExchangeError if the partner does not answer.
    After an error the next call connects anew, which takes all ranks again: those that did not see it learn of it when
    they next meet one that did, by an error of their own.
    """
    tensors = averaged(tensor, NAME)
    found = layout(group, False)
    me = dist.get_rank(group) if found.size > 1 else 0
    if partner is not None:
        partner = _checked(partner, found.size, me)
    with named(NAME):
        line = connect(found, device_of(tensors), timeout)
        if partner is None:
            return alike(tensor, [t.clone() for t in tensors])
        facts = f"{shapes(tensors)} of {types(tensors)}, gradients {gradients(tensors)}"
        with line.workers.placed():
            _compare(line, partner, facts)
        # Halves, not differences: x/2 + y/2 has the same bits on both ranks, and those of x where the two are equal.
        links = Links(0.5, ((partner, 0.5),), ((partner, 1.0),))
        return alike(tensor, mixed(Exchange(NAME, found, timeout, links, pair=partner), tensors))


def _checked(partner: Any, size: int, me: int) -> int:
    try:
        j = -1 if isinstance(partner, bool) else operator.index(partner)
    except TypeError:
        j = -1
    if not 0 <= j < size or j == me:
        others = f"another of the group's ranks, 0 to {size - 1}" if size > 1 else "None, for this rank is alone"
        raise ValueError(f"pair_average(): partner must be {others}, not {partner!r} (this is rank {me})")
    return j


def _compare(line: Line, partner: int, facts: str) -> None:
    """Raises ValueError on both ranks if they bring different things: before anything of it is sent."""
    ranks = line.workers
    mine = hashlib.sha256(facts.encode()).digest() + facts.encode()
    header = torch.frombuffer(bytearray(mine[:HEADER].ljust(HEADER, b"\0")), dtype=torch.uint8)
    header = header.to(ranks.device if ranks.backend == "nccl" else "cpu")
    other = torch.empty_like(header)
    transfer = Transfer(ranks, [other], Peers((partner,), (0.5,), (partner,)), None, line.tag(NAME, "", partner))
    transfer.send(header)
    transfer.wait_received()
    transfer.wait_sent()
    theirs = bytes(other.cpu().tolist())
    if theirs[:32] != mine[:32]:
        words = {ranks.rank: mine[32:HEADER], partner: theirs[32:]}
        said = {rank: text.rstrip(b"\0").decode(errors="replace") for rank, text in sorted(words.items())}
        both = ", ".join(f"rank {rank} brings {text}" for rank, text in said.items())
        raise ValueError(f"pair_average(): {both}. Nothing was sent: pass the same on both ranks")
