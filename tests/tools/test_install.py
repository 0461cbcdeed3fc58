"""Promises about the package as it is installed, from a source distribution and far from the checkout:

- the sdist holds kernels/ as files, though the checkout reaches it by a link; a wheel built from it holds everything;
- the demo, the kernels and a user's own rule run from there;
- the checkout's tests and benchmarks are no part of it.

Nothing is downloaded: setuptools is taken from the environment.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("fused_dlam", "kernels", "pyproject.toml", "README.md", "LICENSE")
USER = """
import numpy as np
import torch
import fused_dlam
from my_rule import mine

assert fused_dlam.consensus_growth(mine, fused_dlam.topology.ring(4), 0.9) < 1
path = fused_dlam.simulate(mine, "ring", lambda step, x: x - np.arange(4.0)[:, None], np.zeros((4, 1)), 100, 0.01)
assert abs(path[-1].mean() - 1.5) < 0.1
net = torch.nn.Linear(3, 3)
optimizer = fused_dlam.GossipSGD(net.parameters(), lr=0.1, method=mine)
for _ in range(2):
    optimizer.zero_grad()
    net(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
print(fused_dlam.__file__)
"""
OUTSIDE = """
import importlib
for name in ("fused_dlam.tests", "fused_dlam.bench", "fused_dlam.fused_dlam"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")
"""


def run(*command, cwd, **env):
    """What it prints. Neither the checkout nor anything of the caller's is on the path but what `env` says."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**kept, **env}, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy of the checkout (a build leaves folders behind) and the wheel made of that sdist."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, source)
    run("-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})", cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    pip = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder))
    run(*pip, str(sdist), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The environment of a process that finds the installed package, and a folder to start it in."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(built[1]), cwd=elsewhere)
    shutil.copy(ROOT / "tests" / "rules" / "my_rule.py", elsewhere)
    return {"PYTHONPATH": str(site)}, elsewhere, site


def test_the_sdist_has_kernels_as_files(built):
    with tarfile.open(built[0]) as archive:
        members = {m.name.split("/", 1)[1]: m for m in archive.getmembers() if "/" in m.name}
    for name in sorted(p.name for p in (ROOT / "kernels").glob("*.py")):
        assert members[f"fused_dlam/kernels/{name}"].isreg() and members[f"fused_dlam/kernels/{name}"].size > 0
    assert not any(m.issym() or m.islnk() for m in members.values())


def test_the_wheel_has_every_module_and_page(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    wanted = {f"fused_dlam/{p.relative_to(ROOT / 'fused_dlam')}" for p in (ROOT / "fused_dlam").rglob("*.py")}
    wanted |= {f"fused_dlam/kernels/{p.relative_to(ROOT / 'kernels')}" for p in (ROOT / "kernels").rglob("*.py")}
    wanted.add("fused_dlam/py.typed")
    for pattern in ("*.md", "*.ipynb", "*.png"):
        wanted |= {f"fused_dlam/{p.relative_to(ROOT / 'fused_dlam')}" for p in (ROOT / "fused_dlam").rglob(pattern)}
    assert wanted <= names, wanted - names
    assert not [n for n in names if n.split("/")[0] in ("tests", "bench", "kernels")]


def test_the_demo_runs_from_elsewhere(installed):
    pytest.importorskip("sklearn")
    env, elsewhere, _ = installed
    demo = ("-m", "fused_dlam", "demo", "--workers", "2", "--steps", "4", "--out", "demo.png")
    assert "MI-DmSGD, one-peer" in run(*demo, cwd=elsewhere, **env)
    assert (elsewhere / "demo.png").stat().st_size > 10_000


def test_a_users_rule_runs_from_elsewhere(installed):
    env, elsewhere, site = installed
    (elsewhere / "user.py").write_text(USER)
    where = Path(run("user.py", cwd=elsewhere, **env).strip())
    assert where.resolve() == (site / "fused_dlam" / "__init__.py").resolve()


def test_tests_and_benchmarks_are_not_installed(installed):
    env, elsewhere, _ = installed
    run("-c", OUTSIDE, cwd=elsewhere, **env)
