"""What passes are, and the one place that chooses who runs them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..rules.rule import Rule
from ..rules.scalars import Scalars
from . import numba_passes
from .torch_passes import TorchPasses

__all__ = ["Passes", "choose"]

log = logging.getLogger("fused_dlam")

Rows = Tensor | Sequence[Tensor]
Received = Tensor | Sequence[Tensor | Sequence[Tensor]]

# From how many parameters it is worth to compile for the CPU, which takes a second. Below, a pass costs a millisecond.
WORTH_COMPILING = 1 << 20


class Passes(Protocol):
    """A rule's two passes over flat buffers: `set` the step's scalars, then `pack` and `combine` any number of buffers.

    Of a rule that is `traveled`, g holds the parameters y to which an inner optimizer came from x, and the gradient of
    the equations is x - y: for 16-bit y, x rounded to their type less y.

    All buffers of a call have one length N. x and the state have the master type, g any floating type. `messages` is
    [messages, N] and `received` is [d, messages, N], both in the type of the messages. Both may as well be tuples of
    their rows, which can lie anywhere. d is the number of weights that were set.

    Promise: the message that `combine` recomputes is the one that `pack` wrote, bit for bit.

    With a guard, an element that is infinite or NaN, or overflows, does not spread: it counts as 0 in the scaled
    gradient, and in each difference of a received message to the own one. That element of that message then pulls
    nothing, as if its sender had agreed. All other elements are as without a guard, bit for bit.

    low: parameters of 16 bits whose master values are x, [N]. A script may write them by any means, and what it wrote
    counts: where low is not x rounded to nearest even, x is taken from low before all else. `pack` leaves x as it was
    and sends what follows from low; `combine` writes the new x. Values are compared: NaN equals NaN, and -0 equals 0.
    """

    name: str  # shown to users

    def set(self, scalars: Scalars) -> None:
        """Sets the scalars of the passes that follow."""

    def pack(self, x: Tensor, g: Tensor, state: Sequence[Tensor], messages: Rows, low: Tensor | None = None) -> None:
        """Writes this worker's messages."""

    def combine(
        self,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        received: Received,
        copies: Sequence[Tensor] = (),
        low: Tensor | None = None,
    ) -> None:
        """Updates x and state in place from the first d received messages, or nothing if the scalars say `skip`.

        copies: the new x is written to each of these [N] too, rounded to nearest even to its type. `low` may be one.
        """

    def warm(
        self,
        x: Tensor,
        g: Tensor,
        state: Sequence[Tensor],
        messages: Rows,
        received: Received,
        degrees: Iterable[int],
        copies: Sequence[Tensor] = (),
        low: Tensor | None = None,
        skips: bool = False,
    ) -> None:
        """Compiles now what `pack` and `combine` of these buffers and of slices of them would compile in mid-training.

        No pass runs.

        Args:
            messages: as in `pack`; none where nothing is ever packed.
            received: as in `combine`; of fewer rows than a degree needs, those that are there stand for the rest.
            degrees: the numbers of neighbors that steps will have.
            low: as in `pack` and `combine`, all of which will be given one, or none.
            skips: for steps whose `skip` is a tensor, instead of the others.
        """


def choose(
    rule: Rule,
    device: torch.device,
    dtype: torch.dtype,
    elements: int,
    fused: bool | None = None,
    guard: bool = False,
) -> Passes:
    """The passes for a rule's buffers.

    Args:
        dtype: the type of the master values.
        elements: how many of them there are on all buffers together.
        fused: None takes the best that is available for them, True insists on fused passes, False takes the reference.
        guard: whether elements that are not finite are kept from spreading, see `Passes`.

    Raises RuntimeError with fused=True if there are none, saying what is missing.
    """
    passes: Passes | None = None
    missing = None
    if fused is not False:
        passes, missing = _on_gpu(rule, device, dtype, guard) if device.type == "cuda" else _on_cpu(rule, device, guard)
        if fused is None and device.type == "cpu" and elements < WORTH_COMPILING:
            passes, missing = None, f"{elements} parameters are too few to compile for"
    if passes is None:
        if fused:
            raise RuntimeError(f"fused=True: {missing}")
        passes = TorchPasses(rule, guard)
    log.debug(
        "%s: passes over %d values (%s, %s) run by %r%s",
        rule.name, elements, device, dtype, passes.name, f" ({missing})" if missing else "",
    )  # fmt: skip
    return passes


def _on_gpu(rule: Rule, device: torch.device, dtype: torch.dtype, guard: bool) -> tuple[Passes | None, str | None]:
    """Passes, or what is missing for them."""
    if dtype != torch.float32:
        return None, f"the Triton kernels keep master values in float32, not {dtype}"
    try:
        from .triton_passes import TritonPasses, missing
    except ImportError as error:
        return None, f"triton cannot be imported ({error})"
    lack = missing(device)
    return (None, lack) if lack else (TritonPasses(rule, device, guard=guard), None)


def _on_cpu(rule: Rule, device: torch.device, guard: bool) -> tuple[Passes | None, str | None]:
    """Passes, or what is missing for them."""
    if device.type != "cpu":
        return None, f"there are no fused passes for {device.type} devices"
    if not numba_passes.available():
        return None, "numba is not installed; run: pip install 'fused-dlam[cpu]'"
    return numba_passes.NumbaPasses(rule, guard), None
