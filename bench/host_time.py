"""Host time of a step with the Triton kernels, without a GPU: Triton's own launcher on a driver that launches nothing.

    python bench/host_time.py

ResNet-50's 161 parameters, 25.6M, on CPU tensors. Counted is the processor time of `step()`: hooks,
checks, kernel launches, the exchange's calls (two workers in torch's fake group, whose messages take no time). What a
GPU adds (streams, events, NCCL's launches) is not in it, and the backward pass's hooks are not either.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "kernels"))

import stub_driver
import torch
import torch.distributed as dist
from gpu_sections.models import resnet50_shapes


def microseconds(step, prepare, rounds: int) -> float:
    """Median processor time of `step()`; `prepare()` runs before each and is not counted."""
    times = []
    gc.disable()
    for _ in range(rounds + 20):
        prepare()
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    gc.enable()
    return 1e6 * statistics.median(times[20:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stub_driver.build(Path(folder))
        stub = stub_driver.install(Path(folder))
        measure(stub, rounds)


def measure(stub: stub_driver.Stub, rounds: int) -> None:
    import triton
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import fused_dlam
    from fused_dlam.engine import observed
    from fused_dlam.kernels import passes as backend
    from fused_dlam.kernels.triton_passes import TritonPasses

    shapes = resnet50_shapes()
    # As if the parameters were on a GPU. Not `choose`, which the engine has imported by now.
    backend._on_cpu = lambda rule, device, guard: (TritonPasses(rule, device, guard=guard), None)
    nothing = torch.zeros(1)
    observed.fingerprint = lambda flat: nothing  # a GPU takes none of what is sent as it lies
    print(f"torch {torch.__version__}, triton {triton.__version__}, {len(shapes)} parameters")
    ways = {"one worker": {}, "two workers, atc": {"overlap": False}, "two workers, awc": {"schedule": "awc"}}
    for what, options in ways.items():
        if options and not dist.is_initialized():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = fused_dlam.GossipSGD(params, lr=0.1, weight_decay=1e-4, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        grads = [p.grad for p in params]

        def backward(optimizer=optimizer, grads=grads):
            optimizer.zero_grad(set_to_none=False)
            torch._foreach_add_(grads, 1.0)

        before = stub.launches
        backward()
        optimizer.step()
        launches = stub.launches - before
        us = microseconds(optimizer.step, backward, rounds)
        buckets = len(optimizer._engine.buckets)
        print(f"{what:28} {us:7.0f} us   {launches} kernels of ours in {buckets} buckets")


if __name__ == "__main__":
    main()
