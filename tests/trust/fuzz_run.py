"""Runs the fuzzer's configurations over real worker processes: python tests/trust/fuzz_run.py --n 3 --seeds 0:500.

One set of processes runs many configurations. See test_fuzz.py for the promise that each is held against.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

from fuzz_check import check
from fuzz_draw import Config, draw
from fuzz_model import Tools

from fused_dlam.tools.launch import run_workers


def work(rank: int, n: int, seeds: list[int], file: str) -> None:
    """Runs configurations in turn. Rank 0 writes each result down at once, should the processes end."""
    gc.freeze()  # a new optimizer searches all objects for a living DDP
    logging.getLogger("fused_dlam").setLevel(logging.ERROR)
    tools = Tools()
    for seed in seeds:
        verdict, said = check(draw(n, seed), rank, tools)
        if rank == 0:
            with open(file, "a") as lines:
                lines.write(json.dumps([seed, verdict, said]) + "\n")


def report(c: Config, said: list[str]) -> str:
    return f"FAILED {c}\n" + "".join(f"    {text.rstrip()}\n" for text in said[:6])


def run_many(n: int, seeds: list[int], deadline: float = 3600.0, show: bool = False) -> tuple[dict, list[str]]:
    """Counts of verdicts, and a report of each failure. A configuration that ends its process is one, too."""
    counts: dict[str, int] = {}
    reports: list[str] = []
    left = list(seeds)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            results, died = Path(folder, "results"), ""
            try:
                run_workers(work, n, n, left, str(results), deadline=deadline)
            except Exception as error:  # noqa: BLE001
                died = f"the processes ended: {type(error).__name__}: {str(error)[-700:]}"
            done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        if died:
            done.append([left[len(done)], "failed", [died]])
        left = left[len(done) :]
        for seed, verdict, said in done:
            counts[verdict[:60]] = counts.get(verdict[:60], 0) + 1
            if verdict == "failed":
                reports.append(report(draw(n, seed), said))
                if show:
                    print(reports[-1], flush=True)
    return counts, reports


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=3, help="workers")
    parser.add_argument("--seeds", default="0:100", help="from:to, or numbers with commas between")
    args = parser.parse_args()
    first, colon, last = args.seeds.partition(":")
    seeds = list(range(int(first), int(last))) if colon else [int(s) for s in args.seeds.split(",")]
    start, failed = time.monotonic(), 0
    counts: dict[str, int] = {}
    for k in range(0, len(seeds), 100):
        some, reports = run_many(args.n, seeds[k : k + 100], show=True)
        failed += len(reports)
        counts = {key: counts.get(key, 0) + some.get(key, 0) for key in {**counts, **some}}
    print(f"n={args.n} seeds {args.seeds}: {counts} in {time.monotonic() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    from fuzz_run import main as main_  # workers import what they run by name

    main_()
