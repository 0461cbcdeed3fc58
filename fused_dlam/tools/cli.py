"""The command `fused-dlam` imports the module of the command that was asked for and calls its `main(argv) -> int`.

`python -m fused_dlam` is the same.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import NoReturn

WHAT_FOR = """\
Decentralized momentum optimizers for PyTorch. The optimizers are used from Python; these commands help to choose a
graph and a method, and to check a method of your own.
"""
EXAMPLES = """\
examples:
  fused-dlam demo                           half a minute, on this machine
  fused-dlam tutorial 2                     average consensus, measured and drawn
  fused-dlam topology                       the names of all graphs
  fused-dlam topology exponential -n 64
  fused-dlam run -n 8 train.py              train with eight workers
  fused-dlam compare decentlam pc-dmsgd --topology ring one-peer-exponential
  fused-dlam COMMAND --help                 the options of a command
"""
COMMANDS = {
    "run": ("fused_dlam.tools.run", "start the workers of a training script; one that dies takes no other with it"),
    "demo": ("fused_dlam.tools.demo", "watch worker processes learn handwritten digits, by all-reduce and by gossip"),
    "tutorial": ("fused_dlam.tools.tutorial", "seven tutorials, run by worker processes on this machine"),
    "topology": ("fused_dlam.tools.describe", "what a graph costs per step, and which methods are stable on it"),
    "compare": ("fused_dlam.tools.compare", "how fast methods get near the optimum on given graphs, and how near"),
    "timeline": ("fused_dlam.tools.timeline", "one step as a picture: what is computed, what is on its way"),
    "gate": ("fused_dlam.kernels.gate.command", "check the GPU kernels of a rule, or of your own, without a GPU"),
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
    parser = Parser(
        "fused-dlam", description=WHAT_FOR, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fused-dlam {_version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    # The rest of the line is the command's own to parse: its parser lives in its module, with what that imports.
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    for argument in argv[1:] if command != "run" else ():  # file.py:rule. What follows a script is the script's own.
        file = argument.rpartition(":")[0]
        if file.endswith(".py") and not Path(file).is_file():
            parser.error(f"{command}: there is no file {file}")
    try:
        return importlib.import_module(COMMANDS[command][0]).main(argv[1:])
    except KeyboardInterrupt:
        print("fused-dlam: interrupted", file=sys.stderr)
        return 130


def _version() -> str:
    from .. import __version__

    return __version__
