"""bench/gpu.py from a bare copy of the checkout: every section runs, and a broken one breaks nothing but itself.

The package in the copy is marked, so that an installed one cannot be what ran.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
MARK = "0.bare.copy"


@pytest.fixture
def bare(tmp_path):
    """The folders that the benchmark needs, and nothing else of the checkout."""
    skip = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for folder in ("bench", "fused_dlam", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder, ignore=skip, symlinks=True)
    init = tmp_path / "copy" / "fused_dlam" / "__init__.py"
    text = init.read_text()
    marked = text.replace('__version__ = "', f'__version__ = "{MARK} ')
    assert marked != text
    init.write_text(marked)
    return tmp_path / "copy"


def run(bare, *options):
    """(exit code, what it printed, gpu.json)."""
    out = bare.parent / "out"
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "TRITON_INTERPRET")}
    command = [sys.executable, "-s", bare / "bench" / "gpu.py", "--smoke", "--out", out, *options]
    result = subprocess.run(command, cwd=bare.parent, env=env, capture_output=True, text=True)
    assert (out / "gpu.json").exists(), result.stdout[-3000:] + result.stderr[-3000:]
    return result.returncode, result.stdout, json.loads((out / "gpu.json").read_text())


@pytest.mark.slow
def test_every_section_runs_without_a_gpu(bare):
    code, printed, record = run(bare)
    assert code == 0, printed[-6000:]
    assert record["machine"]["fused_dlam"].startswith(MARK)
    sections = record["sections"]
    assert list(sections) == [
        "compile", "kernels", "audit", "bandwidth", "optimizer", "loopback", "staged", "training", "compiled",
        "simulation", "sanitizer",
    ]  # fmt: skip
    # Nothing can be found out about waits, and nothing is sanitized, without a device: that is not called passed.
    assert sections["audit"]["outcome"] == "ran"
    assert sections["sanitizer"]["outcome"] == "not here"
    rest = {name: s["outcome"] for name, s in sections.items() if name not in ("audit", "sanitizer")}
    assert set(rest.values()) <= {"passed", "not here"}, rest
    # No figure is given as if it had been measured.
    rows = [row for s in sections.values() for rows in s["tables"].values() for row in rows]
    timed = [row for row in rows for k in row if k in ("ms", "device_ms", "host_us", "gb_per_s") and row[k] is not None]
    assert not timed and not any(s["goals"] for s in sections.values())
    assert str(bare) not in json.dumps(record) and (bare.parent / "out" / "gpu.md").read_text().startswith("# ")


def replace(bare, name, body):
    text = "import os, signal, subprocess, sys, time\n\n\ndef run(record):\n" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    (bare / "bench" / "gpu_sections" / f"{name}.py").write_text(text)


def alive(pid):
    """Whether a process runs: one that was killed may still be waited for by nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_broken_section_breaks_nothing_but_itself(bare, tmp_path):
    replace(bare, "staged", "raise ArithmeticError('two and two')")
    # It hangs with a process of its own, after it has found something: that is kept, the process is not.
    replace(bare, "training", f"""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        record.check("found before it hung", True)
        time.sleep(600)
    """)  # fmt: skip
    replace(bare, "compiled", "os.kill(os.getpid(), signal.SIGSEGV)")
    replace(bare, "simulation", "record.check('four', 2 + 2 == 5, 'five')")
    replace(bare, "sanitizer", "record.check('last', True)")
    (bare / "bench" / "gpu_sections" / "loopback.py").write_text("import nowhere\n")
    names = ("loopback", "staged", "training", "compiled", "simulation", "sanitizer")
    code, printed, record = run(bare, "--only", ",".join(names), "--limit", "15")
    sections = record["sections"]
    assert code == 1
    assert {n: s["outcome"] for n, s in sections.items()} == {
        "loopback": "broken", "staged": "broken", "training": "broken", "compiled": "broken",
        "simulation": "failed", "sanitizer": "passed",
    }  # fmt: skip
    assert "nowhere" in sections["loopback"]["error"]
    assert sections["staged"]["error"] == "ArithmeticError: two and two"
    assert "gpu_sections/staged.py" in sections["staged"]["trace"]
    assert sections["training"]["error"] == "killed after 15 s"
    assert "training.py" in sections["training"]["trace"], "where it hung"
    assert sections["training"]["checks"][0]["holds"]
    assert sections["compiled"]["error"] == "died by SIGSEGV"
    assert "compiled.py" in sections["compiled"]["trace"]
    assert "FAILS: four five" in printed
    pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(pid)

    # Mended and run again alone it replaces its own results, and the others' are kept.
    replace(bare, "staged", "record.check('mended', True)")
    code, _, again = run(bare, "--only", "staged")
    assert code == 0
    assert again["sections"]["staged"]["outcome"] == "passed"
    others = [n for n in names if n != "staged"]
    assert [again["sections"][n] for n in others] == [sections[n] for n in others]


def test_what_is_not_known_is_refused(bare):
    command = [sys.executable, bare / "bench" / "gpu.py", "--only", "kernels,speed"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "unknown sections: speed" in result.stderr


def test_the_limits_fit_into_eight_minutes(bare):
    code = "from gpu_sections import SECTIONS; print(sum(s.limit for s in SECTIONS.values()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=bare / "bench", capture_output=True, text=True)
    assert 0 < int(result.stdout) < 480
