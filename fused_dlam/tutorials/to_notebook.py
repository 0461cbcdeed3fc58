"""Makes the notebooks from the scripts: `python -m fused_dlam.tutorials.to_notebook` writes all of them anew.

A script is the one source. Its cells begin with `# %%`, and its docstring is the first:

    # %% [markdown]     text, in comments
    # %%                code for all workers and for the notebook itself: definitions
    # %% [notebook]     code of the notebook alone, in comments: a line with %px runs on all workers
    # %% [script]       code of the script alone

The notebook starts workers before its first code and ends them behind its last. Nothing is executed here.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from fused_dlam.tutorials import ALL

FOLDER = Path(__file__).parent
STARTING = """\
from fused_dlam.tools.notebook import workers

%matplotlib inline
team = workers({n})"""
HOW = """\
This notebook is made from [`{module}.py`]({module}.py). It starts {n} worker processes that stay, and talks to them: a
line that begins with `%px` runs on all of them, and so does a cell that begins with `%%px`, with `--local` here too. It
needs `pip install 'fused-dlam[notebook]'`."""


def cells(source: str) -> list[tuple[str, str]]:
    """(kind, text) of a script's cells; kind is "markdown", "notebook", "script" or "code"."""
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring is not None and "# %%" in source
    found = [("markdown", docstring)]
    for part in source.split("\n# %%")[1:]:
        mark, _, text = part.partition("\n")
        kind = mark.strip().strip("[]") or "code"
        if kind not in ("markdown", "notebook", "script", "code"):
            raise ValueError(f"a cell is marked {mark.strip()!r}: known are [markdown], [notebook] and [script]")
        if kind in ("markdown", "notebook"):
            wrong = [line for line in text.strip().splitlines() if line and not line.startswith("#")]
            if wrong:
                raise ValueError(f"in a [{kind}] cell every line is a comment, but one is {wrong[0]!r}")
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.strip().splitlines())
        found.append((kind, text.strip()))
    return found


def notebook(module: ModuleType) -> dict[str, Any]:
    """The notebook of a tutorial, as nbformat reads and writes it."""
    from nbformat import v4

    n, source = module.WORKERS, Path(module.__file__ or "").read_text()
    made: list[Any] = []
    for kind, text in cells(source):
        if kind == "markdown":
            made.append(v4.new_markdown_cell(text))
        elif kind != "script":
            made.append(v4.new_code_cell(text if kind == "notebook" else f"%%px --local\n{text}"))
    name = module.__name__.rpartition(".")[2]
    made[1:1] = [v4.new_markdown_cell(HOW.format(n=n, module=name)), v4.new_code_cell(STARTING.format(n=n))]
    made.append(v4.new_code_cell("team.close()"))
    for number, cell in enumerate(made):
        cell["id"] = f"cell-{number}"  # nbformat's are random
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def main() -> None:
    import nbformat

    for name in ALL:
        nbformat.write(notebook(importlib.import_module(f"fused_dlam.tutorials.{name}")), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
