"""Training steps on fake GPUs: a backward pass whose order, streams and threads the test chooses.

Autograd does not run on fake tensors. What it does to an optimizer is played instead: kernels that read parameters,
fresh gradients that are handed over or added to those that are there, the hooks after each, and at the end the caller's
stream waits for every stream that accumulated a gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from fake_cuda import Machine
from fake_transport import Network

RESNET_50 = (((8, 3, 3, 3), (8,), (8,)) * 53) + ((10, 8), (10,))  # as many parameters, of as many dimensions: 161
SHAPES = ((16, 17), (16,)) * 4  # with BUCKET_MB four buckets of a weight and a bias, in 32 and in 16 bits
BUCKET_MB = 5e-4


def parameters(shapes: Sequence[Sequence[int]] = SHAPES, dtype=torch.float32, devices=("cuda:0",)) -> list:
    """Parameters in order, the first ones on the first device."""
    places = [devices[i * len(devices) // len(shapes)] for i in range(len(shapes))]
    return [
        torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=d)) for shape, d in zip(shapes, places, strict=True)
    ]


class Steps(NamedTuple):
    machine: Machine
    network: Network
    optimizer: Any
    training: Training


@contextmanager
def training(
    make: Callable[[list], Any],
    *,
    ranks: int = 2,
    config: str = "cuda:nccl",
    name: str = "nccl",
    machine_ranks: int | None = None,
    shapes: Sequence[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    devices: Sequence[str] = ("cuda:0",),
    scaler: bool = False,
    **more: Any,
) -> Iterator[Steps]:
    """An optimizer over fake parameters, and all that it runs on."""
    machine = Machine()
    with machine, Network(machine, ranks, config, name, machine_ranks) as network:
        params = parameters(shapes, dtype, devices)
        optimizer = make(params)
        scale = torch.amp.GradScaler("cuda") if scaler else None
        yield Steps(machine, network, optimizer, Training(machine, params, optimizer, scaler=scale, **more))


class Training:
    """Steps of an optimizer over parameters.

    Args:
        streams: gradients are accumulated on these in turn, in place of the current stream.
        threads: one autograd thread per device, as in torch.
        absent: the numbers of parameters that get no gradient.
        to_none: how `zero_grad` forgets gradients.
        meddle: what the script does between the backward pass and step(), given the step's number.
    """

    def __init__(
        self,
        machine: Machine,
        params: list[torch.nn.Parameter],
        optimizer: Any,
        streams: Sequence[Any] = (),
        threads: bool = False,
        absent: Sequence[int] = (),
        to_none: bool = True,
        scaler: Any = None,
        meddle: Callable[[int], None] | None = None,
    ):
        self.meddle, self.steps = meddle, 0
        self.machine, self.params, self.optimizer, self.streams = machine, params, optimizer, streams
        self.threads, self.absent, self.to_none, self.scaler = threads, absent, to_none, scaler

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.to_none)
        self.forward()
        self.backward()
        if self.meddle is not None:
            self.meddle(self.steps)
        self.steps += 1
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def forward(self) -> None:
        with torch.no_grad():
            for p in self.params:
                p * 2

    def backward(self) -> None:
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=self.params[0].device))
        main = {p.device: torch.cuda.current_stream(p.device) for p in self.params}
        for stream in self.streams:
            stream.wait_stream(main[stream.device])
        devices = sorted(main, key=str)
        if self.threads:
            errors: list[BaseException] = []
            for device in reversed(devices):  # one after the other; `test_streams` has two at once
                thread = threading.Thread(target=self._backward_of, args=([device], errors), name=f"autograd {device}")
                thread.start()
                thread.join()
                self.machine.host().learn(thread.host.clock)  # type: ignore[attr-defined]
            if errors:
                raise errors[0]
        else:
            self._backward_of(devices)
        for stream in self.streams:
            main[stream.device].wait_stream(stream)

    def _backward_of(self, devices: Sequence[torch.device], errors: list | None = None) -> None:
        threading.current_thread().host = self.machine.host()  # type: ignore[attr-defined]
        try:
            for k in reversed(range(len(self.params))):
                if self.params[k].device in devices and k not in self.absent:
                    self.accumulate(k)
        except BaseException as error:
            if errors is None:
                raise
            errors.append(error)

    def accumulate(self, k: int) -> None:
        """What autograd does when the gradient of a parameter is there."""
        p = self.params[k]
        on = torch.cuda.stream(self.streams[k % len(self.streams)]) if self.streams else torch.cuda.device(p.device)
        with on if p.is_cuda else nullcontext():
            with torch.no_grad():
                grad = p * p
                if p.grad is None:
                    p.grad = grad
                else:
                    p.grad.add_(grad)
            del grad  # autograd keeps none: what is not in p.grad is freed
            for hook in list((p._post_accumulate_grad_hooks or {}).values()):
                hook(p)
