r"""Low communication: what a worker sends, against the loss it comes to. A small GPT, 8 workers, AdamW inside.

    python bench/low_communication.py                      # tunes, trains, prints tables, draws
    python bench/low_communication.py --steps 1200 --tuned-at 300 --seeds 0 --level 2.43      # four times as long
    python bench/low_communication.py --report             # what the results file has, nothing is trained
    python bench/low_communication.py --report --compute 0.05 --parameters 1e9    # another modeled machine
    python bench/low_communication.py --quick --results quick.jsonl               # seconds; says nothing of methods

All workers are simulated in one process (a job may share the machine with others, see --processes); the outer methods
by `fused_dlam.Simulation`, so by the rules' own equations. The text is the source of Python's standard library. "even":
every worker draws from all of it. "uneven": each has an eighth of the files, sorted by path, so that one has mostly
tables of encodings and another the reference manual. Losses are of the workers' mean model on pieces held out of all
files.

Tuning, on even data and seed 0, by one half of the held out pieces; all tables are of the other half:
  inner learning rate   of --inner-lr for all-reduce, for Gossip AdamW (midpoint; its other schedules take the same) and
                        for averaging at each H (the outer methods take the same at that H: their inner steps are alike)
  outer settings        four for each method and H, the paper's first, the last without momentum: see METHODS in
                        low_communication_training.py
Choices are printed; where the best is at a grid's end, a star says so (no momentum is the end of all grids).

Times are modeled, not measured: see low_communication_report.py. Every finished run is a line of the results file; runs
found there are not repeated, so an interrupted program goes on where it was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from low_communication_report import draw, report
from low_communication_training import METHODS, fingerprint, train
from midpoint_runs import RESULTS, Runs

from fused_dlam.tools.cli import need, picture

SIZES = {"workers": 8, "steps": 300, "batch": 1, "width": 144, "layers": 4, "look": 50, "validation": 128}
QUICK = {"workers": 4, "steps": 8, "batch": 1, "width": 16, "layers": 1, "look": 4, "validation": 4}


def cases(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Methods with their H."""
    return [(m, H) for m in options.methods for H in ((1,) if METHODS[m].every_step else options.every)]


def job(method: str, every: int, split: str, seed: int, lr: float, outer: dict[str, float], options) -> dict[str, Any]:
    own = {"method": method, "every": every, "split": split, "seed": seed, "inner_lr": lr, "outer": outer}
    return {**own, **options.sizes, "text": fingerprint()}


def settle() -> None:
    """One thread, and memory that is kept: glibc would map each large tensor anew, which takes a third of the time."""
    torch.set_num_threads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


def run(jobs: Iterable[dict[str, Any]], runs: Runs, options: argparse.Namespace) -> None:
    """Trains what is not there yet, in order, --processes at a time, each on one thread."""
    jobs = list({json.dumps(j, sort_keys=True): j for j in jobs}.values())
    left = [j for j in jobs if not runs.find(**j)]
    if options.processes == 1 or len(left) < 2:
        settle()
        runs.make(jobs, train)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, settle) as pool:
        waiting = {json.dumps(j): pool.submit(train, j) for j in left}
        try:
            runs.make(jobs, lambda j: waiting[json.dumps(j)].result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def best(tried: Sequence[dict[str, Any]], runs: Runs) -> dict[str, Any] | None:
    """The job of the smallest loss in tuning among those that have run; None if none has. NaN is never the smallest."""
    found = [(records[0]["tuning_loss"], j) for j in tried if (records := runs.find(**j))]
    return min(found, key=lambda f: f[0] if f[0] == f[0] else float("inf"))[1] if found else None


def tune(runs: Runs, options: argparse.Namespace, train_them: bool) -> dict[tuple[str, int], dict[str, Any]]:
    """For every case the job that was best on even data and the first seed."""
    seed = options.seeds[0]

    short = {"steps": options.tuned_at}

    def tuned(tried: dict[Any, list[dict[str, Any]]]) -> dict[Any, dict[str, Any]]:
        if train_them:
            run([j for jobs in tried.values() for j in jobs], runs, options)
        chosen = {case: best(jobs, runs) for case, jobs in tried.items()}
        return {case: j for case, j in chosen.items() if j is not None}

    own = {(METHODS[m].inner_of or m, H) for m, H in cases(options)}
    inner = tuned({
        (m, H): [job(m, H, "even", seed, lr, METHODS[m].outer[0], options) | short for lr in options.inner_lr]
        for m, H in sorted(own)
    })  # fmt: skip
    return tuned({
        (m, H): [job(m, H, "even", seed, inner[leader, H]["inner_lr"], o, options) | short for o in METHODS[m].outer]
        for m, H in cases(options)
        if (leader := METHODS[m].inner_of or m, H) in inner
    })  # fmt: skip


def choices(chosen: dict[tuple[str, int], dict[str, Any]], runs: Runs, options: argparse.Namespace) -> str:
    def star(value: Any, grid: Sequence[Any]) -> str:
        return "*" if len(grid) > 1 and value in (min(grid) or -1, max(grid)) else ""

    lines = []
    for (m, H), j in chosen.items():
        betas = [o.get("momentum") for o in METHODS[m].outer]
        outer = ", ".join(f"{k} {v:g}{star(v, betas) if k == 'momentum' else ''}" for k, v in j["outer"].items())
        tried = sum(bool(runs.find(**{**j, "outer": o})) for o in METHODS[m].outer)
        of = f" (of {tried} of {len(METHODS[m].outer)} tried)" if tried < len(METHODS[m].outer) else ""
        lines.append(
            f"  {m}, H = {H}: {j['inner_lr']:g}{star(j['inner_lr'], options.inner_lr)}; outer {outer or '-'}{of}"
        )
    return "Inner learning rate and outer settings by tuning (* at the grid's end):\n" + "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--every", type=int, nargs="+", help="H (10 50)")
    parser.add_argument("--splits", nargs="+", choices=("even", "uneven"), default=["even", "uneven"])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, help="of every training (300)")
    parser.add_argument("--tuned-at", type=int, help="the steps of the trainings in tuning (as many)")
    parser.add_argument("--inner-lr", type=float, nargs="+", help="what is tried (5e-4 1e-3 2e-3 4e-3)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and eight steps: whether everything runs")
    parser.add_argument("--report", action="store_true", help="trains nothing")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time, each on one thread (2)")
    parser.add_argument("--parameters", type=float, default=1e8, help="of the modeled model, 4 bytes each (1e8)")
    parser.add_argument("--compute", type=float, default=0.2, help="modeled seconds of a step's computation (0.2)")
    parser.add_argument("--latency", type=float, default=1e-3, help="modeled seconds of a message (1e-3)")
    parser.add_argument(
        "--above", type=float, nargs="+", default=[0.1, 0.4], help="all-reduce's loss: levels for the times (0.1 0.4)"
    )
    parser.add_argument("--level", type=float, nargs="+", help="losses themselves, in the place of --above")
    parser.add_argument("--results", type=Path, default=RESULTS / "low_communication.jsonl")
    parser.add_argument("--picture", type=picture, help="the results file's name with .png")
    options = parser.parse_args(argv)
    options.sizes = dict(QUICK if options.quick else SIZES)
    options.sizes["steps"] = options.steps or options.sizes["steps"]
    options.tuned_at = options.tuned_at or options.sizes["steps"]
    options.every = options.every or ([2, 4] if options.quick else [10, 50])
    options.seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    options.inner_lr = options.inner_lr or ([1e-3] if options.quick else [5e-4, 1e-3, 2e-3, 4e-3])
    options.picture = options.picture or options.results.with_suffix(".png")
    fewest = min(options.tuned_at, options.sizes["steps"])
    for H in options.every:
        if not 0 < H <= fewest:
            parser.error(f"--every {H}: must be from 1 to {fewest}, the number of steps")
    for name in ("processes", "parameters", "compute"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be above 0")
    if options.latency < 0:
        parser.error("--latency must be at least 0")
    if not options.results.parent.is_dir():
        parser.error(f"there is no folder {options.results.parent}")
    need(parser, "matplotlib")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    runs = Runs(options.results)
    chosen = tune(runs, options, not options.report)
    jobs = {
        (m, H, split, seed): {**chosen[m, H], "split": split, "seed": seed, "steps": options.sizes["steps"]}
        for seed in options.seeds  # outermost: half of the runs are whole tables of fewer seeds
        for split in options.splits
        for m, H in cases(options)
        if (m, H) in chosen
    }
    if not options.report:
        run(jobs.values(), runs, options)
    found = {case: records[0] for case, j in jobs.items() if (records := runs.find(**j))}
    if not found:
        print(f"{options.results} has no finished runs of these settings", file=sys.stderr)
        return 1
    print(choices(chosen, runs, options), end="\n\n")
    print(report(found, options))
    draw(found, options)
    print(f"\nPicture: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
