"""`torch.distributed` between one real rank and others that exist in name only: NCCL on streams, or gloo on the host.

    nccl    an operation runs on a stream of the group, after what was launched on the current stream before it;
            `wait()` makes the current stream come after it, and the host waits for nothing
    gloo    the transport reads and writes host memory at any time from the call to the end of `wait()`, in which the
            host waits; it knows nothing of streams

Which of the two a tensor takes is decided by its device and the backend configuration of the group, as in torch. The
bookkeeping of ranks and groups is that of torch's own "fake" backend.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from fake_clocks import Agent
from fake_cuda import Machine
from fake_kernels import Launch
from fake_where import where
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_dlam.engine.header import Header


class Sent(NamedTuple):
    what: str  # "send", "recv", "all_reduce", ...
    group: tuple[int, ...]  # ranks
    elements: int
    address: int
    device: torch.device
    batch: int  # operations of one batch carry one number


class Work:
    """An operation under way. Its tensors are kept until somebody has waited for it."""

    def __init__(self, network: Network, agent: Agent, tensors: list[torch.Tensor], writes: list[torch.Tensor]):
        self.network, self.clock, self.tensors, self.writes = network, dict(agent.clock), tensors, writes
        self.device = next((t.device for t in tensors if t.is_cuda), None)

    def wait(self, timeout: Any = None) -> bool:
        machine = self.network.machine
        if self.network.waits_work:
            with machine.lock:
                if self.device is None:
                    machine.host().learn(self.clock)  # no device is waited for
                    self.network.deliver(self.writes)
                else:
                    stream = machine.streams.current(self.device).agent
                    stream.learn(machine.host().clock)
                    stream.learn(self.clock)
        self.tensors = self.writes = []
        return True

    def is_completed(self) -> bool:
        return False

    def exception(self) -> None:
        return None

    def is_success(self) -> bool:
        return True


class Network:
    """All ranks but this one, rank 0 of `ranks`, within the context. They say of their messages what this one does.

    Args:
        config: the groups' backends by device, as `dist.get_backend_config` tells them.
        name: what `dist.get_backend` calls them, "undefined" for a group that was made without a backend.
        machine_ranks: ranks of a machine, LOCAL_WORLD_SIZE.
        waits_work: False for a negative control: `wait` returns at once, and nothing comes after the operation.
    """

    def __init__(
        self,
        machine: Machine,
        ranks: int = 2,
        config: str = "cuda:nccl",
        name: str = "nccl",
        machine_ranks: int | None = None,
        waits_work: bool = True,
    ):
        self.machine, self.ranks, self.waits_work = machine, ranks, waits_work
        self.config, self.name = config, name
        self.machine_ranks = machine_ranks
        self.sent: list[Sent] = []
        self.options: list[Any] = []  # of the groups that were made
        self._streams: dict[tuple, Agent] = {}
        self._count = 0
        self._said: list[int] = []
        self._lines: dict[tuple, dict] = {}  # what one peer sends under one tag comes in order

    def deliver(self, writes: list[torch.Tensor]) -> None:
        """What the transport has written is a message, or a mean of messages, with this header."""
        for t in writes:
            self.machine.memory(t).said = self._said

    def backend_of(self, t: torch.Tensor) -> str:
        return dict(part.split(":") for part in self.config.split(",")).get(t.device.type, "none")

    def operate(self, what: str, group, reads, writes, sync: bool = False, batch: tuple[str, ...] = (), line=None):
        """One operation, or a batch that NCCL runs as one. Over gloo those of one `line` come in order."""
        machine, tensors = self.machine, [*reads, *writes]
        self._count += 1
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        for kind, t in zip(batch or (what,), tensors, strict=False):
            self.sent.append(Sent(kind, ranks, t.numel(), t.data_ptr(), t.device, self._count))
        with machine.lock:
            host, backend = machine.host(), self.backend_of(tensors[0])
            if backend == "nccl":
                device = tensors[0].device
                key = ranks, device, str(group)
                agent = self._streams.setdefault(key, Agent(f"nccl {list(ranks)} of {device}"))
                stream = machine.streams.current(device)
                stream.agent.learn(host.clock)
                agent.learn(stream.agent.clock)
                machine.launches.append(Launch("nccl", what, where(), 1))
            else:
                if backend == "none" or any(t.is_cuda for t in tensors):
                    machine.faults.append(
                        f"{where()}: {what} of a tensor on {tensors[0].device} over {self.config}, unstaged"
                    )
                agent = Agent("gloo", host.clock)
                if line is not None:
                    agent.learn(self._lines.get(line, {}))
                    self._lines[line] = agent.clock
            machine.act(agent, reads, writes, what)
            work = Work(self, agent, tensors, list(writes))
            if backend == "nccl":
                self.deliver(list(writes))
            if any(t.device != tensors[0].device for t in tensors):
                machine.faults.append(f"{where()}: {what} of tensors on several devices")
        if sync:
            work.wait()
            return None
        return work

    # -- torch.distributed's functions -------------------------------------------------------------------------------

    def isend(self, tensor, dst=None, group=None, tag=0, group_dst=None):
        self._unbatched(tensor)
        return self.operate("send", group, [tensor], [])

    def irecv(self, tensor, src=None, group=None, tag=0, group_src=None):
        self._unbatched(tensor)
        source = src if group_src is None else ("in the group", group_src)
        return self.operate("recv", group, [], [tensor], line=(str(group), source, tag))

    def _unbatched(self, tensor) -> None:
        if self.backend_of(tensor) == "nccl":
            self.machine.faults.append(f"{where()}: unbatched send or receive on NCCL, which can deadlock")

    def batch_isend_irecv(self, ops):
        sends = [op.tensor for op in ops if op.op == self.isend]
        receives = [op.tensor for op in ops if op.op != self.isend]
        if len({id(op.group) for op in ops}) > 1:
            self.machine.faults.append(f"{where()}: a batch over several groups")
        if self.backend_of(ops[0].tensor) != "nccl":
            return [op.op(op.tensor, op.peer, op.group, op.tag) for op in ops]
        kinds = ("send",) * len(sends) + ("recv",) * len(receives)
        return [self.operate("batch_isend_irecv", ops[0].group, sends, receives, batch=kinds)]

    def all_reduce(self, tensor, op=None, group=None, async_op=False):
        return self.operate("all_reduce", group, [tensor], [tensor], not async_op)

    def broadcast(self, tensor, src=None, group=None, async_op=False, group_src=None):
        return self.operate("broadcast", group, [tensor], [tensor], not async_op)

    def all_gather_into_tensor(self, output_tensor, input_tensor, group=None, async_op=False):
        return self.operate("all_gather", group, [input_tensor], [output_tensor], not async_op)

    def all_gather(self, tensor_list, tensor, group=None, async_op=False):
        return self.operate("all_gather", group, [tensor], list(tensor_list), not async_op)

    def all_gather_object(self, object_list, obj, group=None):
        object_list[:] = [obj] * len(object_list)

    def barrier(self, group=None, async_op=False, device_ids=None):
        return None

    def new_group(self, ranks=None, timeout=None, backend=None, pg_options=None, **more):
        self.options.append(pg_options)
        return self._new_group(ranks, backend="fake", group_desc=more.get("group_desc"))

    def get_backend(self, group=None):
        return self.name

    def get_backend_config(self, group=None):
        return self.config

    # -- the context -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Network:
        self._new_group = dist.new_group
        self._patches = []
        names = ["isend", "irecv", "batch_isend_irecv", "all_reduce", "broadcast", "all_gather_into_tensor"]
        names += ["all_gather", "all_gather_object", "barrier", "new_group", "get_backend", "get_backend_config"]
        doubles = {name: getattr(self, name) for name in names}
        if hasattr(dist, "all_gather_single"):  # the newer name, from torch 2.13 on
            doubles["all_gather_single"] = self.all_gather_into_tensor
        ours = [m for name, m in sys.modules.items() if name.startswith("fused_dlam")]
        if self.ranks > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.ranks)
        for name, double in doubles.items():
            real = getattr(c10d, name)
            self._patches += [mock.patch.object(m, name, double) for m in (dist, c10d)]
            for module in ours:  # a function that was imported by itself, under any name
                bound = [k for k, v in vars(module).items() if v is real]
                self._patches += [mock.patch.object(module, k, double) for k in bound]
        if self.machine_ranks:
            self._patches.append(mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(self.machine_ranks)))
        write = Header.write

        def said(header: Header, row: torch.Tensor) -> None:
            self._said = header.values()
            write(header, row)

        self._patches.append(mock.patch.object(Header, "write", said))
        options = SimpleNamespace(Options=SimpleNamespace)  # a build of torch without CUDA has no NCCL
        self._patches += [mock.patch.object(m, "ProcessGroupNCCL", options, create=True) for m in (dist, c10d)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for patch in reversed(self._patches):
            patch.stop()
        if self.ranks > 1:
            dist.destroy_process_group()
