"""What a user says of an outer method, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .. import rules
from ..comm.sharded import local
from ..comm.watch import log
from ..engine.message import Message, message_of
from ..rules.rule import Rule
from ..rules.scalars import among
from ..theory.limits import rate_limit
from ..topology import Topology
from . import options
from .certificate import Certificate
from .rounds import Rounds, check_every

SMALLEST, LARGEST = 0.25, 32.0  # MiB of a bucket that leaves in one of H steps
SLOW = 0.05  # a correction rate at which MI-DmSGD's awc keeps DmSGD's limit: 1.6 for 0.54 on one-peer graphs of 8
MOST = 64  # workers for which a limit is looked for at construction: a quarter of a second


class Outer:
    """The options of `Gossip` that are the outer method's, see there. Checked here, before anything is sent.

    With every=1 and nothing else there is none: parameters are averaged in every step.
    """

    def __init__(
        self, outer: str | Rule | None, every: int, lr: float | None, momentum: float | None, local_steps: bool,
        hyper: dict[str, Any],
    ):  # fmt: skip
        self.every = check_every(every)
        if not among(local_steps, (True, False)):
            raise TypeError(f"local_steps must be True or False, not {local_steps!r}")
        self.unequal = bool(local_steps)
        self.on = outer is not None or every > 1 or self.unequal
        if outer is None:
            for name, value in (("lr", lr), ("momentum", momentum)):
                if value is not None:
                    raise TypeError(
                        f"{name}= is the outer method's, and there is none: pass outer='mi-dmsgd', say, or set it where"
                        " the inner optimizer is built"
                    )
            _refuse_others(hyper)
            if hyper:
                raise TypeError(f"Gossip.__init__() got an unexpected keyword argument {next(iter(hyper))!r}")
            lr, momentum = 1.0, 0.0
        # DSGD with the rate 1 is the average: x - (x - y) + pull.
        self.of = rules.get("dsgd" if outer is None else _named(outer))
        _refuse_others(hyper)
        self.of.check_hyper(hyper, ARGUMENTS)
        self.settings = {
            "lr": 0.7 if lr is None else lr,
            "momentum": 0.9 if momentum is None else momentum,
            **self.of.defaults(hyper),
        }

    def rule(self, schedule: str, hierarchical: Any, comm_dtype: Any) -> tuple[Rule, Message] | None:
        """The rule that the engine runs, and what it sends. None without an outer method."""
        if not self.on:
            return None
        rule = self.of.under(schedule if self.of.average != "gradient" else _own(schedule))
        if rule.average == "gradient":
            if hierarchical:
                raise ValueError(f"outer={rule.name!r} averages over all ranks: hierarchical= is for gossip")
            if comm_dtype is not None:
                raise ValueError(
                    f"outer={rule.name!r} averages by all-reduce, in the type of the parameters and in float32 where"
                    " that has 16 bits: comm_dtype= is for messages to neighbors"
                )
            return rule, Message.GRADIENT
        return rule.outer(), message_of(rule)

    def bucket_mb(self, given: float | None, schedule: str, params: Sequence[torch.Tensor]) -> float | None:
        """Where x is sent during a round, buckets of the size that one of its steps is to send."""
        early = self.on and self.of.average != "gradient" and self.of.under(schedule).schedule == "awc"
        if given is not None or not early or self.unequal:  # ranks must have the same
            return given
        total = sum(local(p).numel() * p.element_size() for p in params if p.requires_grad) / 2**20
        return min(max(total / self.every, SMALLEST), LARGEST)

    def rounds(self, rule: Rule, graph: Topology, allow_unstable: bool) -> Rounds | None:
        if not self.on:
            return None
        certificate = Certificate(rule, graph, allow_unstable)
        rounds = Rounds(rule, self.every, self.unequal, self.settings, certificate)
        rounds.check(self.settings)
        certificate.check(self.settings)
        return rounds


def advise(rule: Rule, graph: Topology, settings: Mapping[str, Any]) -> None:
    """Says where an outer rate is above what is stable for every inner optimizer that goes down.

    The way x - y of steps on a quadratic is c (x - x*), with c between 0 and 1 where they go down without overshooting:
    c is the outer step's curvature, and 1 where a round comes to rest. So a rate below `rate_limit` is stable for all
    of them. It is worth a line and not a refusal: a round mostly ends far from rest.
    """
    if rule.average == "gradient" or not 1 < graph.n <= MOST or graph.period is None:
        return
    hyper, lr = {name: settings[name] for name in rule.hyper}, float(settings["lr"])
    limit_of = partial(rate_limit, rule, graph, float(settings["momentum"]))
    try:
        limit = limit_of(**hyper)
    except ValueError:  # of a rule that is not linear, as Adam
        return
    if lr <= limit:
        return
    cures = ["a smaller lr", "schedule='midpoint'", "another graph"]
    if "correction_rate" in hyper and limit_of(**{**hyper, "correction_rate": SLOW}) > lr:
        cures.insert(0, f"correction_rate={SLOW:g}")
    log.warning(
        "the outer rate %g is above %.3g, up to which outer=%r under schedule=%r over %r is stable where a round of"
        " inner steps comes to rest. If training diverges take %s, or %s",
        lr, limit, rule.name, rule.schedule, graph.name, ", ".join(cures[:-1]), cures[-1],
    )  # fmt: skip


def _own(schedule: str) -> str:
    """All-reduce has no schedule but its own."""
    if schedule not in ("auto", "atc"):
        raise ValueError(
            f"schedule={schedule!r} is for methods that send to neighbors, and this outer method averages the way by"
            " all-reduce, when a round ends: outer='nesterov-awc-dmsgd' with topology='full' and schedule='awc' has the"
            " mean that steps so too, and hides its exchange; it is stable up to lr=0.67 at momentum=0.9"
        )
    return "auto"


def _named(outer: Any) -> Any:
    """Raises ValueError for the name of an algorithm that is a setting of another one's."""
    known = ALGORITHMS.get(outer.lower().replace("_", "-")) if isinstance(outer, str) else None
    if known is not None:
        raise ValueError(f"{outer} is outer={known}")
    return outer


def _refuse_others(hyper: Mapping[str, Any]) -> None:
    """Raises TypeError for what `GossipSGD` takes and `Gossip` does not."""
    for name in hyper:
        if name in MEANT:
            raise TypeError(f"Gossip has no {name}=: {MEANT[name]}")
        if name.startswith("outer_"):
            raise TypeError(f"Gossip has no {name}=: it is {name[6:]}= here, and {name!r} in the param_groups")
        if name in options.ARGUMENTS and name not in ARGUMENTS:
            raise TypeError(f"Gossip has no {name}=, which is GossipSGD's: here the inner optimizer takes the steps")


ALGORITHMS = {
    "diloco": "'nesterov-pmsgd'", "slowmo": "'pmsgd', lr=1.0", "local-sgd": "None, every=H alone",
    "fedavg": "'psgd', lr=1.0", "streaming-diloco": "'nesterov-awc-dmsgd', topology='full', schedule='awc', lr=0.6",
}  # fmt: skip

#: What users of other packages pass.
MEANT = {
    "weight_decay": "it is the inner optimizer's, set it where that is built",
    "nesterov": "it is the inner optimizer's, and of an outer method in its name, outer='nesterov-mi-dmsgd' say",
    **dict.fromkeys(("sync_every", "inner_steps", "local_steps_per_sync", "H"), "the number of inner steps is every="),
}

#: What the constructor takes by name, for an unknown name may have been meant to be one.
ARGUMENTS = (
    "topology", "schedule", "group", "outer", "every", "local_steps", "allow_unstable", "hierarchical", "comm_dtype",
    "fused", "bucket_mb", "timeout", "on_failure", "min_workers", "admit_every", "on_members_changed", "compress",
)  # fmt: skip
