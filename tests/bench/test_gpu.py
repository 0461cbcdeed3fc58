"""What only a device shows: the sections of bench/gpu.py that have something to assert, on this machine's GPU.

They run as the benchmark runs them, each in a process of its own: a CUDA error that sticks, or a hang, fails its own
test and no other.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[2]
#: Without `compile` the first launches of all others would build their kernels one by one, within their limits.
SECTIONS = ("compile", "kernels", "audit", "loopback", "staged", "compiled", "sanitizer")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the sections found, by name."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--only", ",".join(SECTIONS), "--out", out]
    result = subprocess.run(command, capture_output=True, text=True)
    path = out / "gpu.json"
    assert path.exists(), result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(path.read_text())["sections"]


@pytest.mark.parametrize("name", SECTIONS)
def test_section(found, name):
    section = found[name]
    if "absent" in section:
        pytest.skip(section["absent"])
    assert "error" not in section, f"{section['error']}\n{section.get('trace', '')}"
    failed = [f"{c['what']}: {c['detail']}" for c in section["checks"] if not c["holds"]]
    assert section["checks"] and not failed, "\n".join(failed)
