"""y = W x over the ranks, as autograd knows it: the gradient is an exchange with W^T, which all ranks make.

The gradient of the gradient is again one: the exchange in the backward pass is made by the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..topology import Topology
from .links import Links
from .packing import alike, device_of, shapes, types
from .party import Party, connect, named
from .place import Layout
from .rounds import Handle, Round


@dataclass(frozen=True)
class Exchange:
    """What is to be done with tensors, now and in the backward pass.

    Args:
        call: the user's function, by which its caller names errors and spans (`named`).
        step, pair: see `Party.tag`.
    """

    call: str
    found: Layout
    timeout: float
    links: Links
    step: int | None = None
    pair: int | None = None

    def party(self, tensors: Sequence[torch.Tensor]) -> Party:
        return connect(self.found, device_of(tensors), self.timeout)

    def start(self, tensors: Sequence[torch.Tensor], kept: bool = False) -> Round:
        party = self.party(tensors)
        with party.workers.placed():
            tag = party.tag(self.call, f"{self.step} {shapes(tensors)} {types(tensors)}", self.pair)
            return Round(party, tensors, self.links, self.step, tag, kept)

    def now(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """y, without gradient."""
        with torch.no_grad():
            under_way = self.start(tensors)
            with under_way.party.workers.placed():
                return under_way.finish()

    def backward(self) -> Exchange:
        call = self.call if self.call.startswith("backward of ") else f"backward of {self.call}"
        return replace(self, call=call, links=self.links.transposed())


def exchanged(x: Any, tensors: list[torch.Tensor], exchange: Exchange, async_op: bool = False) -> Any:
    """y for what the user gave, or a handle of it. Differentiable where a tensor is, and gradients are asked for."""
    if async_op:
        with torch.no_grad():
            under_way = exchange.start(tensors, kept=True)
            return Handle(exchange.call, under_way.party, under_way, lambda found: alike(x, found))
    return alike(x, mixed(exchange, tensors))


def mixed(exchange: Exchange, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same for a list."""
    if has_gradient(tensors):
        return list(_Mixed.apply(exchange, *tensors))
    return exchange.now(tensors)


def passed(tensors: Sequence[torch.Tensor], graph: Topology) -> dict[str, str]:
    """What must be equal on all ranks, for `Party.compare`."""
    facts = {"shape": shapes(tensors), "type": types(tensors), "requires_grad": gradients(tensors)}
    return facts | {"topology": f"{graph.name} over {graph.n}, weights {graph.fingerprint}"}


def has_gradient(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def gradients(tensors: Sequence[torch.Tensor]) -> str:
    """Through which of them gradients flow: all ranks must agree, for all make the exchange in the backward pass."""
    return ", ".join(str(t.requires_grad) for t in tensors) if has_gradient(tensors) else "none"


def refuse_gradient(tensors: Sequence[torch.Tensor], call: str) -> None:
    """Raises ValueError where a handle's result would be expected to be differentiable."""
    if has_gradient(tensors):
        raise ValueError(
            f"{call}(async_op=True) is not differentiable, and a tensor requires a gradient: pass x.detach(), call it"
            " under torch.no_grad(), or leave async_op out"
        )


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = exchange.now(tensors)
        ctx.exchange = exchange
        ctx.mark_non_differentiable(*(y for y, x in zip(out, tensors, strict=True) if not x.requires_grad))
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad[1:]
        sent = [g for g, needs in zip(grads, needed, strict=True) if needs]
        back = ctx.exchange.backward()
        with named(back.call, back.step):
            found = iter(mixed(back, sent))
        return (None, *(next(found) if needs else None for needs in needed))
