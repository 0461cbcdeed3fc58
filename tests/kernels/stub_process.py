"""Processes with the stub driver: a driver is installed for a whole process, so that the tests start their own.

A call is (module, function, arguments...): such a process imports the module, one of the tests', and calls its function
with the stub. `python stub_process.py FOLDER CALLS` is that process.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

# The short calls, by the name of what they find. One process serves all: it takes seconds until Triton is there.
SHORT = {
    "subset": ("test_stub_launch", "stub_matrix", ["dsgd", "adamw"], [0, 3], [1]),
    "rates": ("test_stub_builds", "stub_rates", False),
    "constant rates": ("test_stub_builds", "stub_rates", True),
    "warm": ("test_stub_builds", "stub_warm", False, False),
    "warm, skips": ("test_stub_builds", "stub_warm", True, False),
    "warm, low": ("test_stub_builds", "stub_warm", False, True),
    "low": ("test_stub_buffers", "stub_low"),
    "default": ("test_stub_builds", "stub_default"),
    "addresses": ("test_stub_buffers", "stub_addresses"),
    "wrong": ("test_stub_buffers", "stub_wrong"),
    "streams": ("test_stub_buffers", "stub_streams"),  # the last one: it replaces functions of torch.cuda
}


def skip_unless_possible():
    """Skips the test module that calls this."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.skip("TRITON_INTERPRET=1 launches nothing", allow_module_level=True)
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler, as Triton does", allow_module_level=True)


def start(folder, *calls):
    """A process that makes these calls."""
    command = [sys.executable, __file__, folder, json.dumps(calls)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process):
    """What the functions returned, in their order, or why one did not."""
    out, errors = process.communicate()
    assert process.returncode == 0, out[-2000:] + errors[-4000:]
    return json.loads(out.splitlines()[-1])


def main(folder, calls):
    import stub_driver

    stub, found = stub_driver.install(Path(folder)), []

    from fused_dlam.kernels import triton_kernels

    for module, function, *arguments in json.loads(calls):
        stub.forget(triton_kernels._pack_kernel, triton_kernels._combine_kernel)
        try:
            found.append(getattr(importlib.import_module(module), function)(stub, *arguments))
        except Exception:
            found.append(traceback.format_exc())
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
