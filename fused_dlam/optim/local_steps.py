"""Unequal local steps: workers of unlike speed take unlike numbers of steps between two exchanges.

Worker i takes c_i local steps from one exchange to the next, the one within step() included, at the rate s_i lr. With
doubly stochastic W pulls cancel in the workers' mean. Where gradients are steady its momentum is g_i / (1 - beta), so

    mean' = mean - lr / (1 - beta) * (1/n) sum_i s_i c_i g_i

and the mean rests where sum_i s_i c_i grad f_i = 0. With s_i = 1 that is the optimum of sum_i c_i f_i: the data of fast
workers count for more. With

    s_i = c / c_i,    c = mean_i(c_i)

all weights are equal: the optimum of sum_i f_i, and a worker moves as far as c steps do. Momentum is in gradient units,
a running sum of gradients, and is not scaled. (Nesterov's: the same.) Gradients are taken along the way, so for DSGD
and DmSGD this holds to first order in lr c: they keep a bias of that order beside their own.

MI-DmSGD has no such bias. Its correction p counts in units of one local step, and acts in every one of them:

    local step  u = beta m + g,  x' = x + s (rho p - lr u),  m' = u
    step()      d = s (rho p - lr u),  send x + d/2,  x' = x + d + pull,  p' = (1 - e rho/kappa) p + (e/c) pull,  m' = u

Its part of a worker's displacement is s_i c_i rho p_i = c rho p_i: the sum over the workers stays zero. An exchange
changes that part by e pull, as without local steps, hence e/c. At rest with kappa = inf every single local step is
zero, p_i = lr g_i / (1 - beta), so workers stand still at one point, where sum_i g_i = 0 exactly. With p in step()
alone they walk away from it and back, and the squared bias is 1e4 times larger (counts 5, 5, 5, 1, lr h = 0.01). That
point is the same for any s_i, for sum_i p_i = 0. The weights then tell how the mean gets there: as all-reduce does.

Stability: a local step is one with W = I, and theorem 1 (theory/README.md) lets every worker have a curvature, and so
a rate, of its own: steady counts are stable for s_i lr h_i < 2 (1 + beta). The range is min(c) / c of all-reduce's.

**When the counts are known.** A worker's own count is known in step(), the others' by an all-reduce there (16 bytes).
So local steps take s of the last exchange, and step() corrects what they did to the weight it has now,
x = x_0 + (s / s_last) (x - x_0) with x_0 of the last exchange, before anything is packed. With steady counts nothing
is corrected. (Steps at the full rate with a correction every time have the same fixed point. With 4 workers of equal
curvature they are stable to a rate of 0.5 at counts 8, 8, 2, 2, and ours to 1.5. At counts drawn anew from 1 to 5
theirs are at 1.4, and ours no more: this is for speeds that last. tests/optim/test_local_steps_design.py has it.) The
last local step's gradient is the script's, from before the correction. A message must know this exchange's weight, so
it leaves in step().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..comm.errors import calling
from ..engine import local_step
from ..engine.clip import coefficient
from ..engine.engine import Engine
from ..engine.step_allowed import check_step_allowed
from ..rules.rule import Rule, send_parameter
from ..rules.scalars import Scalars
from .kept_state import reclaim
from .options import Options

if TYPE_CHECKING:
    from .gossip_sgd import GossipSGD

SCALE = "scale of local steps"  # s of the last exchange, in the first group's memory and so in checkpoints
FIT = "'mi-dmsgd', 'dmsgd', 'dsgd' and their Nesterov forms fit"


class LocalSteps:
    """What one worker has done since the last exchange, and what it weighs. Off, it does nothing."""

    def __init__(self, engine: Engine, on: bool):
        self.engine, self.on = engine, on
        self.count = 0  # local steps since the last exchange
        self.scale, self.mean = 1.0, 1.0  # s and c of the present step()
        self.took = False  # whether this worker has a part in c
        self._starts: dict[int, torch.Tensor] = {}  # by bucket: room for x of the last exchange
        self._begun: set[int] = set()  # buckets that have left it
        self._agreed: int | None = None  # the step for which c is known

    def take(self, scalars: list[Scalars], groups: list[dict[str, Any]]) -> None:
        """One local step."""
        for b in self.engine.buckets:
            if b.index not in self._begun:
                b.absorb()
                self._starts.setdefault(b.index, torch.empty_like(b.x)).copy_(b.x)
                self._begun.add(b.index)
        self.count += 1
        local_step.take(self.engine, scalars, groups)

    def agree(self, step: int, gradients: bool) -> None:
        """In step(), on all ranks: learns the mean of all counts, over the workers that took any step.

        gradients: whether this rank takes a local step in step(), see `join`.
        """
        if not self.on:
            return
        own = self.count + gradients
        if self._agreed != step:  # else an attempt at this step raised, and the others know this rank's count
            counts = torch.tensor([own, own > 0], dtype=torch.float64)
            workers = self.engine.place.workers
            workers.mean(counts, step)
            steps, taking = (round(v * workers.size) for v in counts.tolist())
            self.mean = steps / taking if taking else 1.0
            self._agreed = step
        self.took = own > 0
        self.scale = self.mean / own if own else 1.0

    def weighed(self, h: Any) -> Any:
        """A step's scalars with the weight of this exchange."""
        if self.scale == self.mean == 1.0:
            return h
        h = _scaled(h, self.scale)
        return h._replace(correction=h.correction / self.mean) if "correction" in h._fields else h

    def correct(self, groups: list[dict[str, Any]]) -> None:
        """Once the step has begun: what local steps did has this exchange's weight, and the next ones start with it."""
        if not self.took:
            return
        ratio = self.scale / guess(groups)
        for b in self.engine.buckets if self._begun and ratio != 1.0 else ():
            if b.index in self._begun:
                b.absorb()
                torch.lerp(self._starts[b.index], b.x, ratio, out=b.x)
                b.publish()
        if self.count or self.scale != 1.0 or SCALE in groups[0]["memory"]:
            groups[0]["memory"][SCALE] = self.scale
        self._begun.clear()

    def forget(self) -> None:
        """x is that of an exchange, or was set."""
        self.count, self._agreed, self.scale, self.mean, self.took = 0, None, 1.0, 1.0, False
        self._begun.clear()

    def check_none(self, call: str) -> None:
        """Raises RuntimeError between a local step and step()."""
        if self.count:
            raise RuntimeError(
                f"{call} was called after {self.count} local steps, whose weight step() will know: call it between"
                " step() and the next local_step()"
            )


def guess(groups: list[dict[str, Any]]) -> float:
    """s of the last exchange."""
    return float(groups[0]["memory"].get(SCALE, 1.0))


def _scaled(h: Any, scale: float) -> Any:
    """The rule's displacement times a number: what is in units of x per step is in lr, and in MI's share of p."""
    return h._replace(**{name: getattr(h, name) * scale for name in ("lr", "share") if name in h._fields})


def locally(h: Any, scale: float) -> Any:
    """The scalars of a local step: nothing leaks, for p is the exchanges'."""
    return _scaled(h._replace(leak=1.0) if "leak" in h._fields else h, scale)


class TakesLocalSteps:
    """The part of `GossipSGD` that steps without the others."""

    _local_steps: LocalSteps

    @property
    def _owes(self) -> bool:
        return self._local_steps.count > 0

    @torch._disable_dynamo
    @torch.no_grad()
    def local_step(self: GossipSGD, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[misc]
        """A local step without an exchange, for workers that are faster than others; needs `local_steps=True`.

            for step in range(100):
                for _ in range(4 if fast else 0):  # any number, on any rank, different in every step
                    optimizer.zero_grad(); loss_of(next(batches)).backward(); optimizer.local_step()
                optimizer.zero_grad(); loss_of(next(batches)).backward(); optimizer.step()

        Nothing is sent and nobody is waited for. In step() ranks agree on the mean number c of local steps (step()'s
        own included), and each worker's displacement counts c / (its own number) times: so all workers' data count
        alike. The largest stable learning rate is min(number) / c of that without local steps. Schedulers step with
        step(): a rate must be the same on all ranks.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned; called once, before the step.

        Raises RuntimeError without `local_steps=True`, within `averaged`, after a GradScaler was at work, or if a
        parameter was moved since construction; ValueError for a learning rate that is not finite.
        """
        self._check_connected()
        if not self._options.local_steps:
            raise RuntimeError(
                "local_step() needs local_steps=True in the constructor, on all ranks: step() then weighs each worker's"
                " steps by a count that all agree on"
            )
        engine = self._engine
        check_step_allowed(engine, self._averaging, "local_step()")
        refuse_scaler(self)
        if engine.step is not None:
            engine.check_whole()
            raise RuntimeError("local_step() was called after an attempt at step() that raised: call step() again")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with calling("optimizer.local_step()"):
            reclaim(self.state, engine)
            engine.refresh()
            scalars = self._opening.local_scalars(lambda h: locally(h, guess(self.param_groups)))
            self._health.look(self._step)
            self._local_steps.take(scalars, self.param_groups)
            self._arrivals.reset()
        return loss


def local_gradient_scale(engine: Engine, limit: float | None) -> Any:
    """What the gradients of a local step are multiplied by: they are clipped as those of step() are."""
    if limit is None:
        return 1.0
    return coefficient(engine, [b.grads for b in engine.buckets], [b.active() for b in engine.buckets], 1.0, limit)


def refuse_scaler(optimizer: Any) -> None:
    """Raises RuntimeError where a loss scaler is at work, which cannot unscale a local step."""
    if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "local_steps=True works without a GradScaler, whose step() is an exchange: train in bfloat16, which needs"
            " none"
        )


def check_local_steps(rule: Rule, chosen: Options, hierarchical: Any) -> None:
    """Raises ValueError if local steps make no sense with a method, its schedule or the place. See `Options` too."""
    if not chosen.local_steps:
        return
    if hierarchical:
        raise ValueError("local_steps=True is for single ranks: with hierarchical= a machine's gradients are averaged")
    if rule.average == "gradient":
        raise ValueError(f"local_steps=True averages parameters, and method {rule.name!r} averages gradients: {FIT}")
    if rule.send is send_parameter:
        raise ValueError("local_steps=True moves x, which schedule='awc' sends meanwhile: use 'atc' or 'midpoint'")
    why = unfit(rule)
    if why:
        raise ValueError(f"local_steps=True cannot weigh the steps of method {rule.name!r}, {why}: {FIT}")


def unfit(rule: Rule) -> str:
    """Why a rule cannot take steps of unlike weight, "" if it can. Tried on numbers.

    Its displacement must be proportional to `lr` (and MI's `share` of the correction), its momentum the worker's own
    gradients, and what it integrates of the pull proportional to `correction`.
    """
    if rule.counts is not None:
        return "which counts steps"
    if rule.messages != 1:
        return "which averages its momentum too"
    h = rule.scalars(lr=0.37, momentum=0.71, weight_decay=0.0, rho=0.43)
    one = torch.ones((), dtype=torch.float64)
    kept = [name in rule.centered for name in rule.state]

    def update(h: Any, pull: float, correction: float) -> tuple[float, list[float], list[float]]:
        """Displacement without the pull, new centered buffers, new others."""
        state = [(correction if keep else 0.59) * one for keep in kept]
        x, new = rule.update.fn(0.83 * one, 1.27 * one, rule.State(*state), (pull * one,), h)
        both = [[float(v) for v, keep in zip(new, kept, strict=True) if keep is want] for want in (True, False)]
        return float(x) - 0.83 - pull, both[0], both[1]

    def close(a: Any, b: Any) -> bool:
        return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-7)

    moved, _, others = update(h, 0.0, 0.31)
    if not close(update(h, 0.47, 0.11)[2], others):
        return "whose momentum has the neighbors' pull in it"
    if not close(update(h, 0.47, 0.31)[0], moved):
        return "which takes another share of the pull"
    twice, _, same = update(_scaled(h, 2.0), 0.0, 0.31)
    if not (close(twice, 2 * moved) and close(same, others)):
        return "whose step is not proportional to lr"
    if any(kept):
        still = locally(h, 1.0)._replace(correction=0.0) if "correction" in h._fields else locally(h, 1.0)
        if not close(update(still, 0.47, 0.31)[1], [0.31] * sum(kept)):
            return "whose correction has a rate of its own"
    return ""
