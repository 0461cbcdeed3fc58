"""Promises of run_workers: workers run the very package that their parent runs, and an error of theirs is raised."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import example_workers as workers
import pytest

from fused_dlam.tools import launch
from fused_dlam.tools.launch import run_workers

ROOT = Path(__file__).resolve().parents[2]

PARENT = """
import os, sys
sys.path.insert(0, sys.argv[1])

def where(rank):
    import fused_dlam
    import fused_dlam.kernels
    return fused_dlam.__file__, fused_dlam.kernels.__file__

if __name__ == "__main__":
    from fused_dlam.tools.launch import run_workers
    places = [where(0), *run_workers(where, 2, deadline=120)]
    print(*{os.path.realpath(p) for pair in places for p in pair}, sep="\\n")
"""


@pytest.mark.slow
def test_workers_run_the_copy_that_their_parent_runs(tmp_path):
    """The parent puts a copy first on sys.path. Another one is installed: here PYTHONPATH stands for that."""
    skip = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "fused_dlam", tmp_path / "copy" / "fused_dlam", ignore=skip)
    shutil.copytree(ROOT / "kernels", tmp_path / "copy" / "fused_dlam" / "kernels", ignore=skip)
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "elsewhere" / "parent.py"
    script.write_text(PARENT)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "copy"], cwd=script.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    copy = (tmp_path / "copy" / "fused_dlam").resolve()
    assert set(done.stdout.splitlines()) == {str(copy / "__init__.py"), str(copy / "kernels" / "__init__.py")}


def test_an_error_of_a_worker_is_raised():
    with pytest.raises(Exception, match="ArithmeticError: two and two"):
        run_workers(workers.fails, 2, deadline=60)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        run_workers(workers.fails, 0)


def test_a_start_that_did_not_connect_is_made_once_more(monkeypatch):
    """And not twice; what the workers' function raises is no such start, see above."""
    starts = []

    def run(*args):
        starts.append(args)
        raise launch._NotConnected("closed by peer")

    monkeypatch.setattr(launch, "_run", run)
    with pytest.raises(RuntimeError, match="closed by peer"):
        run_workers(workers.fails, 2)
    assert len(starts) == 2
