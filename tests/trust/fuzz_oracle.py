"""One step of a method from its equations, over all workers, in float64: what the fuzzer holds every step against.

It starts from what the parameters, gradients and momentum are right before `step()`, whatever the script has done to
them, so it needs no history: only x' is predicted, for methods whose x' is a line.

    dsgd, decentlam           y = x - lr g'                  x' = x - lr u + sum_j W_ij (y_j - y_i)
    dmsgd, pc-dmsgd           y = x - lr u                   the same
    any of them, awc          y = x                          the same
    psgd, pmsgd               x' = x - lr u of the mean gradient

with g' = g + weight_decay x and u = momentum m + g'. A parameter without a gradient has y = x and takes no step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

METHODS = ("dsgd", "decentlam", "dmsgd", "pc-dmsgd", "psgd", "pmsgd", "awc-dmsgd")
ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1 / 128, torch.float16: 1 / 1024}


def fits(c: Any) -> bool:
    """Whether a configuration's steps can be predicted."""
    return (
        c.kind == "sgd" and c.method in METHODS and not c.layers and c.clip is None and not c.hierarchical and c.n > 1
        and not (c.method in ("psgd", "pmsgd") and c.max_grad_norm)  # clips by the norm of the mean
    )  # fmt: skip


def before(run: Any) -> Any:
    """What all ranks have right before a step, by parameter."""
    opt, mine = run.opt, []
    clip, norm = run.c.max_grad_norm, 0.0
    for group in opt.param_groups:
        for p in group["params"]:
            g = None if p.grad is None else _wide(p.grad)
            if g is not None:
                norm += float(g.square().sum())
            state = opt.state.get(p) or {}
            m = state.get("momentum_buffer")
            mine.append([value(opt, p), g, None if m is None else _wide(m), _held(opt, p)])
    scale = 1.0 if clip is None else min(1.0, clip / (norm**0.5 + 1e-6)) if math.isfinite(norm) else 0.0
    ranks: list = [None] * run.c.n
    dist.all_gather_object(ranks, (mine, scale), group=run.tools.group)
    return ranks, opt.param_groups[0]["step"], [dict(group) for group in opt.param_groups]


def value(opt: Any, p: torch.Tensor) -> torch.Tensor:
    """A parameter as it counts: a 16-bit one's master value, unless the script has written another."""
    if p.dtype in (torch.bfloat16, torch.float16):
        for b in opt._engine.buckets:
            for slot in b.slots:
                if slot.p is p:
                    master = slot.view(b.x)
                    return torch.where(master.to(p.dtype) == p.detach(), master, p.detach().to(master.dtype)).double()
    return _wide(p)


def differences(run: Any, known: Any) -> list[str]:
    """What is wrong with the parameters after the step."""
    ranks, step, groups = known
    c, me, found, k = run.c, run.rank, [], 0
    W = run.graph.weights(step)
    for group in groups:
        for p in group["params"]:
            all_ = [mine[k] for mine, _ in ranks]
            scales = [s for _, s in ranks]
            k += 1
            want, size = _predicted(c, group, all_, scales, W, me, p in run.thawing)
            got = value(run.opt, p)
            wire = getattr(torch, c.comm_dtype) if c.comm_dtype else torch.float64
            master = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype.to_real()
            exact = c.method in ("psgd", "pmsgd")
            grad = ROUNDING[
                torch.float32 if p.dtype in (torch.bfloat16, torch.float16) and not exact else p.dtype.to_real()
            ]
            bound = size * max(ROUNDING[master], grad, 0 if exact and not c.comm_dtype else ROUNDING[wire]) + 1e-7
            if not got.numel():
                continue
            off = float((got - want).abs().max()) if torch.isfinite(want).all() else 0.0
            if not off <= bound:
                found.append(f"p{k - 1} off by {off:.3g}, bound {bound:.3g}, from the equations of {c.method}")
    return found


def _predicted(
    c: Any, group: Any, all_: list, scales: list, W: Any, me: int, thaws: bool
) -> tuple[torch.Tensor, float]:
    lr, beta, wd = float(group["lr"]), float(group["momentum"]), float(group["weight_decay"])
    sign = -1.0 if group["maximize"] else 1.0
    gs = [None if g is None else sign * s * torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
          for (_, g, _, _), s in zip(all_, scales, strict=True)]  # fmt: skip
    x, _, m, held = all_[me]
    if c.method in ("psgd", "pmsgd"):
        some = [g for g in gs if g is not None]
        if not some or not (held or thaws):
            return x, _size(x)
        g = torch.stack(some).sum(0) / c.n + wd * x
        u = g if c.method == "psgd" or m is None else beta * m + g
        return x - lr * u, _size(x, *[lr * g for g in some], lr * u)
    messages, steps = [], []
    for (x_j, _, m_j, _), g in zip(all_, gs, strict=True):
        y, d = x_j, torch.zeros_like(x_j)
        if g is not None:
            descent = g + wd * x_j
            u = descent if c.method == "dsgd" or m_j is None else beta * m_j + descent
            d = lr * u
            sends_x = c.schedule == "awc" or c.method == "awc-dmsgd"
            share = 0.0 if sends_x else 0.5 if c.schedule == "midpoint" else 1.0
            y = x_j - share * (lr * descent if c.method in ("dsgd", "decentlam") else d)
        messages.append(y)
        steps.append(d)
    if not (held or thaws):
        return x - steps[me], _size(x, *steps)
    pull = sum(float(W[me, j]) * (messages[j] - messages[me]) for j in range(c.n))
    return x - steps[me] + pull, _size(*messages, *steps, x)


def _held(opt: Any, p: torch.Tensor) -> bool:
    return any(slot.p is p for b in opt._engine.buckets for slot in b.slots)


def _size(*tensors: torch.Tensor) -> float:
    return sum(float(t.abs().max()) for t in tensors if t.numel())


def _wide(t: torch.Tensor) -> torch.Tensor:
    t = t.detach()
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double().clone()


def doubly_stochastic_mean(run: Any, step_without_gradients: Any) -> list[str]:
    """Steps without a gradient average, and nothing else: the workers' mean stays."""
    opt, found = run.opt, []
    means = []
    for k in range(3):
        if k:
            step_without_gradients()
        own = [value(opt, p) for group in opt.param_groups for p in group["params"]]
        ranks: list = [None] * run.c.n
        dist.all_gather_object(ranks, own, group=run.tools.group)
        means.append([(torch.stack(ts).mean(0), _size(*ts)) for ts in zip(*ranks, strict=True)])
    for k, ((a, size), (b, _)) in enumerate(zip(means[0], means[-1], strict=True)):
        if a.numel() and torch.isfinite(a).all() and size < 6e4:
            off = float((a - b).abs().max())
            if not off <= 2e-5 * size + 1e-7:
                found.append(f"p{k}: averaging moved the workers' mean by {off:.3g} of {size:.3g}")
    return found
