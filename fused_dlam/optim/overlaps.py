"""Which tensors share memory: two parameters on one storage, and tensors whose elements lie on each other."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..comm import sharded


def overlaps_itself(t: torch.Tensor) -> bool:
    """Whether elements of a strided tensor may lie on each other, as in an expanded one: then it cannot be written."""
    reach = 0  # elements behind the first that the dimensions so far cover
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def offsets(t: torch.Tensor) -> torch.Tensor:
    """Where the elements of a strided tensor lie, counted from its first one: each place once, in order."""
    places = torch.zeros((), dtype=torch.int64, device=t.device)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = places[..., None] + torch.arange(size, device=t.device) * stride
    return places.unique()


def overlapping(tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two different tensors of which one's memory is, in part at least, the other's. None if there are none."""
    different = {id(t): t for t in tensors}.values()
    # Sorted by where they begin, only neighbors need to be compared: few lie within each other's reach.
    begun = sorted(((*_extent(t), t) for t in different if sharded.local(t).numel()), key=lambda entry: entry[:3])
    open_: list[tuple] = []
    for device, start, end, t in begun:
        open_ = [other for other in open_ if other[0] == device and other[2] > start]
        for _, _, _, other in open_:
            if _meet(sharded.local(other), sharded.local(t)):
                return other, t
        open_.append((device, start, end, t))
    return None


def _extent(t: torch.Tensor) -> tuple[str, int, int]:
    """Device and the addresses from the first byte to behind the last."""
    here = sharded.local(t)
    last = sum(stride * (size - 1) for size, stride in zip(here.shape, here.stride(), strict=True))
    start = here.data_ptr()
    return str(here.device), start, start + (last + 1) * here.element_size()


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors within each other's reach share an element. Columns of one matrix do not."""
    if all(t.numel() * t.element_size() == _extent(t)[2] - _extent(t)[1] for t in (a, b)):
        return True  # without holes
    return bool(torch.isin(_bytes(a), _bytes(b)).any())


def _bytes(t: torch.Tensor) -> torch.Tensor:
    """The addresses of all bytes."""
    firsts = offsets(t).cpu() * t.element_size() + t.data_ptr()
    return (firsts[:, None] + torch.arange(t.element_size())).flatten()
