"""MI-DmSGD beside the other methods: growth, range and bias, and four trainings side by side.

    python bench/midpoint.py tables        growth, range and bias, from the rules' equations
    python bench/midpoint.py regression    every graph: steps to an error, and the error at the end
    python bench/midpoint.py digits        digits split by label at growing rates, with and without the spike clip
    python bench/midpoint.py fashion       a convolutional network with BatchNorm on Fashion-MNIST
    python bench/midpoint.py characters    a transformer by characters, AdamW, real processes
    python bench/midpoint.py label8k       a large batch split by label: why MI-DmSGD is behind there
    python bench/midpoint.py show          the tables of the runs that are kept

Each takes options, see `python bench/midpoint.py NAME --help`. Runs are appended to bench/results/midpoint_NAME.jsonl,
and those that are there are not made again. One process with one thread, but for `characters`.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch
from midpoint_runs import RESULTS, Runs

PARTS = ("tables", "regression", "digits", "fashion", "characters", "label8k")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="part", required=True)
    modules = {}
    for part in PARTS:
        modules[part] = module = importlib.import_module(f"midpoint_{part}")
        command = commands.add_parser(
            part, description=module.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.add_argument("--results", type=Path, default=RESULTS / module.FILE, help="file of the runs")
        module.arguments(command)
    command = commands.add_parser("show", description="Prints the tables of the runs that are kept.")
    command.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all")
    command.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.part == "show":
        if unknown := set(options.parts) - set(PARTS):
            parser.error(f"there is no part {min(unknown)!r}; there are {', '.join(PARTS)}")
        for part in options.parts or PARTS:
            runs = Runs(options.folder / modules[part].FILE)
            if runs.records:
                print(modules[part].show(runs), "\n", flush=True)
        return
    module, runs = modules[options.part], Runs(options.results)
    runs.make(module.jobs(options), module.run)
    print(module.show(runs))


if __name__ == "__main__":
    main()
