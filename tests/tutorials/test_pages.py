"""Promises of the tutorials' pages and commands.

- every tutorial has a page with the command and what it prints, a picture below 60 kB, a script and a notebook;
- what the pages show is what the command prints: the same words, numbers within 2 %, errors of rounding below 1e-10;
- `fused-dlam tutorial` lists them, runs one by real processes, and says in one line what is wrong with a call;
- torchrun starts one too, and without a launcher it says how.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from same_figures import differences

from fused_dlam import tutorials
from fused_dlam.tools.cli import main
from fused_dlam.tutorials.to_pages import block

FOLDER = Path(tutorials.__file__).parent
NUMBERS = range(1, len(tutorials.ALL) + 1)
# Of asynchrony no two runs are alike; accuracies of other processors differ by an image or two.
TOLERANCES = {
    "asynchrony": {"ignore": r"worker|Lost|steps|seconds"},
    "deep_learning": {"rel": 0.05, "ignore": r"Their accuracies"},
}


def shown(number):
    return block((FOLDER / f"{tutorials.ALL[number - 1]}.md").read_text(), number)[1]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_tutorial_has_its_page_and_picture(number):
    name = tutorials.ALL[number - 1]
    page, index = (FOLDER / f"{name}.md").read_text(), (FOLDER / "README.md").read_text()
    assert page.startswith(f"# {number}. ") and len(shown(number).splitlines()) >= 3
    for link in (f"{name}.py", f"{name}.ipynb", f"{name}.md"):
        assert f"({link})" in index and (link in page or link.endswith(".md"))
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page):
        assert (FOLDER / link).exists(), link
    picture = FOLDER / f"{name}.png"
    assert f"({name}.png)" in page and 5_000 < picture.stat().st_size < 60_000
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_is_around_the_block_of_a_page_stays():
    for lines in ("", "\n  a\nb"):
        page = f"# 2. T\n\n```text\n$ fused-dlam tutorial 2{lines}\n```\n\ntext\n\n```python\n```\n"
        before, text, after = block(page, 2)
        assert text == lines.removeprefix("\n") and after == "\n```\n\ntext\n\n```python\n```\n"
        assert block(before + "new" + after, 2) == (before, "new", after)
    with pytest.raises(ValueError, match="no block"):
        block(page, 3)


def test_figures_that_differ_are_found():
    text = "  a: error 1.0e-16 after 3 steps\nrate 0.8047, 5e-04"
    assert differences(text, text.replace("1.0e-16", "2.3e-16").replace("a:", " a:")) == []
    assert differences(text, text.replace("0.8047", "0.81")) == []
    for wrong in (text.replace("0.8047", "0.9"), text.replace("after", "by"), text.replace("1.0e-16", "1.0e-8"),
                  text + "\nmore", text.replace("3 steps", "4 steps"), text.replace("e-04", "e-03")):  # fmt: skip
        assert differences(text, wrong), wrong


def run(*command, timeout=120, **options):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout, **options)


def test_the_command_runs_a_tutorial(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["tutorial", "1", "--workers", "2", "--out", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Tutorial 1. Workers: 2 worker processes") and str(tmp_path / "out.png") in out
    assert (tmp_path / "out.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_the_pages_show_what_the_commands_print(number, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    done = run("-m", "fused_dlam", "tutorial", str(number), "--out", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    first, *lines, last = done.stdout.strip().splitlines()
    name = tutorials.ALL[number - 1]
    assert first.startswith(f"Tutorial {number}. ") and last == f"Picture: {tmp_path / 'out.png'}"
    assert differences(shown(number), "\n".join(lines), **TOLERANCES.get(name, {})) == []
    assert (tmp_path / "out.png").stat().st_size > 5_000


@pytest.mark.slow
def test_torchrun_starts_a_tutorial(tmp_path):
    pytest.importorskip("matplotlib")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    done = run(*launch, "-m", "fused_dlam.tutorials.hello", "--out", str(tmp_path / "out.png"))
    assert done.returncode == 0, done.stderr
    assert "Hello, I am worker 2 of 3." in done.stdout and (tmp_path / "out.png").stat().st_size > 5_000


def test_without_a_launcher_it_says_how(monkeypatch, capsys):
    from fused_dlam.tutorials import consensus, worker

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["consensus.py"])
    with pytest.raises(SystemExit) as exit:
        worker.main(consensus.__name__)
    assert exit.value.code == 2
    assert "torchrun --nproc-per-node 8 -m fused_dlam.tutorials.consensus" in capsys.readouterr().err


def test_the_command_lists_the_tutorials(capsys):
    assert main(["tutorial"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(". ")[0] for line in lines] == [f"  fused-dlam tutorial {n}" for n in NUMBERS]


WRONG = [
    ("tutorial 8", "there are tutorials 1 to 7, not 8"),
    ("tutorial 0", "at least 1"),
    ("tutorial two", "whole number"),
    ("tutorial 2 --workers 1", "no neighbors"),
    ("tutorial 2 --out no/such/folder/out.png", "no folder"),
    ("timeline --workers 1", "sends nothing"),
    ("timeline --out out.txt", "ending in .png"),
    ("timeline --trace no/such/folder/trace.json", "no folder"),
]


@pytest.mark.parametrize("line, message", WRONG)
def test_a_wrong_call_is_one_line_and_exit_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and message in err and err.count("\n") == 1
