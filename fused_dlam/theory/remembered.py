"""What is remembered of compressed messages in a simulation: arrays of all workers, [n, d] (layers/compression.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..layers.compression import Codec, damping


class Remembered:
    """All workers' messages of a simulation through a codec.

    Args:
        x: the parameters at the start, alike or not: then it is as if each neighbor knew them.
        phases: of the topology.
    """

    def __init__(self, codec: Codec, x: Any, phases: Iterable[Any]):
        self.codec, self._start, self._damping = codec, torch.as_tensor(x).clone(), damping(codec, phases)
        self._kept: dict[tuple[int, int], Tensor] = {}  # e by message, or h by message and matrix, [n, d]

    def pull(self, y: Any, phase: Any, message: int = 0) -> Any:
        """What the neighbors pull by, [n, d], of the messages y. phase: the step's matrix, of whose own are references.

        As in the engine an exact average is not compressed, and who exchanges nothing remembers nothing new.
        """
        if phase.averages() and phase.n > 2:
            return phase.pull(y)
        own, talks = torch.as_tensor(y), sorted({int(worker) for pair in phase.heard for worker in pair})
        if self.codec.references:
            key, start = (message, id(phase)), self._start if message == 0 else torch.zeros_like(own)
            said = self._kept.get(key, start).clone()
            for i in talks:
                said[i] += through(self.codec, finite(own[i] - said[i]))
            self._kept[key] = said
        else:
            e = self._kept.setdefault((message, 0), torch.zeros_like(own))
            said = torch.zeros_like(own)
            for i in talks:
                v = own[i] + e[i]
                said[i] = through(self.codec, v)
                e[i] = finite(v - said[i])
        return self._damping * phase.pull(said if isinstance(y, Tensor) else said.numpy().view(type(y)))


def through(codec: Codec, v: Tensor) -> Tensor:
    """D(C(v)), [n]."""
    data = torch.zeros(codec.bytes(v.numel()), dtype=torch.uint8, device=v.device)
    codec.encode(v, data)
    out = torch.empty_like(v)
    codec.decode(data, out)
    return out


def finite(v: Tensor) -> Tensor:
    """v, or 0 where it is infinite or NaN."""
    return torch.where(v.isfinite(), v, 0.0)
