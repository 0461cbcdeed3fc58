"""What on_failure="continue" costs while nothing fails: counted."""

import os
import threading

import torch

import fused_dlam

KINDS = {"default": {}, "awc": {"schedule": "awc"}, "pmsgd": {"method": "pmsgd"}}


class Counting:
    """A store that counts what it is asked."""

    def __init__(self, store):
        self.store, self.count = store, 0

    def __getattr__(self, name):
        self.count += 1
        return getattr(self.store, name)


def trained(steps, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.05, bucket_mb=1e-3, **options)
    data = torch.Generator().manual_seed(torch.distributed.get_rank())
    counting = None
    if optimizer._recovery is not None:
        counting = optimizer._recovery.membership.store = Counting(optimizer._recovery.membership.store)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20, generator=data)).square().mean().backward()
        optimizer.step()
    asked = 0 if counting is None else counting.count
    if counting is not None:
        optimizer._recovery.membership.store = counting.store
    x = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    sent = optimizer.messages_sent, optimizer.bytes_sent
    optimizer.close()
    return x, sent, asked


def costs(rank, port, steps):
    os.environ["FUSED_DLAM_STORE"] = f"127.0.0.1:{port}"
    out = {}
    for name, options in KINDS.items():
        plain = trained(steps, **options)
        before = threading.active_count()
        surviving = trained(steps, **options, on_failure="continue", admit_every=0)
        looking = trained(steps, **options, on_failure="continue", admit_every=5)
        out[name] = plain, surviving, looking, threading.active_count() - before
    return out
