"""A configuration's model, optimizers and script, on one worker."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from typing import Any
from unittest import mock

import fuzz_oracle
import torch
from fuzz_actions import act, is_gossip
from fuzz_draw import AVERAGE_GRADIENTS, Config
from fuzz_model import TIMEOUT, Net, Tools, graph, square
from torch import nn

import fused_dlam


class Script:
    """One run of a configuration. `overlap` is that of the optimizer, or "torch" for torch's own."""

    def __init__(self, c: Config, rank: int, overlap: Any, tools: Tools):
        self.c, self.rank, self.overlap, self.tools = c, rank, overlap, tools
        self.net = Net(c)
        self.trace: list[tuple[str, list[torch.Tensor]]] = []
        self.wrong: list[str] = []
        self.extra_used, self.thawing = False, set()
        self.params = self.net.listed()
        if c.hook and c.hook.endswith("first"):
            self._hooks()
        self.graph = graph(c)
        self.others: list[Any] = []
        if c.kind == "gan":
            half = (len(self.params) + 1) // 2
            self.halves = [self.params[:half], self.params[half:] or [self.net.extra]]
            self.opts = [self._build([{"params": ps}]) for ps in self.halves]
        else:
            groups: list[dict] = [{"params": []} for _ in range(3)]
            for p, (_, _, _, g, _) in zip(self.params, c.params, strict=False):
                groups[g]["params"].append(p)
            groups = [g for g in groups if g["params"]] + ([{"params": []}] if c.empty_group else [])
            for i, g in enumerate(groups):
                g["lr"] = c.lr * (1 + i)
            self.opts = [self._build(groups)]
        self.opt = self.opts[0]
        if c.hook and c.hook.endswith("last"):
            self._hooks()
        self.scaler = None
        self.oracle = overlap is False and fuzz_oracle.fits(c)

    def _build(self, groups: list[dict]) -> Any:
        c = self.c
        torch_ = self.overlap == "torch"
        if c.kind == "gossip":
            inner = getattr(torch.optim, c.inner)(groups, lr=c.lr)
            if torch_:
                return inner
            with self._machines():
                return fused_dlam.Gossip(
                    inner, self.graph, c.schedule, hierarchical=c.hierarchical or None, timeout=TIMEOUT, **self._wire()
                )
        momentum = c.momentum if c.method not in ("psgd", "dsgd") or not torch_ else 0.0
        common = dict(lr=c.lr, momentum=momentum, weight_decay=c.weight_decay, maximize=c.maximize)
        if torch_:
            return torch.optim.SGD(groups, **common)
        layers = [
            {"lars": fused_dlam.layers.Lars(0.1), "slowmo": fused_dlam.SlowMo(every=3)}[k] for k in c.layers.split()
        ]
        with self._machines():
            return fused_dlam.GossipSGD(
                groups, **common, method=c.method, topology=self.graph, schedule=c.schedule, overlap=self.overlap,
                max_grad_norm=c.max_grad_norm, clip=c.clip, layers=layers, hierarchical=c.hierarchical or None,
                timeout=TIMEOUT,
                allow_unstable=not c.certified, **self._wire(),
            )  # fmt: skip

    def _wire(self) -> dict:
        c = self.c
        return dict(
            comm_dtype=getattr(torch, c.comm_dtype) if c.comm_dtype else None, fused=c.fused, bucket_mb=c.bucket_mb
        )

    def _machines(self) -> Any:
        return mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2") if self.c.hierarchical else nullcontext()

    def _hooks(self) -> None:
        how = self.c.hook or ""

        def hook(p: torch.Tensor) -> None:
            if how.startswith("data"):
                p.grad.data.mul_(0.5)
            elif how.startswith("in place"):
                with torch.no_grad():
                    p.grad.mul_(0.5)
            else:
                p.grad = p.grad.detach() * 0.5

        for p in self.params[::2]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(hook)

    def chosen(self, which: int | None) -> list[torch.Tensor]:
        return self.params if which is None else [self.params[which]]

    def note(self, label: str, tensors: list[torch.Tensor]) -> None:
        self.trace.append((label, tensors))

    # -- the script --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self.saved = self._save()
        for step in range(self.c.steps):
            self.number = step
            for at, rank, k, on in self.c.trainable:
                if at == step and rank in (None, self.rank):
                    if on and not self.params[k].requires_grad:
                        self.thawing.add(self.params[k])
                    self.params[k].requires_grad_(on)
            if step == 1 and not (self.c.sends_x and self.c.kind == "gan"):
                self.saved = self._save()
            (self._gan_step if self.c.kind == "gan" else self._step)(step)
            names = [p.detach().clone() for p in (*self.params, self.net.extra)]
            self.note(f"parameters after step {step}", names)
            self.note(f"gradients after step {step}", [torch.tensor([float(p.grad is not None)]) for p in self.params])
            self.note(
                f"gradients after step {step}", [p.grad.detach().clone() for p in self.params if p.grad is not None]
            )
            self._events("after", step)
        self.note("parameters at the end", [p.detach().clone() for p in (*self.params, self.net.extra)])
        if is_gossip(self.opt):
            self.note("distance at the end", [torch.tensor(self.opt.consensus_distance(), dtype=torch.float64)])
        c = self.c
        averages = c.kind == "gossip" or c.kind == "sgd" and c.method not in AVERAGE_GRADIENTS
        if self.overlap is False and c.n > 1 and averages and "slowmo" not in c.layers:
            self.wrong += fuzz_oracle.doubly_stochastic_mean(self, self._empty_step)

    def _save(self) -> tuple:
        return copy.deepcopy(self.net.state_dict()), [copy.deepcopy(opt.state_dict()) for opt in self.opts]

    def _empty_step(self) -> None:
        for p in self.net.parameters():
            p.grad = None
        self.opt.step()

    def _events(self, where: str, step: int) -> None:
        for e in self.c.events:
            if e.where == where and step in e.steps:
                act(self, e)

    def _used(self, step: int) -> list:
        out = {k for at, rank, k in self.c.unused if at == step and rank in (None, self.rank)}
        used = [(k, p) for k, p in enumerate(self.params) if k not in out and p.requires_grad]
        return used + ([(97, self.net.extra)] if self.extra_used else [])

    def _loss(self, step: int, part: int = 0, used: list | None = None) -> torch.Tensor:
        worker = 0 if self.c.same else self.rank
        loss = self.net.loss(self._used(step) if used is None else used, worker, 10 * step + part)
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _step(self, step: int) -> None:
        self._zero(self.c.zero[step])
        self._events("before", step)
        self._scaling(step)
        kind, alone = self.c.backward[step]
        kind = kind if alone in (None, self.rank) else "plain"
        no_sync = getattr(self.opt, "no_sync", nullcontext)
        if kind in ("wasted", "wasted_kept"):
            self._loss(step, 3).backward()
            if kind == "wasted":
                self.opt.zero_grad()
        if kind in ("no_sync", "no_sync_forgotten", "twice"):
            with no_sync() if kind == "no_sync" else nullcontext():
                self._loss(step, 1).backward()
        if kind == "retain_twice":
            loss = self._loss(step)
            loss.backward(retain_graph=True)
            loss.backward()
        elif kind == "partial":
            self._loss(step, 0, self._used(step)[::2]).backward()
        elif kind == "penalty_grad":
            self._loss(step).backward(create_graph=True)
            terms = [square(p.grad) for _, p in self._used(step) if p.grad is not None and p.grad.requires_grad]
            if terms:
                (sum(terms) * 0.01).backward()
        elif kind == "penalty_autograd":
            used = self._used(step)
            loss = self._loss(step)
            grads = (
                torch.autograd.grad(loss, [p for _, p in used], create_graph=True, allow_unused=True) if used else ()
            )
            terms = [square(g) for g in grads if g is not None and g.requires_grad]
            (loss + (sum(terms) * 0.01 if terms else 0.0)).backward()
        elif kind == "no_sync_forgotten":
            with no_sync():
                self._loss(step).backward()
        elif kind not in ("none", "closure"):
            self._loss(step).backward()
        self._overflow(step)
        self._events("between", step)
        if kind == "closure":
            self._take(closure=lambda: self._closure(step))
        else:
            self._take()
        if kind == "double_step":
            self._take()

    def _closure(self, step: int) -> torch.Tensor:
        self.opt.zero_grad()
        loss = self._loss(step)
        loss.backward()
        if self.overlap == "torch" and self.c.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([*self.params, self.net.extra], self.c.max_grad_norm)
        return loss

    def _take(self, closure: Any = None) -> None:
        known = fuzz_oracle.before(self) if self.oracle and closure is None and self.scaler is None else None
        clips = self.overlap == "torch" and self.c.max_grad_norm is not None and closure is None
        whole = [(p, p.grad.clone()) for p in (*self.params, self.net.extra) if clips and p.grad is not None]
        if clips:
            nn.utils.clip_grad_norm_([p for p, _ in whole], self.c.max_grad_norm)
        if self.scaler is not None:
            torchs = self.c.scaler[0] == "torch" or self.overlap == "torch" or self.c.n == 1
            if torchs and all(p.grad is None for p in self.params):
                self.params[0].grad = torch.zeros_like(self.params[0])  # torch's refuses where there is no gradient
            if self.c.scaler[4]:
                self.scaler.unscale_(self.opt)
            self.scaler.step(self.opt)
            self.scaler.update()
        elif closure is not None:
            self.opt.step(closure)
        else:
            self.opt.step()
        for p, g in whole:  # the optimizer's own clipping leaves p.grad as it was
            p.grad.copy_(g)
        if known is not None:
            self.wrong += [f"step {self.number}: {text}" for text in fuzz_oracle.differences(self, known)]
        self.thawing.clear()

    def _scaling(self, step: int) -> None:
        if self.c.scaler and step == self.c.scaler[1]:
            own = self.c.scaler[0] == "own" and self.overlap != "torch"
            kind = fused_dlam.GradScaler if own else torch.amp.GradScaler
            self.scaler = kind("cpu", init_scale=256.0, growth_interval=3)
            self.scaler.scale(torch.ones(()))  # as every script does, also one without a backward pass

    def _overflow(self, step: int) -> None:
        if self.c.scaler and step == self.c.scaler[2] and (self.c.same or self.rank == self.c.scaler[3]):
            for p in self.params:
                if p.grad is not None and p.grad.numel():
                    p.grad.data.fill_(float("inf"))

    def _zero(self, how: str) -> None:
        if how.startswith("opt"):
            self.opt.zero_grad(set_to_none=how == "opt")
        elif how.startswith("model"):
            self.net.zero_grad(set_to_none=how == "model")
        elif how == "foreach":
            grads = [p.grad.detach() for p in self.params if p.grad is not None]
            if grads:
                torch._foreach_zero_(grads)

    def _gan_step(self, step: int) -> None:
        first = self.c.seed % 2
        for turn in range(2):
            which = (first + turn) % 2
            self.opt = self.opts[which]
            self._zero(self.c.zero[step] if turn == 0 else "opt")
            if turn == 0:
                self._events("before", step)
            used = self._used(step)
            mine = {id(p) for p in self.halves[which]}
            if turn == 0:
                used = [(k, p) for k, p in used if id(p) in mine]
            elif which == 1 and self.halves[1][0] is self.net.extra:
                used = [*used, (97, self.net.extra)]
            self._loss(step, turn, used).backward()
            if turn == 0:
                self._events("between", step)
            self.opt.step()
        self.opt = self.opts[0]
