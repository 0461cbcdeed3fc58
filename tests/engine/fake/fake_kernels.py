"""What a launch touches, by a Triton kernel's text or an operation's schema, and how many launches an operation is."""

from __future__ import annotations

import collections
import inspect
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fake_clocks import tensors_in
from fake_where import where

if TYPE_CHECKING:
    from fake_cuda import Machine

# Tensors per launch of torch's multi_tensor_apply, by the number of lists, and blocks of 65,536 elements per launch.
FOREACH_TENSORS, FOREACH_BLOCKS, FOREACH_CHUNK = (0, 110, 64, 48, 36, 30), 320, 65536


class Schema(NamedTuple):
    name: str
    writes: tuple[int, ...]  # arguments, by place
    written_names: frozenset[str]
    view: bool


@cache
def schema_of(func) -> Schema:
    schema = func._schema
    writes = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    names = frozenset(schema.arguments[i].name for i in writes)
    return Schema(schema.name.split("::")[1], tuple(writes), names, view)


class Launch(NamedTuple):
    kind: str  # "kernel", "triton", "copy" between host and device, "nccl"
    what: str
    where: str
    count: int  # a _foreach_ operation is one call, and may be several kernels


def kernels_of(name: str, args) -> int:
    """How many kernels torch launches for an operation: one, but for lists of tensors."""
    lists = [v for v in args if isinstance(v, list | tuple) and v and isinstance(v[0], torch.Tensor)]
    if not name.startswith("_foreach") or not lists:
        return 1
    same = all(t.stride() == ts[0].stride() and t.shape == ts[0].shape for ts in zip(*lists, strict=True) for t in ts)
    if not same:
        return len(lists[0])  # the slow path, tensor by tensor
    blocks = sum(-(-t.numel() // FOREACH_CHUNK) for t in lists[0])
    return max(-(-len(lists[0]) // FOREACH_TENSORS[len(lists)]), -(-blocks // FOREACH_BLOCKS))


class Symbol:
    """What an equation depends on: the buffers that a kernel loads, for loads of others the compiler removes."""

    def __init__(self, *buffers: str):
        self.buffers = frozenset(buffers)

    def _with(self, *others: Any) -> Symbol:
        return Symbol(*self.buffers.union(*(o.buffers for o in others if isinstance(o, Symbol))))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _with
    sqrt = __abs__ = __lt__ = __gt__ = __le__ = __ge__ = _with


def loaded(given: dict[str, Any]) -> frozenset[str] | None:
    """Which of x_ptr, g_ptr and the s_ptrs a launch of `_pack_kernel` or `_combine_kernel` loads; None: not known."""
    if not {"SEND", "S", "H", "x_ptr", "g_ptr"} <= set(given):
        return None
    send, update = (getattr(f, "fn", f) for f in (given["SEND"], given.get("UPDATE")))
    x, g = Symbol("x_ptr"), Symbol("g_ptr")
    s = given["S"](*(Symbol(f"s_ptrs {k}") for k in range(len(given["S"].names))))
    h = given["H"](*(Symbol() for _ in given["H"].names))
    messages = send(x, g, s, h)
    if given.get("HALFWAY"):
        messages = (messages[0]._with(x),)
    if update is None:
        return messages[0]._with(*messages).buffers
    pull = tuple(m if given["r_ptrs"] else Symbol() for m in messages)
    new, state = update(x, g, s, pull, h)
    return Symbol()._with(new, *state).buffers


class Kernel:
    """A Triton kernel that is recorded in place of being launched. It writes what its text stores to."""

    def __init__(self, machine: Machine, kernel: Any):
        self.machine, self.kernel, self.fn = machine, kernel, kernel.fn
        self.arg_names = list(inspect.signature(kernel.fn).parameters)
        self.stored = set(re.findall(r"(?:store|atomic_\w+)\(\s*([A-Za-z_]\w*)", inspect.getsource(kernel.fn)))
        assert self.stored & set(self.arg_names), f"{kernel.fn.__name__} stores to none of its arguments"

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.warmup(*args, **kwargs)[grid](*args, **kwargs)

    def warmup(self, *args, grid=None, **kwargs) -> dict:
        """What Triton returns: the compiled kernel, which takes a grid and then arguments of the same form."""
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        known, sizes, skipped = loaded(given), {}, set()
        for name, value in given.items():
            for k, t in enumerate(tensors_in(value)):
                sizes[name, k] = t.numel() * t.element_size()
                if known is not None and name in ("x_ptr", "g_ptr", "s_ptrs") and not known & {name, f"{name} {k}"}:
                    skipped.add((name, k))
        return collections.defaultdict(lambda: lambda *a, **kw: self._launch(sizes, skipped, a, kw))

    def _launch(self, sizes, skipped, args, kwargs) -> None:
        machine, reads, writes = self.machine, [], []
        stream = machine.streams.current(None)
        for name, value in {**dict(zip(self.arg_names, args, strict=False)), **kwargs}.items():
            for k, one in enumerate(value if isinstance(value, list | tuple) else (value,)):
                if (name, k) not in sizes:
                    continue
                address = one if isinstance(one, int) else machine.address(one)
                place = machine.span_at(address, sizes[name, k])
                if place[0].device != stream.device:
                    machine.faults.append(
                        f"{where()}: a kernel on {stream.device} is given memory of {place[0].device}"
                    )
                if (name, k) not in skipped:
                    reads.append(place)
                if name in self.stored:
                    writes.append(place)
        stream.agent.learn(machine.host().clock)
        machine.touch(stream.agent, reads, writes, self.fn.__name__)
        machine.launches.append(Launch("triton", self.fn.__name__, where(), 1))
