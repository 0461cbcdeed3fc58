"""Promise: no write goes unnoticed that a training script makes, whatever its kind, type and size of the buffer.

One changed bit, a sign, an order, a swap of rows or blocks: the fingerprint of the flat buffer is another one.
Unchanged memory has an equal one.
"""

import pytest
import torch

from fused_dlam.engine.buckets import PADDING
from fused_dlam.engine.fingerprint import WIDTH, fingerprint


def one_bit(t):
    t.view(torch.uint8)[len(t) // 2] ^= 1


WRITES = {
    "one bit": one_bit,
    "one ulp of the last": lambda t: t[-1:].copy_(torch.nextafter(t[-1:].float(), torch.tensor(9.0)) + 1e-2),
    "signs": lambda t: t.neg_(),
    "halved": lambda t: t.mul_(0.5),
    "rolled by one": lambda t: t.copy_(t.roll(1)),
    "rolled by a row of 1,024": lambda t: t.copy_(t.roll(min(1024, len(t) // 2))),
    "reversed": lambda t: t.copy_(t.flip(0)),
    "halves swapped": lambda t: t.copy_(t.roll(len(t) // 2)),
    "rows of 64 shuffled": lambda t: t.view(-1, 64).copy_(t.view(-1, 64)[torch.randperm(len(t) // 64)]),
    "clamped": lambda t: t.clamp_(-0.5, 0.5),
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [1, 2, 29])
def test_every_write_is_seen(what, dtype, blocks):
    torch.manual_seed(blocks)
    flat = torch.randn(blocks * PADDING).to(dtype)
    before, again = fingerprint(flat), fingerprint(flat.clone())
    assert torch.equal(before, again)
    WRITES[what](flat)
    assert not torch.equal(before, fingerprint(flat))


def test_it_is_small():
    """A row of sums, and less than a row that is kept as it is."""
    assert len(fingerprint(torch.zeros(1 << 20))) < 2 * WIDTH
