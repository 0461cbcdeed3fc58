"""What worker processes run in the overlap tests."""

import logging
import time
from unittest import mock

import numpy as np
import torch
from torch import nn
from workers import Tied, data, lr_at

import fused_dlam


def optimizer_for(model, **options):
    defaults = {"lr": 0.05, "method": "pc-dmsgd", "topology": "one-peer-exponential", "bucket_mb": 1e-4}
    return fused_dlam.GossipSGD(model.parameters(), **{**defaults, **options})


def path(rank, options, steps=12, delays=0.0):
    """Parameters after every step, and the messages that had left before each step()."""
    model, x, noise = Tied(), data(rank), np.random.default_rng(rank)
    optimizer = optimizer_for(model, **options)
    out, early = [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        optimizer.zero_grad()
        if delays:
            time.sleep(delays * noise.random())
        before = optimizer.messages_sent
        model.loss(x).backward()
        early.append(optimizer.messages_sent - before)
        if delays:
            time.sleep(delays * noise.random())
        optimizer.step()
        out.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return torch.stack(out), early, len(optimizer._engine.buckets)


def paths(rank, cases, delays=0.0):
    return [path(rank, options, delays=delays) for options in cases]


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("fused_dlam").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())

    def close(self):
        logging.getLogger("fused_dlam").removeHandler(self)
        super().close()


def script(rank, what, overlap):
    """A training script that does `what` between backward and step; parameters, warnings, errors, early messages."""
    log, model, x = Log(), Tied(), data(rank)
    options = {"max_grad_norm": 0.1} if what.startswith("max_grad_norm") else {}
    if what.endswith("all-reduce"):
        options["method"] = "pmsgd"
    optimizer = optimizer_for(model, overlap=overlap, **options)
    early = 0
    try:
        for step in range(6):
            optimizer.zero_grad()
            before = optimizer.messages_sent
            if what == "accumulate":
                model.loss(x[:4]).backward()
                model.loss(x[4:]).backward()
            elif what == "no_sync":
                with optimizer.no_sync():
                    model.loss(x[:4]).backward()
                model.loss(x[4:]).backward()
            elif what == "retain_graph":
                loss = model.loss(x)
                with optimizer.no_sync():
                    loss.backward(retain_graph=True)
                loss.backward()
            else:
                model.loss(x).backward()
            early += optimizer.messages_sent - before
            if what in ("clip", "clip, all-reduce") or (what == "clip on rank 1" and rank == 1):
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if what == "lr in between":
                optimizer.param_groups[0]["lr"] = 0.04 / (step + 1)
            if what == "lr later" and step >= 3:
                optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
    except RuntimeError as error:
        return None, log.lines, str(error), early
    finally:
        log.close()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), log.lines, "", early


def awc_interference(rank, how):
    """Changes parameters while x is in flight."""
    model, x = Tied(), data(rank)
    optimizer = optimizer_for(model, schedule="awc")
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(4):
        if step == 2 and how == "load":
            model.load_state_dict(saved)
        if step == 2 and how == "synchronize":
            optimizer.synchronize()
            model.load_state_dict(saved)
        if how == "evaluate":
            with optimizer.averaged(model):
                model.loss(x)
        optimizer.zero_grad()
        model.loss(x).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def staged(rank, options):
    """The path of CUDA tensors over gloo, on host tensors: copies, courier thread and all."""
    from fused_dlam.comm.transfer import Transfer

    with mock.patch.object(Transfer, "on_device", staticmethod(lambda tensors: True)):
        return path(rank, options)
