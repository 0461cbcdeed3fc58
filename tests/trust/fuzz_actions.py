"""What a script of the fuzzer does in one place of a step, to gradients, parameters, state and settings."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from fuzz_draw import Event
from torch import nn

import fused_dlam


def is_gossip(optimizer: Any) -> bool:
    return hasattr(optimizer, "synchronize")


def act(run: Any, e: Event) -> None:
    """Does an event of the configuration in `run`, a `fuzz_script.Script`."""
    name, opt = e.name, run.opt
    writes = name.startswith(("w_", "load", "synchronize"))
    writes = writes or (name == "averaged" and run.c.kind == "gan")  # of the other optimizer's parameters, too
    if writes and run.c.sends_x:
        for one in run.opts:
            if is_gossip(one):
                one.synchronize()  # on all ranks, also those that write nothing
    if e.rank is not None and e.rank != run.rank:
        return
    params = run.chosen(e.which)
    with torch.no_grad():
        if name.startswith(("g_", "clip")):
            _gradients(run, name, params, e.amount)
        elif name.startswith("w_"):
            for p in params:
                _weights(name, p, e.amount)
        elif name.startswith("state_") and name != "state_dict":
            _state(opt, name, params, e.amount)
        elif name.startswith("load"):
            _load(run, name)
        elif name == "add_group":
            _add_group(run)
        elif name in ("lr", "lr_tensor", "momentum", "weight_decay"):
            _settings(opt, name, e)
        else:
            _look(run, name)


def _gradients(run: Any, name: str, params: list, a: float) -> None:
    if name == "g_allreduce":
        for p in params:
            there = torch.tensor([float(p.grad is not None)])
            run.tools.all_reduce(there)
            if float(there) == run.c.n:
                flat = torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad
                whole = flat.contiguous()
                run.tools.all_reduce(whole)
                if whole is not flat:
                    flat.copy_(whole)
                flat.data.div_(run.c.n)
        return
    own = [p for p in params if p.grad is not None]
    if name == "clip_norm":
        if own:
            nn.utils.clip_grad_norm_(own, 0.05 + a)
        return
    for p in own:
        g = p.grad
        if name == "g_none":
            p.grad = None
        elif name == "g_new":
            p.grad = g.detach() * 0.5
        elif name == "g_mul":
            g.mul_(a)
        elif name == "g_setitem":
            g[...] = g * a
        elif name == "g_inf":
            if g.numel():
                g[(0,) * g.dim()] = float("inf")
        elif name == "g_data_mul":
            g.data.mul_(a)
        elif name == "g_data_zero":
            g.data.zero_()
        elif name == "g_data_clamp" or name == "clip_value":
            flat = torch.view_as_real(g) if g.is_complex() else g
            (flat.data if name == "g_data_clamp" else flat).clamp_(-a / 10, a / 10)
        elif name == "g_numpy" and g.dtype not in (torch.bfloat16,):
            g.detach().numpy()[...] *= a
        elif name == "g_dlpack" and not g.is_complex():
            torch.from_dlpack(g.detach()).mul_(a)
        elif name == "g_view":
            flat = g.data.view(-1) if g.is_contiguous() else g.data.as_strided((g.numel(),), (1,), g.storage_offset())
            flat[: (flat.numel() + 1) // 2] *= a


def _weights(name: str, p: torch.Tensor, a: float) -> None:
    real = torch.view_as_real(p.data) if p.is_complex() else p.data
    if name == "w_data_copy":
        p.data.copy_(torch.linspace(-1, 1, max(p.numel(), 1))[: p.numel()].reshape(p.shape) * a)
    elif name == "w_data_clamp":
        real.clamp_(-a, a)
    elif name == "w_data_mul":
        p.data.mul_(a)
    elif name == "w_nograd_mul":
        p.mul_(a)
    elif name == "w_nograd_copy":
        p.copy_(torch.full(p.shape, a, dtype=p.dtype))
    elif name == "w_numpy" and p.dtype is not torch.bfloat16:
        p.detach().numpy()[...] *= a


def _state(opt: Any, name: str, params: list, a: float) -> None:
    if name == "state_clear":
        opt.state.clear()
    elif name == "state_new":
        (opt.inner if isinstance(opt, fused_dlam.Gossip) else opt).state = defaultdict(dict)
    for p in params:
        entries = opt.state.get(p)
        if not entries:
            continue
        if name == "state_delete":
            del opt.state[p]
            continue
        for key in list(entries):
            if key in ("momentum_buffer", "exp_avg") and entries[key] is not None:
                if name == "state_replace":
                    entries[key] = torch.full_like(entries[key], 0.1 * a)
                elif name == "state_zero":
                    entries[key].zero_()
                elif name == "state_mul_data":
                    entries[key].data.mul_(a)


def _load(run: Any, name: str) -> None:
    if name != "load_optimizer":
        run.net.load_state_dict(run.saved[0])
    if name != "load_model":
        run.opt.load_state_dict(copy.deepcopy(run.saved[1][run.opts.index(run.opt)]))


def _add_group(run: Any) -> None:
    run.extra_used = True
    run.opt.add_param_group({"params": [run.net.extra], "lr": 0.03})


def _settings(opt: Any, name: str, e: Event) -> None:
    for group in opt.param_groups:
        if name == "momentum":
            if "momentum" in group and "alpha" not in group:  # RMSprop cannot start to have momentum
                group["momentum"] = min(e.amount, 0.5)
        elif name == "weight_decay":
            group["weight_decay"] = e.amount / 10
        elif isinstance(opt, fused_dlam.Gossip) or name == "lr" or isinstance(opt, torch.optim.SGD):
            group["lr"] = e.amount / 10
        else:
            group["lr"] = torch.tensor(e.amount / 10, dtype=torch.float64)


def _look(run: Any, name: str) -> None:
    opt = run.opt
    if name == "copy_state":
        run.note("copied state", _tensors(copy.deepcopy(opt.state_dict())))
    elif name == "state_dict":
        run.note("state_dict", _tensors(opt.state_dict()))
    elif is_gossip(opt):
        if name == "averaged":
            with opt.averaged(run.net):
                run.note("averaged", [p.detach().clone() for p in run.net.parameters()])
            run.note("after averaged", [p.detach().clone() for p in run.net.parameters()])
        elif name == "distance":
            run.note("distance", [torch.tensor(opt.consensus_distance(), dtype=torch.float64)])
        elif name == "consensus_state":
            run.note("consensus_state_dict", _tensors(opt.consensus_state_dict()))


def _tensors(state_dict: dict) -> list[torch.Tensor]:
    entries = sorted(state_dict["state"].items(), key=lambda kv: str(kv[0]))
    return [v.clone() for _, s in entries for _, v in sorted(s.items()) if isinstance(v, torch.Tensor)]
