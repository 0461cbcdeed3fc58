"""Where a section runs, and how it is measured. Without a GPU (--smoke) everything runs once and nothing is timed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SMOKE = os.environ.get("GPU_SMOKE") == "1"
DEVICE = "cpu" if SMOKE else "cuda"
WARM = 3  # rounds that are not counted
CYCLES = 1.7e6  # of the device's clock in a millisecond, about


def synchronize() -> None:
    if not SMOKE:
        torch.cuda.synchronize()


def sleep(milliseconds: float) -> None:
    """On the current stream of the device; the host goes on."""
    if not SMOKE:
        torch.cuda._sleep(int(milliseconds * CYCLES))


def free() -> None:
    """Gives back the memory of optimizers that are gone, which are cycles of objects, and what the allocator keeps."""
    gc.collect()
    if not SMOKE:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def device_ms(ways: dict[str, Callable[[], object]], rounds: int = 15, ahead: float = 0.3) -> dict[str, float | None]:
    """Median milliseconds on the device, all ways in turn in every round, with nothing of theirs in the L2 cache.

    The device sleeps before it is timed, for `ahead` milliseconds: all that a way launches is queued when it wakes.
    """
    if SMOKE:
        for run in ways.values():
            run()
        return dict.fromkeys(ways)
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + WARM):
        for name, run in ways.items():
            flush.zero_()
            sleep(ahead)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn >= WARM:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def host_us(run: Callable[[], object], rounds: int = 30) -> float | None:
    """Median microseconds until the call returns, with an idle device."""
    if SMOKE:
        run()
        return None
    times = []
    for _ in range(rounds + WARM):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times[WARM:])


@contextlib.contextmanager
def _sync_mode(mode: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def hidden_waits(build: Callable[[], Callable[[], object]]) -> list[str]:
    """Where the host waits for the device in a step of what `build` returns, after a few steps: file:line, innermost
    first. torch's own mode "error" tells whether there is any; a step that it broke off is not gone on with, so a
    second object in mode "warn" lists them all."""
    run = build()
    for _ in range(WARM):
        run()
    if SMOKE:
        return []
    torch.cuda.synchronize()
    try:
        with _sync_mode("error"):
            run()
        return []
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:  # an exchange wraps what was raised in it
            cause = cause.__cause__
        found = [_place(traceback.extract_tb(cause.__traceback__))]
    del run
    free()
    run = build()
    for _ in range(WARM):
        run()
    torch.cuda.synchronize()

    def collect(message, *_args, **_kwargs):
        if "synchroniz" in str(message):
            found.append(_place(traceback.extract_stack()))

    with warnings.catch_warnings(), _sync_mode("warn"):
        warnings.simplefilter("always")
        warnings.showwarning = collect
        run()
    return list(dict.fromkeys(found))


def _place(stack: traceback.StackSummary) -> str:
    ours = [f for f in stack if "fused_dlam" in Path(f.filename).parts]
    where = (ours or list(stack))[-1]
    return f"{Path(where.filename).name}:{where.lineno} {where.line or ''}".strip()


def traced(run: Callable[[], object]) -> list[dict]:
    """What ran on the device meanwhile: kernels, copies and fills, as the profiler's trace has them."""
    if SMOKE:
        run()
        return []
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def peak_bytes(run: Callable[[], object]) -> int | None:
    """The most memory allocated during the call, what is allocated at its start included."""
    if SMOKE:
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
