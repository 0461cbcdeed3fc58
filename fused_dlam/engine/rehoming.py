"""Parameters whose memory was replaced while the parameter stayed the same object: they come home to the flat buffer.

    model.to("cpu:0")     copies every time, for torch takes "cpu" and "cpu:0" for two devices; Accelerate does it
    p.data = t            with a t of the same type, device and shape

What the new memory holds counts, as it does for torch's optimizers, and then the parameter is a view of the flat buffer
again. Where somebody else relies on the new memory nothing is taken: then this raises, as for a parameter of another
type, device or shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..comm import sharded
from ..comm.watch import log
from .slot import Slot

if TYPE_CHECKING:
    from .buckets import Bucket

_owners = WeakTensorKeyDictionary()  # parameter -> a reference to the bucket that it was moved into last
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their size in bytes
_said: set[str] = set()


def own(p: torch.Tensor, b: Bucket) -> None:
    """Notes that a parameter lives in this bucket from now on."""
    _owners[p] = weakref.ref(b)


def lives_in_a_bucket(p: torch.Tensor) -> bool:
    """Whether some optimizer of this process has moved it into its flat buffers."""
    return p in _owners and _owners[p]() is not None


def away(b: Bucket) -> list[Slot]:
    """The slots whose parameters live elsewhere."""
    found = []
    for slot in b.slots:
        here = sharded.local(slot.p) if slot.apart else slot.p
        if here.data_ptr() != slot.address or here.dtype != slot.data.dtype:
            found.append(slot)
    return found


def bring_home(b: Bucket, slots: Sequence[Slot], values: bool = True) -> None:
    """Makes parameters that live elsewhere views of the bucket again.

    values: whether what they hold there counts; False: what the bucket holds does. Equal values, bit for bit, are no
        change, so that a message that reads them may be on its way; others count as a write by the script.

    Raises RuntimeError, before any is changed, for those that cannot come home.
    """
    for slot in slots:
        _check(b, slot)
    for slot in slots:
        p, old = slot.p, slot.p.detach()
        slot.data = slot.storage(b.x if b.low is None else b.low)
        slot.address = slot.data.data_ptr()
        p.data = slot.data
        if slot.numel and old.stride() != slot.data.stride():
            _say(
                f"a parameter of shape {tuple(p.shape)} got another memory layout (channels_last?) after the optimizer"
                " was built, and keeps the one that it had, for its neighbors' messages are laid out so. Convert the"
                " model first, then build the optimizer"
            )
        if values and not _equal(old, slot.data):
            slot.data.copy_(old)
            torch.autograd.graph.increment_version([p])


def can_come(b: Bucket, slot: Slot) -> bool:
    """Whether a parameter that lives elsewhere can come home."""
    try:
        _check(b, slot)
    except RuntimeError:
        return False
    return True


def _check(b: Bucket, slot: Slot) -> None:
    """Raises RuntimeError for a parameter that cannot be taken home, and says why."""
    p, was = slot.p, slot.data
    kind = f"a parameter of shape {tuple(was.shape)} was moved, converted or replaced after the optimizer was built"
    here = sharded.local(p) if slot.apart else p
    for what, before, now in (
        ("type", was.dtype, here.dtype),
        ("device", was.device, here.device),
        ("shape", tuple(was.shape), tuple(here.shape)),
    ):
        if before != now:
            raise RuntimeError(
                f"{kind}: its {what} was {before} and is {now}. Move the model first, or convert it, then build the"
                " optimizer; load checkpoints with assign=False."
            )
    if p.device.type == "cpu" and p.is_shared():
        raise RuntimeError(
            f"{kind}: its memory is shared with other processes (share_memory), which would not see it in the flat"
            " buffer. Give those a copy."
        )
    if slot.apart or not _belongs_here(b, slot):
        raise RuntimeError(
            f"{kind} (model.to(...), load_state_dict(assign=True), p.data = ..., or another optimizer built over"
            " it). Move the model first, then build the one optimizer; load checkpoints with assign=False."
        )


def _belongs_here(b: Bucket, slot: Slot) -> bool:
    """Whether nobody else relies on a parameter's new memory.

    It is another's if an optimizer was built over the parameter since; if it is a part of a larger storage, as flat
    buffers of other packages are; or if another parameter lives in it, which would come apart.
    """
    p, owner = slot.p, _owners.get(slot.p)
    if owner is None or owner() is not b:
        return False
    if p.untyped_storage().nbytes() != p.numel() * p.element_size():
        return False
    return not any(q.data_ptr() == p.data_ptr() for q in _owners if q is not p and p.numel())


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two real or complex tensors hold the same bits: -0.0 is not 0.0, and a NaN is itself."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    integers = INTEGERS[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


def _say(line: str) -> None:
    """Logs a line once: a script that does so does it again and again."""
    if line not in _said:
        _said.add(line)
        log.warning("%s", line)
