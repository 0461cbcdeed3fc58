"""Rounds: an inner optimizer's H steps, then one step of an outer method on the way that they went.

    x        the anchor: the parameters with which a round begins, equal or near on all workers
    y        the parameters after H inner steps from x
    g = x - y    the outer gradient, in units of x
    (x', state') = the outer rule's step at x with g: it sends, pulls and updates as it does with any gradient
    y = x'

So a rule, its certificate and its largest learning rate mean what they mean in `GossipSGD`, for steps of H batches: the
learning rate of the outer step is `outer_lr`, and the curvature is that of the map from x to y, below 1 where the inner
optimizer goes down. DiLoCo is "nesterov-pmsgd" over "full" (Douillard et al. 2023), SlowMo around local steps "pmsgd"
(at a constant inner rate), local SGD "dsgd" with lr=1; fused_dlam/rules/README.md has more.

**Unequal numbers of inner steps.** Where workers take c_i steps in a round, g_i = (c / c_i) (x - y_i) with c the mean
of all c_i: where gradients are steady every worker goes as far as c steps do, and all workers' data count alike.
Without that the outer step goes towards the optimum of those who are fast. (FedNova weighs so, Wang et al. 2020.) An
all-reduce of two numbers, once a round, agrees on c.

**When messages travel.** The midpoint and atc messages hold g, so they leave when the round ends, and the round waits
for them. Under schedule="awc" x itself is sent: it is there when the round begins, nobody writes it before the round
ends, and its buckets leave one after another in the H steps. So a step sends M/H bytes, hidden behind its computation,
and nothing that is averaged is stale: x' = x + pull(x) + the rule's own step. What it costs is that a round's own step
is averaged one round later; the certificate and the largest rates are those of "awc".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..comm.group import Group
from ..comm.sharded import local
from ..comm.watch import log
from ..engine.compressed import is_memory
from ..engine.engine import Engine
from ..engine.message import Message
from ..engine.slot import Slot
from ..rules.rule import Rule
from ..rules.scalars import Scalars, number, scalar
from ..topology import Topology, exchanges
from .certificate import Certificate
from .counter import Arguments, Counter
from .skipping import contraction

OUTER = "outer_"  # how entries of a group begin that are the outer method's
MEMORY = "outer_memory"
COUNTS = ("gossip_taken", "gossip_went", "gossip_batches")
EVERY = "gossip_every"
APART = 1e-5  # of the squared length of x: workers that differ by 0.3 %. Other processors' roundings are 1e-7


class Rounds:
    """Where a worker is in its round, and the outer method's settings, group by group.

    Args:
        rule: the outer method, under its schedule.
        every: H, inner steps to a round.
        unequal: whether ranks may have H of their own.
        settings: lr, momentum and the rule's hyper-parameters, as they were given.
    """

    def __init__(self, rule: Rule, every: int, unequal: bool, settings: Mapping[str, Any], certificate: Certificate):
        self.rule, self.unequal, self.certificate = rule, unequal, certificate
        self.every = check_every(every)
        self.counter: Counter  # of a rule that counts steps, once there is an engine
        self.taken = 0  # steps of this round
        self.went = 0  # those of them that were no step without data, or left out for an overflow
        self.batches = 0  # steps of all rounds
        self.weight = 1.0  # c / c_i
        self._agreed: int | None = None  # the round for which c is known
        self._memories: list[dict[str, Any]] = []  # of the groups, once the present exchange is done
        self.entries = {OUTER + name: value for name, value in settings.items()}

    @property
    def last(self) -> bool:
        """Whether the next step is the round's last."""
        return self.taken + 1 >= self.every

    @property
    def share(self) -> float:
        """Of the buckets, those that are on their way before the next inner step, where x is sent."""
        return min(1.0, (self.taken + 1) / self.every)

    def step(self, went: bool) -> None:
        self.taken += 1
        self.went += went
        self.batches += 1

    def settings_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group's entries as the rule knows them."""
        return {name: group[OUTER + name] for name in ("lr", "momentum", *self.rule.hyper)}

    def check(self, of: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError for settings that make no sense."""
        if not 0.0 <= number("lr", of["lr"]) < math.inf:
            raise ValueError(f"Invalid outer learning rate: {of['lr']}, must be at least 0 and finite")
        if not 0.0 <= number("momentum", of["momentum"]) < 1.0:
            raise ValueError(f"Invalid outer momentum: {of['momentum']}, must be in [0, 1)")
        self.rule.check_hyper({name: of[name] for name in self.rule.hyper})

    def agree(self, engine: Engine, step: int, joining: bool, groups: list[dict[str, Any]]) -> None:
        """At a round's end, on all ranks: learns c, the mean number of inner steps over the workers that went any.

        Raises ValueError on all where an outer method that averages by all-reduce is not one on them.

        joining: within `join`, where a mean of ways is over those workers too.
        """
        if self._agreed == step:
            return  # an attempt at this exchange raised later than here: the others know this rank's number
        averages = engine.message is Message.GRADIENT
        if averages:
            self._check_alike(engine, groups)
        if self.unequal or (joining and averages):
            self._weigh(engine.place.workers, step, averages)
        self._agreed = step

    def _weigh(self, workers: Group, step: int, averages: bool) -> None:
        counts = torch.tensor([self.went, self.went > 0], dtype=torch.float64)
        workers.mean(counts, step)
        steps, going = (round(v * workers.size) for v in counts.tolist())
        self.weight = steps / going / self.went if self.unequal and self.went else 1.0
        if averages and going:
            self.weight *= workers.size / going

    def _check_alike(self, engine: Engine, groups: list[dict[str, Any]]) -> None:
        """An all-reduce of ways tells nobody what it was made with, and lets workers that differ stay as far apart."""
        workers = engine.place.workers
        if workers.size == 1:
            return
        facts = {} if self.unequal else {"every": str(self.every)}
        facts["outer settings"] = str([self.settings_of(group) for group in groups])
        workers.compare(facts, "comparing outer settings", "Set the same on all ranks.")
        own = sum(_squared_length(b.x[: b.flags.start]) for b in engine.buckets)
        lengths = workers.largest(torch.tensor([own, -own], dtype=torch.float64), "comparing where the round began")
        most, least = lengths.tolist()
        if most + least > APART * most:
            raise ValueError(
                "the workers began this round with parameters that are not the same, and"
                f" {self.rule.name} averages the ways from there alone: they would stay as far apart. Load a model on"
                " all ranks, or before the optimizer is built; optimizer.synchronize() on all of them begins a round at"
                " their mean"
            )

    def begin(self, engine: Engine, step: int, groups: list[dict[str, Any]], compress: Any) -> None:
        """The exchange begins: fixes its scalars."""
        rule = self.rule
        for group in groups:
            of = self.settings_of(group)
            self.check(of)
            self.certificate.recheck(of)
        arguments = partial(self._arguments, engine, step, compress)
        memories = [dict(group[MEMORY]) for group in groups]
        h = [rule.scalars(memory=memory, **arguments(group)) for group, memory in zip(groups, memories, strict=True)]
        self.counter.begin(arguments)
        told = tuple(float(group[f"{OUTER}lr"]) for group in groups)
        others = tuple(str(self.settings_of(group)) for group in groups)
        engine.settings = told, (*others, None if self.unequal else self.every)
        engine.begin(step)
        scale = self.weight if rule.traveled else 1.0
        engine.set_scalars([Scalars(own, (), scale) for own in h], groups)
        self._memories = memories

    def _arguments(self, engine: Engine, step: int, compress: Any, group: dict[str, Any]) -> Arguments:
        """What the rule derives a group's scalars from, see `Rule.scalars`, but what it remembers."""
        of, topology = self.settings_of(group), engine.topology
        rho, static = contraction(topology, None, compress)
        return dict(
            lr=scalar(of["lr"]), momentum=float(of["momentum"]), weight_decay=0.0, rho=rho, static=static,
            hyper={name: of[name] for name in self.rule.hyper}, mass=engine.masses(step),
            exchanges=not self.rule.rounds or exchanges(topology, step),
        )  # fmt: skip

    def begin_anew(self, groups: list[dict[str, Any]]) -> None:
        """What was gone in this round is no way any more."""
        self._empty()
        self.note(groups)

    def _empty(self) -> None:
        self.taken, self.went, self.weight, self._agreed = 0, 0, 1.0, None

    def end(self, groups: list[dict[str, Any]]) -> None:
        """The exchange is done: y = x."""
        for group, memory in zip(groups, self._memories, strict=True):
            group[MEMORY] = memory
        self.counter.note()
        self._empty()

    def load(self, groups: list[dict[str, Any]], engine: Engine, saved: Callable[[Slot], Mapping[str, Any]]) -> bool:
        """What a checkpoint holds of a round, and returns True; or the beginning of one at the parameters as they
        are."""
        counts = {name: int(groups[0].get(name, 0)) for name in COUNTS}
        anchored = False
        with torch.no_grad():
            for b in engine.buckets:
                b.absorb_shards()
                for slot in b.slots:
                    for name, buffer in engine.buffers(b).items():
                        if is_memory(name):  # see `restore_memories`
                            continue
                        value = saved(slot).get(f"gossip_{name}")
                        if value is not None:
                            slot.view(buffer).copy_(local(value))
                            anchored = anchored or name == "anchor"
                        elif name == "anchor":
                            slot.view(buffer).copy_(slot.view(b.front))
                        else:
                            slot.view(buffer).zero_()
        if not anchored:  # of the inner optimizer alone, or of a run without rounds
            counts = {"gossip_taken": 0, "gossip_went": 0, "gossip_batches": int(groups[0]["gossip_step"])}
        memories = [group.get(MEMORY, {}) for group in groups]
        every = groups[0].get(EVERY, self.every)
        if every != self.every:
            log.warning("every=%d, as saved, not %d: set optimizer.every after loading to change it", every, self.every)
            self.every = every
        self.take(groups, (tuple(counts.values()), every, memories))
        self.weight, self._agreed = 1.0, None
        if anchored:
            self.counter.restore(lambda slot: saved(slot).get("gossip_anchor") is None)
            self.counter.note()
        return anchored

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.taken, self.went, self.batches

    def note(self, groups: list[dict[str, Any]]) -> None:
        """Where this worker is, for checkpoints."""
        for group in groups:
            group.update({**dict(zip(COUNTS, self.counts, strict=True)), EVERY: self.every})

    def rest(self, groups: list[dict[str, Any]]) -> Any:
        """What a newcomer takes of the others, beside the flat buffers."""
        return self.counts, self.every, [group[MEMORY] for group in groups]

    def take(self, groups: list[dict[str, Any]], rest: Any, new: bool | None = None) -> None:
        """What `rest` has told.

        new: whether this worker comes now, and is at x: it is as far in the round as the others, and has gone nothing
        of it. False: it is one of several that were there, whose rounds are their own where they are unequal. None: of
        a checkpoint.
        """
        counts, every, memories = rest
        if new is not False or not self.unequal:
            self.taken, self.went, self.batches = counts
        if new:
            self.went, self.weight, self._agreed = 0, 1.0, None
        if not self.unequal:
            self.every = every
        for group, memory in zip(groups, memories, strict=True):
            group[MEMORY] = dict(memory)
        self.counter.restore()
        self.note(groups)

    def move(self, graph: Topology, groups: list[dict[str, Any]]) -> None:
        """Other neighbors, on whose graph the groups were found to be stable (succession.py)."""
        self.certificate = Certificate(self.rule, graph, self.certificate.allowed)
        for of in groups:
            self.certificate.trust(of)


def _squared_length(x: torch.Tensor) -> float:
    real = torch.view_as_real(x) if x.is_complex() else x
    return float(torch.linalg.vector_norm(real, dtype=torch.float64)) ** 2


def check_every(every: Any) -> int:
    """Raises ValueError for what is no number of steps."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"Invalid every: {every!r}, must be a whole number of inner steps from 1 on")
    return every
