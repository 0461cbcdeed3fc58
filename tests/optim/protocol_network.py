"""A small network on one worker, beside torch.optim.SGD, for the tests of the optimizer protocol."""

import pytest
import torch
from torch import nn

from fused_dlam import GossipSGD


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def backward(model, seed=0):
    x = torch.randn(13, 5, generator=torch.Generator().manual_seed(seed))
    loss = model(x.to(next(model.parameters()).dtype)).square().mean()
    loss.backward()
    return loss


def follow(change, steps=8, ours=None, tolerance=1e-6, **options):
    """`change(optimizer, step)` before every step: equal to torch.optim.SGD with momentum within 1e-6."""
    models = network(), network()
    a = GossipSGD(models[0].parameters(), lr=0.1, **(ours or {}), **options)
    b = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, **options)
    changes = change(a), change(b)
    for step in range(steps):
        for model, optimizer, then in ((models[0], a, changes[0]), (models[1], b, changes[1])):
            optimizer.zero_grad()
            backward(model, step)
            then(step, optimizer.step)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    return a


def error_of(call, *args, kind=Exception, **kwargs):
    with pytest.raises(kind) as raised:
        call(*args, **kwargs)
    return raised.value
