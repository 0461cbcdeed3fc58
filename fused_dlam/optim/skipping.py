"""`skip_late=seconds`: an exchange whose messages have not come after so many seconds is left out, by both of its ends.

For clusters on which a worker is held up now and then. Its peer of that step goes on after `seconds`, with a local step
and no average, and so does the worker itself when it comes: both ends agree on it, so the workers' mean stays where it
would be (left out on one end alone, the messages of a directed graph move it). A worker that is slow in every step is
no faster for it: after two exchanges of a pair that were left out, and have not arrived, its peer waits, and so it does
after eight in a row.

It holds for graphs of pairs, for methods that send what `step` made (schedules atc and midpoint), and for CPU tensors
over gloo. Messages leave in step(), not in the backward pass. Each exchange costs a question to the default store, and
one that is left out the memory of its messages until they arrive. Which exchanges are left out depends on timing, so no
two runs are alike; `optimizer.skipped` lists them. The certificate of stability is of the graph without omissions.

Workers disagree the more, the more is left out: in gradient noise several times as much with half of all exchanges.
Beside that a correction (MI-DmSGD, PC-DmSGD) must be slow. The rate that "auto" gives it here is the one for a graph
that averages in every ninth step, for that is the least of a pair: rho^(1/9) in the place of rho. With rho's own,
training with one slow worker of four diverged, where DmSGD's did not (tests/optim/test_skip_late.py has the noise).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..comm.late import IN_A_ROW
from ..comm.place import Layout
from ..engine.engine import Engine
from ..engine.leaving_out import LeavingOut, check_pairs
from ..engine.message import Message, message_of
from ..layers.compression import Codec, progress
from ..rules.rule import Rule
from ..topology import Topology


def check(
    seconds: float | None,
    rule: Rule,
    topology: Topology,
    where: Layout,
    params: Sequence[torch.Tensor],
    goes_on: bool,
) -> None:
    """Raises ValueError where exchanges cannot be left out. goes_on: with on_failure="continue"."""
    if seconds is None:
        return
    if goes_on:
        raise ValueError(
            "skip_late keeps connections in use until what was late has come, and on_failure='continue' has to close"
            " them at a loss: choose one"
        )
    check_pairs(topology)
    if message_of(rule) is not Message.PACKED:
        raise ValueError(
            f"skip_late needs messages of their own (schedules atc and midpoint); {rule.name!r} with schedule"
            f" {rule.schedule!r} sends x itself, or averages gradients over all ranks"
        )
    if where.local:
        raise ValueError("skip_late is for ranks that gossip by themselves, not with hierarchical=")
    if any(p.is_cuda for p in params):
        raise ValueError("skip_late is for parameters on the CPU, over gloo: on a GPU a message cannot be left waiting")


def contraction(topology: Topology, seconds: float | None, codec: Codec | None = None) -> tuple[float, bool]:
    """What rates are derived from: the contraction per step, and whether one matrix is that of all steps."""
    share = progress(codec, topology.phases) / (1 if seconds is None else 1 + IN_A_ROW)
    return topology.slowest_rho**share, topology.is_static and share == 1


def start(engine: Engine, seconds: float | None) -> None:
    """Has the engine leave out what is late."""
    if seconds is not None and engine.gossips:
        engine.leaving_out = LeavingOut(engine, seconds)
