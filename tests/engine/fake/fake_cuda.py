"""CUDA without a GPU: fake tensors on `cuda:0` and `cuda:1`, streams, events, and a record of what the package does.

    with Machine() as machine:              torch.cuda and the tensor library are faked in the block
        ...                                 machine.races, .waits, .launches, .faults say what was found

torch's FakeTensorMode gives tensors that have device, shape, strides, storage and version counters, but no values.
Around it every operation is an access of the stream that is current, at the bytes that it touches (`fake_clocks`), and
the launch of so many kernels; what makes the host wait for a device is noted with its line in the package. Triton
kernels are recorded in place of being launched. Values are kept for the few small tensors that the host reads.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import queue
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from fake_clocks import Agent, span, tensors_in
from fake_guard import install_guard
from fake_kernels import Kernel, Launch, kernels_of, schema_of
from fake_memory import Allocators
from fake_streams import Streams
from fake_threads import carrying_event, carrying_lock, carrying_queue
from fake_values import has_value, keep_values, number
from fake_where import thread_name, where
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Their result's shape or the Python number they return depends on values: the host waits.
READS_BACK = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # these too where an index is a mask


class Wait(NamedTuple):
    what: str
    where: str  # "buckets.py:182"
    thread: str


class _Recorder(TorchDispatchMode):
    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.machine.dispatch(func, args, kwargs or {})


class Machine(Allocators):
    """A machine with two GPUs in one process, faked within the context.

    Args:
        ignore: waits that have no effect, `ignore(waiting stream, stream waited for)`, for negative controls.
        careless: pinned memory is given out again as soon as it is freed, for a negative control.
        prompt: whether the GPU has done what it was given when the host asks (`query`). By default it never has.
    """

    def __init__(self, ignore=lambda waiter, source: False, careless: bool = False, prompt: bool = False):
        super().__init__(Streams(self, ignore), careless)
        self.prompt = prompt
        self.races: Counter[str] = Counter()
        self.waits: list[Wait] = []
        self.launches: list[Launch] = []
        self.faults: list[str] = []  # what a real machine would refuse, or do somewhere else
        self.lock = threading.RLock()
        self._hosts = threading.local()

    # -- who acts ----------------------------------------------------------------------------------------------------

    def host(self) -> Agent:
        """The thread that runs this."""
        if not hasattr(self._hosts, "agent"):
            self._hosts.agent = Agent(f"host thread {thread_name()}")
        return self._hosts.agent

    def wait(self, what: str, clock: dict[Agent, int]) -> None:
        """The host waits until all that a clock knows is over."""
        self.waits.append(Wait(what, where(), thread_name()))
        self.host().learn(clock)

    def act(self, agent: Agent, reads, writes, what: str) -> None:
        """An agent's next action: the tensors that it reads and writes."""
        self.touch(
            agent, [(self.memory(t), *span(t)) for t in reads], [(self.memory(t), *span(t)) for t in writes], what
        )

    def touch(self, agent: Agent, reads, writes, what: str) -> None:
        """The same for (memory, first byte, last byte + 1)."""
        with self.lock:
            agent.tick()
            for memory, start, stop in reads:
                memory.touch(agent, start, stop, False, what, self.races)
            for memory, start, stop in writes:
                memory.touch(agent, start, stop, True, what, self.races)

    # -- operations --------------------------------------------------------------------------------------------------

    def dispatch(self, func, args, kwargs):
        with self.lock:
            if func.namespace != "aten":  # prim.device, say
                return func(*args, **kwargs)
            schema = schema_of(func)
            name = schema.name
            if name == "is_pinned":
                return self.memory(args[0]).pinned
            pinned = bool(kwargs.get("pin_memory")) or name == "_pin_memory"
            if pinned:
                kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
            if name == "_pin_memory":
                func, args = torch.ops.aten.clone.default, args[:1]
            inputs = [t for v in (*args, *kwargs.values()) for t in tensors_in(v)]
            mask = name in INDEXING and any(t.dtype == torch.bool for t in tensors_in(args[1]))
            if (name in READS_BACK or mask) and any(t.is_cuda for t in inputs):
                return self._read_back(name, args, inputs)
            if name == "_local_scalar_dense":
                self.act(self.host(), inputs, [], name)
                return number(args[0])
            out = func(*args, **kwargs)
            if not schema.view:
                written = [t for i in schema.writes if i < len(args) for t in tensors_in(args[i])]
                written += [t for k, v in kwargs.items() if k in schema.written_names for t in tensors_in(v)]
                fresh = [t for t in tensors_in(out) if not any(t is w for w in written)]
                for t in fresh:
                    self.memory(t).pinned |= pinned
                if name not in ALLOCATES:
                    self._operation(name, args, kwargs, inputs, [*written, *fresh])
            keep_values(func, name, args, kwargs, inputs, out)
            return out

    def _read_back(self, name, args, inputs):
        self._wait_for_values(name, inputs)
        if name != "_local_scalar_dense":
            raise AssertionError(f"{where()}: {name} has a result whose shape depends on values: the host waits for it")
        return number(args[0])

    def _wait_for_values(self, name, inputs) -> None:
        stream = self.streams.current(next(t.device for t in inputs if t.is_cuda))
        stream.agent.learn(self.host().clock)
        self.act(stream.agent, inputs, [], name)
        self.wait(f"{name} reads values of a device", stream.agent.clock)

    def _tolist(self, t: torch.Tensor):
        """Read at once: torch's own for fake tensors reads one by one."""
        if t.is_cuda and t.numel():
            self._wait_for_values("tolist", [t])
        else:
            self.act(self.host(), [t], [], "tolist")
        said = self.memory(t).said
        if said and t.shape[-1:] == (len(said),):
            return said if t.dim() == 1 else [said] * t.shape[0]
        with torch._C._DisableTorchDispatch():
            return (t.value if has_value(t) else torch.zeros(t.shape, dtype=t.dtype, device="cpu")).tolist()

    def _operation(self, name, args, kwargs, inputs, outputs) -> None:
        everything = [*inputs, *outputs]
        devices = list({t.device: None for t in everything if t.is_cuda})
        host = self.host()
        if not devices:
            return self.act(host, inputs, outputs, name)
        streams = [self.streams.current(d) for d in devices]
        first = streams[0].agent
        for other in streams[1:]:  # a copy from device to device: each stream waits for the other
            first.learn(other.agent.clock)
        first.learn(host.clock)
        # A number in a tensor of the host is handed to the kernel as it is launched.
        numbers = [t for t in inputs if not t.is_cuda and t.dim() == 0 and name not in ("copy_", "_to_copy")]
        if numbers:
            self.act(host, numbers, [], name)
        outer = [t for t in everything if not t.is_cuda and not any(t is n for n in numbers)]
        self.act(first, [t for t in inputs if not any(t is n for n in numbers)], outputs, name)
        for other in streams[1:]:
            other.agent.learn(first.clock)
        if outer:
            pinned = all(self.memory(t).pinned for t in outer)
            asynchronous = bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))
            if not (pinned and asynchronous):
                kind = "pageable memory" if not pinned else "non_blocking=False"
                self.wait(f"{name} between host and device, {kind}", first.clock)
            self.launches.append(Launch("copy", name, where(), 1))
            if name == "copy_":
                self.memory(args[0]).said = self.memory(args[1]).said
        else:
            self.launches.append(Launch("kernel", name, where(), kernels_of(name, args)))

    # -- the context -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def faked(self) -> Iterator[None]:
        """Tensors made by this thread are fake, and recorded."""
        _push_mode(self.fake)
        try:
            with _Recorder(self):
                yield
        finally:
            _pop_mode(self.fake._mode_key)

    def __enter__(self) -> Machine:
        install_guard()
        pytest.importorskip("triton")
        for name in ("triton_passes", "triton_compression"):  # the package does so later, unpatched
            importlib.import_module(f"fused_dlam.kernels.{name}")
        self._stack = contextlib.ExitStack()
        patch, device = self._patch, fake_tensor.FakeTensor.device
        self._device = device.fget
        patch(fake_tensor, "init_gpu_context", lambda device: None)
        # In the middle of an operation of any thread it is "meta".
        patch(fake_tensor.FakeTensor, "device", property(self._device_of, device.fset))
        patch(fake_tensor.FakeTensor, "data_ptr", lambda t: self.address(t), create=True)
        patch(fake_tensor.FakeTensor, "tolist", lambda t: self._tolist(t))
        patch(torch.Tensor, "record_stream", lambda t, s: self.memory(t).recorded.add(s.agent))
        for name, replacement in self.streams.replacements().items():
            patch(torch.cuda, name, replacement)
        patch(gc, "get_referrers", lambda *_: [])  # the search for DDP, 60 ms each: there is none
        patch(threading, "Event", carrying_event(self))
        patch(queue, "SimpleQueue", carrying_queue(self))
        for name in ("Lock", "RLock"):
            patch(threading, name, carrying_lock(self, getattr(threading, name)))
        self._patch_threads()
        for module in [m for name, m in sys.modules.items() if name.startswith("fused_dlam")]:
            for name, kernel in vars(module).copy().items():
                if name.endswith("_kernel") and hasattr(kernel, "fn"):
                    patch(module, name, Kernel(self, kernel))
                elif kernel is torch.Tensor.data_ptr:
                    patch(module, name, self.address)
        before = torch._C._only_lift_cpu_tensors()
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        torch._C._set_only_lift_cpu_tensors(True)
        self.fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self._stack.enter_context(self.faked())
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _device_of(self, t: torch.Tensor) -> torch.device:
        with self.lock:
            return self._device(t)

    def _patch(self, owner: Any, name: str, value: Any, create: bool = False) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, value, create=create))

    def _patch_threads(self) -> None:
        """A thread knows what the one that starts it knows, and its tensors are fake too."""
        start, run, machine = threading.Thread.start, threading.Thread.run, self

        def started(thread):
            thread.knows = dict(machine.host().clock)
            start(thread)

        def running(thread):
            machine.host().learn(thread.knows)
            with machine.faked():
                run(thread)

        self._patch(threading.Thread, "start", started)
        self._patch(threading.Thread, "run", running)
