"""CUDA streams, host memory and the thread beside them. On CPU there are no streams, and the same calls run in order.

Who waits for whom, with CUDA tensors:

    main stream    backward ... g ready ---+                            +--> combine --> next forward
                                           |                            |
    lane stream                            +--> pack --> [NCCL] --wait--+        NCCL: `wait` orders streams only
                                                  |                     |
    gloo instead                                  +--> copy to host     +<-- copy to device
                                                         |  event              ^
    courier thread                                       +--> isend            |
    main thread, in step()                                        irecv.wait --+

The lane waits for the main stream before pack, and the main stream waits for the lane before combine. So a message
buffer is packed anew only after it was sent, and x is written only after every reader is done.

Host memory is taken anew for every copy. A copy to the device is queued behind the whole backward pass while the host
goes on: a kept buffer would be posted for the next step's message while the last one was still to be read from it.
torch's caching allocator gives pinned memory out again only after the copies that read it have run, in microseconds.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def host_like(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor, pinned if that is on a GPU. New every time: see above."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CUDA tensor's values on the host, once they are there: waits for what is queued on the current stream."""
    host = host_like(tensor).copy_(tensor, non_blocking=True)
    wait_for(tensor.device)
    return host


def wait_for(device: torch.device) -> None:
    """The host waits for what is queued on the device's current stream."""
    torch.cuda.current_stream(device).synchronize()


class Lane:
    """A CUDA stream beside the main one for pack and transport; on CPU, or if nothing is sent, nothing.

    Of high priority: what a neighbor waits for is not queued behind this rank's backward pass.
    """

    def __init__(self, device: torch.device, sends: bool = True):
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" and sends else None

    @contextmanager
    def outbound(self, writers: Iterable[torch.cuda.Stream] = ()) -> Iterator[None]:
        """Work in the body runs on the lane, after what was launched so far on the current stream and on `writers`."""
        if self._stream is None:
            yield
        else:
            for stream in {torch.cuda.current_stream(self._stream.device), *writers}:
                self._stream.wait_stream(stream)
            with torch.cuda.stream(self._stream):
                yield

    def join(self) -> None:
        """What is launched from now on on the current stream runs after the lane's work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Errand:
    """Something a courier does; `wait` raises what it raised."""

    def __init__(self, job: Callable[[], object]):
        self._job, self._done = job, threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._job()
        except BaseException as error:  # handed to whoever waits
            self._error = error
        self._done.set()

    def wait(self, timeout: float) -> None:
        if not self._done.wait(timeout):
            raise RuntimeError(f"no copy from the device within {timeout:g} s")
        if self._error is not None:
            raise self._error


class Courier:
    """One thread that posts sends in the order it is given them, as every rank must. It ends with its courier."""

    def __init__(self) -> None:
        self._queue, self.end = in_turn(self, "fused_dlam-courier")

    def run(self, job: Callable[[], object]) -> Errand:
        errand = Errand(job)
        self._queue.put(errand)
        return errand

    def finish(self, timeout: float) -> None:
        """Waits until everything was posted, and ends."""
        try:
            self.run(lambda: None).wait(timeout)
        except RuntimeError:  # the device does not come to an end: nothing more can be waited for
            pass
        self.end()


def in_turn(owner: object, name: str) -> tuple[queue.SimpleQueue, weakref.finalize]:
    """A queue, and what ends it: a thread has each thing that is put there `run()`, one after the other.

    It ends with its owner, too.
    """
    things: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_work, args=(things,), daemon=True, name=name).start()
    end = weakref.finalize(owner, things.put, None)  # SimpleQueue.put may be called by a collection
    end.atexit = False
    return things, end


def _work(things: queue.SimpleQueue) -> None:
    """The thread knows the queue alone: a thread that knew the owner, or its last thing, would keep both alive."""
    while _run(things.get()):
        pass


def _run(thing: Any) -> bool:
    if thing is not None:
        thing.run()
    return thing is not None
