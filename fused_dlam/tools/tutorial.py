"""`fused-dlam tutorial N`: starts the workers of a tutorial, which print what they find, and draws its picture."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import tutorials
from .cli import Parser, count, need, picture
from .launch import run_workers

WHAT_FOR = """\
Seven tutorials, from the first average to training. Each starts worker processes on this machine, prints what they find
and draws it. The scripts are made to be read: fused_dlam/tutorials/, with a page and a notebook for each.
"""


def main(argv: list[str]) -> int:
    options = parse(argv)
    if options.number is None:
        print("\n".join(f"  fused-dlam tutorial {title(module(n))}" for n in range(1, len(tutorials.ALL) + 1)))
        return 0
    tutorial = module(options.number)
    n = options.workers or tutorial.WORKERS
    print(f"Tutorial {title(tutorial)}: {n} worker processes, {tutorial.__name__}\n", flush=True)
    found = run_workers(work, n, tutorial.__name__)[0]
    tutorial.draw(found).savefig(options.out)
    print(f"\nPicture: {options.out.resolve()}")
    return 0


def work(rank: int, name: str) -> Any:
    """What one worker found."""
    return importlib.import_module(name).run()


def module(number: int) -> ModuleType:
    return importlib.import_module(f"{tutorials.__name__}.{tutorials.ALL[number - 1]}")


def title(tutorial: ModuleType) -> str:
    """The heading of its text: "2. Average consensus"."""
    return (tutorial.__doc__ or "").splitlines()[0].removeprefix("# ")


def parse(argv: list[str]) -> argparse.Namespace:
    last = len(tutorials.ALL)
    parser = Parser("fused-dlam tutorial", description=WHAT_FOR, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=count, nargs="?", help=f"which one, 1 to {last}; without it they are listed")
    parser.add_argument("--workers", type=count, help="worker processes, from 2 on (each has a number of its own)")
    parser.add_argument("--out", type=picture, help="the picture's file (fused-dlam-tutorial-N.png)")
    options = parser.parse_args(argv)
    if options.number is None:
        return options
    if options.number > last:
        parser.error(f"there are tutorials 1 to {last}, not {options.number}")
    if options.workers == 1:
        parser.error("--workers 1: one worker has no neighbors; take 2 or more")
    need(parser, "matplotlib", *(["sklearn.datasets"] if tutorials.ALL[options.number - 1] == "deep_learning" else []))
    options.out = options.out or Path(f"fused-dlam-tutorial-{options.number}.png")
    return options
