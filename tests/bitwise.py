"""What two checkpoints hold, compared bit for bit."""

import torch


def assert_equal(a, b, place=""):
    """Bit for bit, in every entry."""
    assert type(a) is type(b), place
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_equal(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (u, v) in enumerate(zip(a, b, strict=True)):
            assert_equal(u, v, f"{place}.{i}")
    else:
        assert a == b, place
