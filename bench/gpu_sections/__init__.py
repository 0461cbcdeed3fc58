"""The sections of bench/gpu.py, each a module with `run(record)` that runs in a process of its own (see child.py).

In order of value, with the seconds each may take. The limits add up to less than eight minutes: a section that hangs
costs itself and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    limit: int  # seconds; expected is about half of it
    what: str


SECTIONS = {
    "compile": Section(55, "every rule's passes built on all cores, into the cache that the later sections load from"),
    "kernels": Section(50, "passes against float64, own message bit-equal, beyond 2^31 elements, NaN and denormals"),
    "audit": Section(45, "hidden waits, launches, host time and memory of a step, by option"),
    "bandwidth": Section(45, "pack, combine and AWC's one pass against a copy, torch's SGD and in-place torch"),
    "optimizer": Section(25, "step() on the parameters of ResNet-50 and GPT-124M against torch's optimizers"),
    "loopback": Section(45, "NCCL, one rank that sends to itself: bit-equal to one worker, under injected delays"),
    "staged": Section(35, "4 processes on one device over gloo against the float64 simulation"),
    "training": Section(50, "ResNet-18 and GPT-124M: time per step, peak memory, losses"),
    "compiled": Section(50, "torch.compile, loss scalers, graphed backward, FSDP2 over one rank"),
    "simulation": Section(30, "8 workers simulated on the device: digits, by method and graph"),
    "sanitizer": Section(30, "compute-sanitizer over masked kernels"),
}
