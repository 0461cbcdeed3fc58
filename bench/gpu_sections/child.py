"""The process of one section: imports, waits for its turn, runs, and leaves nothing behind.

    python -m gpu_sections.child NAME RECORD         started by bench/gpu.py, with a copy of the checkout on the path

All sections' processes import at once and wait, so that no section pays for it; a CUDA context is made at its turn.
Exit codes: 0 all checks hold, 1 some fail, 2 the section raised, 3 nobody called.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import traceback
from pathlib import Path

from .record import Record


def machine() -> dict[str, str]:
    """What the figures belong to."""
    import torch
    import triton

    import fused_dlam

    facts = {"torch": torch.__version__, "triton": triton.__version__, "fused_dlam": fused_dlam.__version__}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
        facts["memory_gb"] = f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.0f}"
        if torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts["cores"] = str(os.cpu_count())
    return facts


def prepare(record: Record) -> None:
    import torch

    from .device import DEVICE

    if DEVICE == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA device: --smoke runs without one")
        torch.cuda.set_device(0)
    record.more["machine"] = machine()


def trace() -> str:
    """Of what is being handled, its files as in the checkout."""
    return traceback.format_exc().replace(f"{Path.cwd()}{os.sep}", "")[-4000:]


def main() -> int:
    name, record = sys.argv[1], Record(Path(sys.argv[2]))
    # A section that hangs is asked where it is before it is killed; a signal's trace goes to the log as well.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        import fused_dlam

        here = Path(fused_dlam.__file__).resolve()
        if not here.is_relative_to(Path.cwd().resolve()):
            raise ImportError(f"{here} was imported in place of the copy in {Path.cwd()}")
        section = importlib.import_module(f"gpu_sections.{name}")
    except BaseException as error:
        record.raised(f"{type(error).__name__}: {error}"[:600], trace())
        return 2
    if sys.stdin.readline() != "go\n":
        return 3
    try:
        if not getattr(section, "FORKS", False):  # a process that has touched the device cannot fork others that do
            prepare(record)
        section.run(record)
        prepare(record)
    except BaseException as error:
        traceback.print_exc()
        record.raised(f"{type(error).__name__}: {error}"[:600], trace())
        return 2
    record.save()
    return 1 if record.failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # destructors of a broken context, or of a process group, may hang
