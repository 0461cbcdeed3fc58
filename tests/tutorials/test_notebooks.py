"""Promises of the notebooks and of the workers that they start.

- the notebooks are those that `to_notebook` makes of the scripts, with no output that no run has made;
- they run: workers that stay answer `%px`, and are gone when the notebook is through;
- workers that cannot start say why and leave no process; those of a notebook that is killed end by themselves;
- a worker that fails, or waits for one that does not come, is an error within the timeout, and they go on after it.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_dlam import tutorials
from fused_dlam.tools.notebook import workers
from fused_dlam.tutorials import to_notebook

FOLDER = Path(tutorials.__file__).parent


def made(name):
    pytest.importorskip("nbformat")
    return to_notebook.notebook(importlib.import_module(f"fused_dlam.tutorials.{name}"))


@pytest.mark.parametrize("name", tutorials.ALL)
def test_notebooks_are_made_of_the_scripts(name):
    """If this fails: python -m fused_dlam.tutorials.to_notebook."""
    notebook = made(name)
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(notebook)
    assert nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) == notebook
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert any("%px" in cell.source for cell in code[1:-1]) and code[-1].source == "team.close()"


def test_cells():
    parts = ('"""Title"""\n', "[markdown]\n# ## A\n#\n#     x\n", "\na = 1\n\n", "[notebook]\n# %px b\n", "[script]\nc")
    source = "\n# %% ".join(parts)
    kinds = [("markdown", "Title"), ("markdown", "## A\n\n    x"), ("code", "a = 1"), ("notebook", "%px b")]
    assert to_notebook.cells(source) == [*kinds, ("script", "c")]
    with pytest.raises(ValueError, match="marked '\\[text\\]'"):
        to_notebook.cells('"""T"""\n\n# %% [text]\n# a\n')
    with pytest.raises(ValueError, match="every line is a comment"):
        to_notebook.cells('"""T"""\n\n# %% [markdown]\na = 1\n')


def executed(name, tmp_path, n=None):
    """The notebook after a run, with n workers. Engines find the package where this process does."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipyparallel")
    pytest.importorskip("ipykernel")
    notebook = made(name)
    if n is not None:
        (starting,) = [cell for cell in notebook.cells if "team = workers(" in cell.source]
        starting.source = starting.source.replace(f"workers({tutorials_module(name).WORKERS})", f"workers({n})")
        notebook.cells.insert(-1, pytest.importorskip("nbformat").v4.new_code_cell(PIDS))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, resources=resources).execute()
    return notebook


PIDS = "print('pids', *team.view.apply_sync(__import__('os').getpid))"


def tutorials_module(name):
    return importlib.import_module(f"fused_dlam.tutorials.{name}")


def outputs(notebook):
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in found)
    return text, [o for o in found if "image/png" in o.get("data", {})]


def assert_ended(pids, seconds=20.0):
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.fixture(autouse=True)
def python_path(monkeypatch):
    """Kernels and engines are processes of their own."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))


def test_a_notebook_runs(tmp_path):
    text, pictures = outputs(executed("hello", tmp_path, n=2))
    assert "Hello, I am worker 0 of 2.\nHello, I am worker 1 of 2." in text and len(pictures) == 1
    assert "rank 0 has (2,), rank 1 has (3,)" in text
    pids = [int(word) for word in re.search(r"pids ([\d ]+)", text)[1].split()]
    assert len(pids) == 2
    assert_ended(pids)


@pytest.mark.slow
@pytest.mark.parametrize("name", os.environ.get("NOTEBOOKS", "").split() or tutorials.ALL)
def test_notebooks_run(name, tmp_path):
    pytest.importorskip("sklearn")
    text, pictures = outputs(executed(name, tmp_path))
    assert len(pictures) == 1 and "Error" not in text.replace("ValueError: the workers do not agree", "")


# -- the workers -------------------------------------------------------------------------------------------------------


def test_wrong_calls(monkeypatch):
    for n in (0, -1, 2.0, True, "two"):
        with pytest.raises(ValueError, match="whole number from 1 on"):
            workers(n)
    monkeypatch.setitem(sys.modules, "ipyparallel", None)
    with pytest.raises(ImportError, match=r"pip install 'fused-dlam\[notebook\]'"):
        workers(2)


def children():
    psutil = pytest.importorskip("psutil")
    return [p.pid for p in psutil.Process().children(recursive=True) if "ipyparallel" in " ".join(p.cmdline())]


@pytest.mark.slow
def test_workers_that_do_not_start_in_time_leave_nothing():
    pytest.importorskip("ipyparallel")
    with pytest.raises(RuntimeError, match="2 workers have not started .* a longer deadline than 1 s"):
        workers(2, deadline=1)
    assert_ended(children())


@pytest.mark.slow
def test_workers_go_on_after_an_error():
    ipyparallel = pytest.importorskip("ipyparallel")
    with workers(2, timeout=5) as team:
        team.view.execute("import torch, fused_dlam, time")
        with pytest.raises(ipyparallel.error.CompositeError, match="one of us"):
            team.view.execute("if rank == 1: raise ValueError('one of us')")
        alone = "if rank == 0: fused_dlam.neighbor_allreduce(torch.ones(3), 'ring', timeout=3)"
        start = time.monotonic()
        with pytest.raises(ipyparallel.error.CompositeError, match="ExchangeError"):
            team.view.execute(alone)
        assert time.monotonic() - start < 60
        again = workers(2)  # ends the others, after which a world is there that nobody has disturbed
        again.view.execute("import torch, fused_dlam")
        again.view.execute("x = fused_dlam.neighbor_allreduce(torch.tensor([float(rank)]), 'ring')")
        assert [x.item() for x in again.pull_all("x")] == [0.5, 0.5] and again.pull("n", rank=1) == 2
        again.close()
        assert "ended" in repr(team) and "ended" in repr(again)
    assert_ended(children())


@pytest.mark.slow
def test_workers_of_a_killed_notebook_end_by_themselves():
    pytest.importorskip("ipyparallel")
    psutil = pytest.importorskip("psutil")
    code = "from fused_dlam.tools.notebook import workers; team = workers(2); print(1, flush=True); input()"
    notebook = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert notebook.stdout.readline() == "1\n"
        family = [p.pid for p in psutil.Process(notebook.pid).children(recursive=True)]
        assert len(family) > 3
    finally:
        os.kill(notebook.pid, signal.SIGKILL)
        notebook.wait()
    assert_ended(family)
