"""8-bit messages in Triton, interpreted: run by test_triton_interpreter.py in its process.

Promise: codes, scales, rows and what is remembered are bit for bit those of torch's operations, for every block, with
padding, with one neighbor, several and none, with numbers of any size, and with some that are not finite. On a CPU,
where kernels cannot run, nothing asks for them.
"""

import pytest
import torch
from triton_problem import interpreted

from fused_dlam.engine.compressed import Compressed, kernels
from fused_dlam.layers.compression import Int4, Int8

N, USED = 4096, 4000


def numbers(seed, block):
    random = torch.Generator().manual_seed(seed)
    y = torch.randn(N, generator=random) * torch.logspace(-30, 3, N)
    y[5], y[300], y[301] = torch.nan, torch.inf, -torch.inf
    y[1024 : 1024 + block] = 0.0
    y[2048 : 2048 + block] = 1e-40
    return y


@interpreted
@pytest.mark.parametrize("block, degree, parts", [(256, 1, 1), (1024, 3, 1), (16, 2, 2), (256, 0, 1)])
def test_bit_for_bit_what_torch_gives(block, degree, parts):
    from fused_dlam.kernels import triton_compression

    assert triton_compression.fits(N // parts, block)
    torches, tritons = (Compressed(Int8(block), torch.zeros(N), USED, 1, degree, parts, 1, 1.0, {}) for _ in range(2))
    tritons._kernels = triton_compression
    rows = [torch.full((degree, 1, N), 7.0) for _ in range(2)]
    for step in range(3):
        y = numbers(step, block)[None]
        for one in (torches, tritons):
            one.encode(y, 0)
            for k, landing in enumerate(one.landing):
                other = Compressed(Int8(block), torch.zeros(N), USED, 1, 1, parts, 1, 1.0, {})
                landing.copy_(other.encode(numbers(10 * step + k + 1, block)[None], 0))
        assert torch.equal(torches.sending, tritons.sending)
        for one, row in zip((torches, tritons), rows, strict=True):
            one.decode(y, row, degree, 0)
        assert torch.equal(rows[0].nan_to_num(3.0), rows[1].nan_to_num(3.0))
        assert torch.equal(torches.kept["compression_error"], tritons.kept["compression_error"])
        assert tritons.kept["compression_error"].isfinite().all() and tritons.kept["compression_error"].any()


@interpreted
def test_what_they_take():
    from fused_dlam.kernels import triton_compression

    assert [block for block in (8, 16, 48, 256, 1024, 2048) if triton_compression.fits(N, block)] == [16, 256, 1024]
    assert not triton_compression.fits(1000, 256)


def test_on_a_cpu_there_are_none():
    assert kernels(Int8(), torch.zeros(N), N) is None and kernels(Int4(), torch.zeros(N), N) is None
