"""What the tests of the guard and of written parameters share, whoever runs the passes: what is planted, and the plain
statements that a pass is held to.
"""

from types import SimpleNamespace

import torch
from cpu_problem import D, text


def step(make, p, guard=False, low=None, copies=()):
    """(messages, x', state...): what the passes that `make(rule, guard=...)` returns make of copies of p's buffers."""
    passes = make(p.rule, guard=guard)
    passes.set(p.scalars)
    x, state, messages = p.x.clone(), tuple(t.clone() for t in p.state), p.messages.clone()
    passes.pack(x, p.g, state, messages, low)
    assert torch.equal(x.view(torch.uint8), p.x.view(torch.uint8)), "pack must not touch the parameters"
    passes.combine(x, p.g, state, p.received, copies, low)
    return messages, x, *state


def but(p, **changes):
    return SimpleNamespace(**{**vars(p), **changes})


def same(a, b):
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def plant(p, seed=0):
    """p with NaN, infinities and numbers whose differences and squares overflow, in every buffer and combination."""
    random = torch.Generator().manual_seed(seed)
    top = 0.9 * torch.finfo(p.x.dtype).max
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, top, -top], dtype=D)

    def planted(t, share):
        kinds = bad[torch.randint(5, t.shape, generator=random)].to(t.dtype)
        return torch.where(torch.rand(t.shape, generator=random) < share, kinds, t)

    state = tuple(planted(t, 0.05) for t in p.state)
    return but(p, x=planted(p.x, 0.1), g=planted(p.g, 0.1), state=state, received=planted(p.received, 0.2))


def check_planted(make, p):
    """With a guard: as without one, bit for bit, had the bad gradients been 0 and the bad messages like the own one.

    Where the own message is what is not finite, as without neighbors.
    """
    p = plant(p)
    got = step(make, p, guard=True)
    q = got[0].to(p.x.dtype)
    scaled = p.g.to(p.x.dtype) * p.scalars.grad_scale
    g = torch.where(scaled.isfinite(), p.g, 0)
    received = torch.where((p.received.to(p.x.dtype) - q).isfinite(), p.received, got[0])
    clean = step(make, but(p, g=g, received=received))
    alone = step(make, but(p, g=g, received=p.received[:0], scalars=p.scalars._replace(weights=())))
    same(got[:1], clean[:1])
    for mask, want in ((q.isfinite().all(0), clean), ((~q.isfinite()).all(0), alone)):
        assert mask.any() or len(p.x) < 100 or want is alone
        same((t[mask] for t in got[1:]), (t[mask] for t in want[1:]))
    _check_against_float64(p, got)


def _check_against_float64(p, got):
    """By the rule's text with the guard beside it, where no number is so large that float32 may overflow by itself."""
    messages, *new = got
    own, x, state = text(p, D, messages, guard=True)
    values = [
        t.to(D) for t in (p.x, p.g.to(D) * p.scalars.grad_scale, *p.state, *own, x, *state, *p.received.unbind(0))
    ]
    size = torch.stack([t.nan_to_num(0, 0, 0).abs().expand(p.rule.messages, -1).amax(0) for t in values]).amax(0)
    fair = size < 1e12
    roundings = 32 * torch.finfo(p.x.dtype).eps * size.clamp(min=1.0)
    for mine, exact in zip(new, (x, *state), strict=True):
        known = fair & exact.isfinite()
        assert ((mine.to(D) - exact).abs() <= roundings)[known].all()
        assert torch.equal(mine[fair].isfinite(), exact[fair].isfinite())


def check_low(make, p, dtype, rounded=torch.Tensor.to):
    """As without low on the x that is meant, bit for bit, pack and combine, though the copy overwrites low."""
    random = torch.Generator().manual_seed(1)
    x = p.x.clone()
    x[::13] *= 1e6  # infinite in float16
    x[4::17], x[5::19] = torch.nan, -0.0
    p, low = but(p, x=x), rounded(x, dtype)
    same(step(make, p, low=low), step(make, p))

    write = torch.rand(x.shape, generator=random) < 0.3
    low[write] = torch.randn(x.shape, generator=random).to(dtype)[write]
    low[1::11], low[2::11], low[3::11], low[5::19] = torch.nan, torch.inf, -torch.inf, 0.0
    meant = torch.where(low == rounded(x, dtype), x, low.to(x.dtype))
    assert len(x) < 100 or 0.3 < float((meant != x).float().mean()) < 0.7
    before, other = low.clone(), torch.empty_like(x)
    want = step(make, but(p, x=meant))
    same(step(make, p, low=low), want)
    same((low,), (before,))
    same(step(make, p, low=low, copies=(other, low)), want)
    same((low, other), (rounded(want[1], dtype), want[1]))
