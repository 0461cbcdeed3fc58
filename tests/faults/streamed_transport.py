"""NCCL as torch's documentation has it, on a CPU: `play()` puts it under the package, over gloo.

    wait()          returns at once: from then on the "device" waits, and the host does not
    a dead peer     nothing comes from it, and nothing fails: the device waits for ever
    abort()         lets the device go on, with garbage (NaN) where messages were to be
    wait_for()      the host waits for the device

Nobody hears of a death by a closed connection, as over gloo. What NCCL does beyond its documentation is not here.
"""

from __future__ import annotations

import threading
import time

import torch
import torch.distributed as dist

from fused_dlam.comm import group as groups
from fused_dlam.comm import place as places
from fused_dlam.comm import process_group

_aborted: set[str] = set()  # names of groups
_kept: list[dist.ProcessGroup] = []  # a closed connection would tell the others
_queue: list[Streamed] = []  # what the device waits for, in order


class Streamed:
    """Work of one or several operations of a group."""

    def __init__(self, works: list, writes: list[torch.Tensor], name: str, over: int = 1):
        self.works, self.writes, self.name, self.over, self.there = works, writes, name, over, False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        try:
            for work in self.works:
                work.wait()
        except RuntimeError:  # a kernel hears nothing of it
            return
        if self.name not in _aborted:
            for t in self.writes:
                t.div_(self.over)
            self.there = True

    def wait(self) -> bool:
        _queue.append(self)
        return True

    def is_completed(self) -> bool:
        return self.there or self.name in _aborted

    def use(self) -> None:
        """The device comes to it."""
        while not self.is_completed():
            time.sleep(0.0005)
        if not self.there:
            for t in self.writes:
                t.fill_(float("nan"))


def wait_for(device: torch.device) -> None:
    while _queue:
        _queue.pop(0).use()


def abort(group: dist.ProcessGroup) -> None:
    _aborted.add(group.group_name)
    _kept.append(group)


def play(careless: bool = False) -> None:
    """careless: the host waits for nothing, a negative control."""
    named, batch, all_reduce = process_group._named, dist.batch_isend_irecv, dist.all_reduce
    gather, config, streamed = places._all_gather, dist.get_backend_config, set[str]()

    def named_over_gloo(name, ranks, backend, timeout, options, local):
        if backend != "nccl":
            return named(name, ranks, backend, timeout, options, local)
        streamed.add(name)
        return named(name, ranks, "gloo", timeout, None, local)

    def streamed_batch(ops):
        name = ops[0].group.group_name
        assert name in streamed
        return [Streamed(batch(ops), [op.tensor for op in ops if op.op is dist.irecv], name)]

    def streamed_all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if group is None or group.group_name not in streamed:
            return all_reduce(tensor, op, group, async_op)
        over = dist.get_world_size(group) if op == dist.ReduceOp.AVG else 1
        work = all_reduce(tensor, dist.ReduceOp.SUM if over > 1 else op, group, async_op=True)
        out = Streamed([work], [tensor], group.group_name, over)
        return out if async_op else out.wait()

    def streamed_gather(parts, own, group):
        Streamed([gather(parts, own, group=group, async_op=True)], [parts], group.group_name).wait()

    class Options:
        def __init__(self, **options):
            pass

    dist.ProcessGroupNCCL = type("ProcessGroupNCCL", (), {"Options": Options})  # a CPU build has none
    dist.batch_isend_irecv, dist.all_reduce = streamed_batch, streamed_all_reduce
    dist.ProcessGroup.abort = abort
    dist.get_backend_config = lambda group=None: (
        "cpu:nccl" if group is not None and group.group_name in streamed else config(group)
    )
    process_group._named, process_group.transport = named_over_gloo, lambda group, device: "nccl"
    places._all_gather = streamed_gather
    groups.wait_for = (lambda device: None) if careless else wait_for
