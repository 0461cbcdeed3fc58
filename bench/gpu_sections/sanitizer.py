"""compute-sanitizer's memcheck over masked kernels: does one read or write outside its buffers?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from .device import SMOKE
from .record import Record

PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin", *(os.environ.get(v, "") + "/bin" for v in ("CUDA_HOME", "CUDA_PATH")))
SECONDS = 27  # less than the section's limit: that it takes too long is to be said, not shown by a killed process


def tool() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ.get("PATH", ""), *PLACES)))


def launch() -> None:
    """Masked and odd launches of four rules, in the process that the tool watches."""
    from .device import synchronize
    from .trial import Case, Trial

    for name in ("pc-dmsgd", "dsgd", "da-dmsgd", "adamw"):
        for wire in ("float32", "bfloat16"):
            for n, offset in ((1025, 0), (1, 0), (1031, 1)):
                trial = Trial(Case(name, 1, "float32", wire), n, offset)
                trial.pack()
                trial.combine()
    synchronize()


def run(record: Record) -> None:
    found = tool()
    if SMOKE:
        record.absent("needs a GPU and compute-sanitizer")
        return
    if found is None:
        record.absent("compute-sanitizer is not on this machine")
        return
    # Every tensor is an allocation of its own then: what lies behind it belongs to nobody.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [found, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "gpu_sections.sanitizer"]
    try:
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        record.absent(f"compute-sanitizer did not finish within {SECONDS} s")
        return
    text = (result.stdout + result.stderr).strip()
    summary = next((line.strip("= ") for line in text.splitlines() if "ERROR SUMMARY" in line), "no summary")
    if result.returncode not in (0, 9) and "ERROR SUMMARY" not in text:
        record.absent(f"compute-sanitizer cannot run here: {text[-200:]}")
        return
    record.check("memcheck finds nothing", result.returncode == 0, f"{summary}; {text[-300:]}")
    record.line(f"24 masked launches of each pass: {summary}")


if __name__ == "__main__":
    launch()
