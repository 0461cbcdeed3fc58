"""The part of `torch.cuda` that orders things: streams, events, the current stream and device of each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from fake_clocks import Agent

if TYPE_CHECKING:
    from fake_cuda import Machine


class Stream:
    """A queue of a device. What is launched on it comes after what the launching thread knows to be over."""

    streams: Streams  # of the machine

    def __init__(self, device: Any = None, priority: int = 0, name: str | None = None, **_: Any):
        self.device = self.streams.device_of(device)
        self.priority = priority
        self.streams.made.append(self)
        self.agent = Agent(name or f"stream {len(self.streams.made)} of {self.device}")
        self.cuda_stream = self.stream_id = id(self)

    def __repr__(self) -> str:
        return self.agent.name

    def wait_stream(self, other: Stream) -> None:
        self._wait(other, other.agent.clock)

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self._wait(event.stream, event.clock)

    def _wait(self, source: Stream, clock: dict[Agent, int]) -> None:
        with self.streams.machine.lock:
            self.agent.learn(self.streams.machine.host().clock)
            if not self.streams.ignore(self, source):
                self.agent.learn(clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event if event is not None else self.streams.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.streams.machine.wait("Stream.synchronize", self.agent.clock)

    def query(self) -> bool:
        return self.streams.over(self.agent.clock)

    def __enter__(self) -> Stream:
        self._context = self.streams.stream(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


class Event:
    """A point of a stream."""

    streams: Streams

    def __init__(self, *_: Any, **__: Any):
        self.stream: Stream | None = None
        self.clock: dict[Agent, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.streams.current(None)
        self.stream.agent.learn(self.streams.machine.host().clock)
        self.clock = dict(self.stream.agent.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.streams.current(None)).wait_event(self)

    def synchronize(self) -> None:
        self.streams.machine.wait("Event.synchronize", self.clock)

    def query(self) -> bool:
        return self.stream is None or self.streams.over(self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Streams:
    """All streams of a machine, and which of them are current."""

    def __init__(self, machine: Machine, ignore: Callable[[Stream, Stream], bool]):
        self.machine, self.ignore = machine, ignore
        self.made: list[Stream] = []  # default streams included
        self.Stream = type("Stream", (Stream,), {"streams": self})
        self.Event = type("Event", (Event,), {"streams": self})
        self._thread = threading.local()
        self.defaults = {i: self.Stream(i, name=f"main stream of cuda:{i}") for i in range(2)}
        self.own = len(self.made)

    @property
    def extra(self) -> list[Stream]:
        """Those that somebody made."""
        return self.made[self.own :]

    def over(self, clock: dict[Agent, int]) -> bool:
        """Whether the host hears that all that a clock knows is over. Then it knows it."""
        if self.machine.prompt:
            self.machine.host().learn(clock)
        return self.machine.prompt

    def device_of(self, device: Any) -> torch.device:
        if isinstance(device, Stream):
            device = device.device
        if device is None:
            return torch.device("cuda", self.current_device())
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        return torch.device("cuda", self.current_device()) if device.index is None else device

    def current_device(self) -> int:
        return getattr(self._thread, "device", 0)

    def current(self, device: Any = None) -> Stream:
        index = self.device_of(device).index
        return self._currents().get(index, self.defaults[index])

    def _currents(self) -> dict[int, Stream]:
        if not hasattr(self._thread, "streams"):
            self._thread.streams = {}
        return self._thread.streams

    def set_device(self, device: Any) -> None:
        self._thread.device = self.device_of(device).index

    def set_stream(self, stream: Stream) -> None:
        self._currents()[stream.device.index] = stream
        self._thread.device = stream.device.index

    @contextlib.contextmanager
    def device(self, device: Any):
        before = self.current_device()
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        if index is not None and index >= 0:
            self._thread.device = index
        try:
            yield
        finally:
            self._thread.device = before

    @contextlib.contextmanager
    def stream(self, stream: Stream | None):
        if stream is None:
            yield
            return
        before, device = self.current(stream.device), self.current_device()
        self.set_stream(stream)
        try:
            yield
        finally:
            self._currents()[stream.device.index] = before
            self._thread.device = device

    def synchronize(self, device: Any = None) -> None:
        place = self.device_of(device)
        for stream in self.made:
            if stream.device == place:
                self.machine.wait("torch.cuda.synchronize", stream.agent.clock)

    def replacements(self) -> dict[str, Any]:
        """By name, what stands in for torch.cuda's own."""
        return dict(
            Stream=self.Stream,
            Event=self.Event,
            current_stream=self.current,
            default_stream=lambda device=None: self.defaults[self.device_of(device).index],
            stream=self.stream,
            set_stream=self.set_stream,
            device=self.device,
            current_device=self.current_device,
            set_device=self.set_device,
            synchronize=self.synchronize,
            is_available=lambda: True,
            is_initialized=lambda: True,
            device_count=lambda: len(self.defaults),
            is_current_stream_capturing=lambda: False,
            get_device_capability=lambda device=None: (9, 0),
            get_device_name=lambda device=None: "a fake GPU",
            is_bf16_supported=lambda *_: True,
            empty_cache=lambda: None,
            init=lambda: None,
            _lazy_init=lambda: None,
        )
