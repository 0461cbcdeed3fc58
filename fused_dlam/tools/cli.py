"""The command `fused-dlam`: one line per subcommand, each a module with `main(argv) -> int`, imported when asked for.

    fused-dlam demo                             train on handwritten digits, here and now
    fused-dlam topology exponential -n 64       what a graph costs, and which methods are stable on it
    fused-dlam COMMAND --help                   the options of a command

`python -m fused_dlam` is the same.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import NoReturn

COMMANDS = {
    "demo": ("fused_dlam.tools.demo", "train on handwritten digits with worker processes on this machine"),
    "topology": ("fused_dlam.tools.describe", "what a graph costs per step, and which methods are stable on it"),
    "compare": (
        "fused_dlam.tools.compare",
        "distance to the optimum of any methods on any graphs, and the bias's exponents",
    ),
    "bench": ("fused_dlam.tools.bench", "exchange and training step against all-reduce, on this machine"),
    "gate": ("fused_dlam.kernels.gate.command", "compile every kernel and hold its machine code to the floor"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: the usage printed above them hides what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number is needed, not {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def picture(text: str) -> Path:
    """An argument that is a file a picture can be written to: checked before the work, not after it."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"a file name ending in .png, .svg or .pdf is needed, not {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def need(parser: argparse.ArgumentParser, *modules: str) -> None:
    """Ends the program, saying what to install, unless the optional packages can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            parser.error(f"{module} cannot be imported ({error}); run: pip install 'fused-dlam[demo]'")


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, 2 for wrong usage, 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("fused-dlam", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"fused-dlam {_version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    # The rest of the line is the command's own to parse: its parser lives in its module, with what that imports.
    command = parser.parse_args(argv[:1]).command
    try:
        return importlib.import_module(COMMANDS[command][0]).main(argv[1:])
    except KeyboardInterrupt:
        print("fused-dlam: interrupted", file=sys.stderr)
        return 130


def _version() -> str:
    from .. import __version__

    return __version__
