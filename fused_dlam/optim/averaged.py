"""What `averaged` averages beside the flat buffers, of whatever layout and type: a model's buffers, and parameters that
are not the optimizer's (frozen ones, an EMA's, those of a replaced layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch

from ..comm import sharded
from ..comm.collectives import both_signs
from ..comm.place import Place
from .overlaps import offsets, overlaps_itself

# Types that transports add up. Others, float8 among them, have no mean that could be written back.
KINDS = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128,
}  # fmt: skip


class Averaged:
    """One tensor that is averaged in place, and gets its own values back bit for bit."""

    def __init__(self, tensor: torch.Tensor):
        self.sharded = sharded.is_sharded(tensor)
        self.here = sharded.local(tensor.detach())
        # Elements that lie on each other (an expanded buffer) are averaged once, where they lie.
        self.places = offsets(self.here) if overlaps_itself(self.here) else None

    def read(self) -> torch.Tensor:
        """A contiguous copy, whatever the layout."""
        if self.places is not None:
            return self._memory()[self.places]
        return torch.empty(self.here.shape, dtype=self.here.dtype, device=self.here.device).copy_(self.here)

    def write(self, values: torch.Tensor) -> None:
        if self.places is not None:
            self._memory()[self.places] = values
        else:
            self.here.copy_(values)

    def _memory(self) -> torch.Tensor:
        """All that lies between the first element and the last."""
        assert self.places is not None
        return self.here.as_strided((int(self.places[-1]) + 1,), (1,))

    def _mean_of(self, values: torch.Tensor, place: Place) -> None:
        if not self.sharded:
            place.inside.mean(values)  # ranks of one machine have buffers of their own
        place.workers.mean(values)

    def mean(self, own: torch.Tensor, place: Place) -> torch.Tensor:
        """The mean over all ranks, of which each has its own, in float64 and rounded once: what is frozen and equal on
        all stays as it is, bit for bit, where (x + x + x) / 3 in float32 is off by 3e-8. (Values that are float64
        themselves may be, by 1e-16.)

        Where some ranks' values are not finite (one NaN batch leaves them in BatchNorm's statistics), it is that of the
        others; where nobody's is (a mask of -inf) each keeps its own.
        """
        flat = torch.view_as_real(own) if own.is_complex() else own
        mean = mean_of_the_finite(flat.to(torch.float64), lambda values: self._mean_of(values, place)).to(flat.dtype)
        return torch.view_as_complex(mean) if own.is_complex() else mean


def mean_of_the_finite(own: torch.Tensor, average: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """The mean over all ranks; of an element that is not finite on some ranks that of the others, and where it is on
    none each rank's own. average: puts the mean over the ranks in a tensor's place."""
    mean = own.clone()
    average(mean)
    if mean.isfinite().all():  # or not, on all ranks: a mean is the same bits everywhere
        return mean
    mine = own.isfinite()
    share, finite = mine.to(torch.float64), torch.where(mine, own, 0.0)
    average(share)
    average(finite)
    return torch.where(share > 0, finite / share.to(own.real.dtype), own)


def beside(model: torch.nn.Module, held: set[int]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """By name, the floating-point parameters and buffers of a model that are not among `held` (by id), each once; and
    the names of those that cannot be averaged, with why."""
    named: dict[tuple, tuple[str, torch.Tensor]] = {}
    left: list[str] = []
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if id(t) in held or not (t.is_floating_point() or t.is_complex()):
            continue
        if t.layout != torch.strided or t.is_nested or t.dtype not in KINDS or t.is_meta:
            why = "on the meta device" if t.is_meta else t.dtype if t.dtype not in KINDS else t.layout
            left.append(f"{name} ({str(why).removeprefix('torch.')})")
        elif t.numel():
            # Two modules may have registered one memory under two tensors.
            named.setdefault((t.device, sharded.local(t).data_ptr(), t.shape, t.stride(), t.dtype), (name, t))
    return dict(named.values()), left


def named(model: torch.nn.Module | None, name: str) -> torch.Tensor | None:
    """A model's parameter or buffer of a name, None if it has none any more."""
    try:
        found = reduce(getattr, name.split("."), model)
    except AttributeError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def agree(place: Place, what: Mapping[str, torch.Tensor], replaced: Sequence[str] = ()) -> None:
    """Raises ValueError on all ranks if they would average different tensors, naming the first that differs.

    replaced: parameters of the model that were the optimizer's and are other objects now: these are refused, too.
    """
    names = f"{len(what)} tensors beside the optimizer's parameters ({', '.join(what) or 'no model'})"
    facts = {"what averaged() averages": names}
    facts.update({f"the shape and type of {name}, which averaged() averages": _form(t) for name, t in what.items()})
    facts["parameters that were replaced since the optimizer was built"] = ", ".join(replaced) or "none"
    # A number each in the common case: the names of a large model are long.
    most, least = place.largest(both_signs(facts), "comparing what is to be averaged", None).tolist()
    if most == -least:
        if replaced:
            raise ValueError(
                f"averaged(): the model's {', '.join(replaced[:8])}{' and others' if len(replaced) > 8 else ''} were"
                " replaced by other objects since the optimizer was built, which trains the old ones: by a new layer,"
                " load_state_dict(assign=True), or a model.to() that makes new parameters. Change the model first, then"
                " build the optimizer; give a new layer to add_param_group()"
            )
        return
    error = ValueError("the workers do not agree on what averaged() averages: pass the same model on every rank")
    for group in (place.inside, place.workers):  # both, on all ranks: those of one machine may agree
        try:
            group.agree(facts)
        except ValueError as told:
            error = told
    raise error


def _form(t: torch.Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
