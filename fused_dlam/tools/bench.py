"""`fused-dlam bench`: a short form of bench/exchange.py and bench/train.py with worker processes on this machine.

Both live in a source checkout, in bench/; run them there for their options, by torchrun, or on rate-limited hosts
(bench/netlab.py). On one machine messages cost processor time, not bandwidth: ratios on a real network differ.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from .cli import Parser, count

FOLDER = Path(__file__).resolve().parent.parent / "bench"


def load(name: str) -> ModuleType:
    """A benchmark from bench/, under its own name so that worker processes can import it too."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("fused-dlam bench", description=__doc__.split(": ", 1)[1].split("\n\n")[0])
    parser.add_argument("--workers", type=count, default=4, help="worker processes (4)")
    options = parser.parse_args(argv)
    if not (FOLDER / "exchange.py").is_file():
        parser.error("the benchmarks are in a source checkout, in bench/; this is an installed package without them")
    workers = str(options.workers)
    print("One exchange (bench/exchange.py --quick):\n")
    code = load("exchange").main(["--workers", workers, "--quick"])
    print("\nOne training step (bench/train.py):\n")
    short = ["--mb", "8.4", "--compute", "0.2", "--rounds", "2", "--steps", "3"]
    return load("train").main(["--workers", workers, *short]) or code
