"""What `on_failure="continue"` needs before a step is taken: who is in, and a way in for those who come later."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist

from ..comm import between, generation, lookout, other_averagers, sharded
from ..comm.errors import ExchangeError
from ..comm.membership import Membership
from ..comm.place import machines
from ..comm.process_group import CPU
from ..comm.register import RunEnded
from ..kernels.passes import choose
from ..rules.rule import Rule
from ..rules.scalars import number

if TYPE_CHECKING:
    from .shared import GossipOptimizer

HOW = (
    "start the workers with `fused-dlam run -n N train.py`, or with torchrun, one agent per worker (--nproc-per-node 1"
    " --max-restarts 0)"
)
# This process's part in the run. Its world changes with it, so a process has one, and one optimizer that uses it.
_memberships: list[Membership] = []
_open: WeakSet[GossipOptimizer] = WeakSet()  # all of this process's that have other ranks, closed ones as well


class Members(NamedTuple):
    """Who trains, see `on_members_changed`."""

    numbers: tuple[int, ...]  # each worker's number for life, in the order of their ranks
    lost: tuple[int, ...]
    new: tuple[int, ...]
    step: int  # from which they go on


@dataclass(frozen=True)
class Survival:
    """The options of an optimizer that goes on without workers that are lost. Checked here."""

    on_failure: str = "raise"
    min_workers: int = 1
    admit_every: int = 100
    on_members_changed: Callable[[Members], Any] | None = None

    def __post_init__(self):
        if self.on_failure not in ("raise", "continue"):
            raise ValueError(f"Invalid on_failure: {self.on_failure!r}, must be 'raise' or 'continue'")
        for name, least in (("min_workers", 1), ("admit_every", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or number(name, value) < least:
                raise ValueError(f"Invalid {name}: {value!r}, must be a whole number from {least} on")
        if self.on_members_changed is not None and not callable(self.on_members_changed):
            raise TypeError(f"on_members_changed must be a function of the new members, or None, not"
                            f" {self.on_members_changed!r}")  # fmt: skip

    @property
    def goes_on(self) -> bool:
        return self.on_failure == "continue"

    def check_place(self, group: Any, hierarchical: Any) -> None:
        """Raises ValueError for what would be gone with torch's world, which is formed anew when workers are lost."""
        if group is not None:
            raise ValueError("on_failure='continue' is for all ranks: leave group= out")
        if not (hierarchical is None or isinstance(hierarchical, bool)):
            raise ValueError(
                "on_failure='continue' forms torch's world anew, and a DeviceMesh is gone with the old one: pass"
                " hierarchical=True, or on_failure='raise' and restart from a checkpoint"
            )

    def check_parameters(self, params: Sequence[torch.Tensor]) -> None:
        """The same for process groups that a model's wrapper has."""
        if not self.goes_on:
            return
        if len(sharded.ranks_of(params)) > 1 or other_averagers.ddp_ranks(params):
            raise ValueError(
                "on_failure='continue' forms torch's world anew, and the process groups of FSDP or DDP are gone with"
                " the old one: use on_failure='raise' and restart from a checkpoint"
            )


def enter(
    survival: Survival, timeout: float, group: Any, hierarchical: Any, rule: Rule, fused: bool | None
) -> tuple[Membership | None, bool]:
    """This process's membership, and whether it comes to a run that is under way, of whose world it is a part now.

    None without process groups and launcher, where there is one worker.

    Raises ValueError where no store outlives the workers, or there are fewer than min_workers, RuntimeError for a
    second optimizer, ExchangeError if a newcomer is not let in.
    """
    _refuse_both_kinds(survival)
    if not survival.goes_on:
        if os.environ.get(generation.NEWCOMER) == "1":
            raise RuntimeError(
                "this process was started in the place of a worker that was lost (--restart), and on_failure='raise'"
                " lets nobody in: it would train alone, from the beginning. Pass on_failure='continue', or start"
                " without --restart and go on from a checkpoint"
            )
        return None, False
    survival.check_place(group, hierarchical)
    together = dist.is_available() and dist.is_initialized()
    comes = os.environ.get(generation.NEWCOMER) == "1" and not _memberships
    if together and not comes and survival.min_workers > dist.get_world_size():
        raise ValueError(
            f"min_workers is {survival.min_workers}, and the world size is {dist.get_world_size()} before any worker is"
            " lost"
        )
    if not together or (dist.get_world_size() == 1 and not comes and not _memberships):
        return None, False
    if between.stands():
        raise RuntimeError(
            "workers were lost in the last step of an optimizer that was closed since: call finish() before close(), so"
            " that all know who is left"
        )
    backend = dist.get_backend_config()
    if "nccl" in backend:
        lookout.prepare()
    address = generation.store_address()
    if address is None:
        raise ValueError(
            f"on_failure='continue' needs a store that outlives every worker, and here rank 0 hosts it: {HOW}"
        )
    if _memberships:
        membership = _memberships[0]
        if membership.busy:
            raise RuntimeError(
                "a process has one optimizer with on_failure='continue': put all parameters into groups of one, or"
                " close() the other first"
            )
        membership.renew()  # before the groups are built: all know it then
    else:
        if comes and hierarchical:
            raise RunEnded("nobody is let in with hierarchical=True: a machine that lost a worker is gone as a whole")
        store = generation.connect(address, timeout)
        if comes:
            membership = Membership.newcomer(store, address, timeout)
        else:
            together_go = machines(hierarchical, None) if hierarchical else ()
            membership = Membership(store, address, dist.get_rank(), dist.get_world_size(), timeout, together_go)
        _memberships.append(membership)
    membership.min_workers, membership.timeout = survival.min_workers, timeout
    membership.backend = backend if "nccl" in backend else "gloo"
    if comes:
        # What takes seconds comes first, for the others wait from the moment in which they have let it in: what the
        # first optimizer would import, and the rule's passes.
        importlib.import_module("torch._dynamo")
        choose(rule, CPU, torch.float32, 1, fused, guard=True)
        generation.leave()  # the world of its own in which the launcher started it
        come_in(membership)
    return membership, comes


def opened(optimizer: GossipOptimizer) -> None:
    """An optimizer was built, with other ranks."""
    _open.add(optimizer)


def _refuse_both_kinds(survival: Survival) -> None:
    """At the first loss the world goes, and with it the groups of an optimizer that does not survive one."""

    def others() -> bool:
        return any(not o._closed and (o._recovery is None) == survival.goes_on for o in _open)

    if others():
        gc.collect()  # one that nobody has any more may be in a cycle
    if others():
        raise RuntimeError(
            f"another optimizer of this process has on_failure={'raise' if survival.goes_on else 'continue'!r}: when a"
            " worker is lost, one would go on in a new world, and the other's groups would be gone with the old one. A"
            " process cannot have one of both kinds: close() the other first, or give all parameters to one optimizer"
            " with on_failure='continue'"
        )


def come_in(membership: Membership) -> None:
    """A newcomer's way into a world: asks until it is a part of one that stands."""
    while True:
        membership.enter()
        try:
            generation.form(membership)
            return
        except ExchangeError as error:  # another worker was lost meanwhile: the others decide anew, without this one
            generation.leave(error)
