"""Rounds of H inner steps: what the exchange adds to a step, and what a step sends, on a slow network.

    sudo python bench/netlab.py --hosts 8 --rate 200mbit -- python bench/rounds.py --gate
    python bench/rounds.py --workers 4 --compute 0

All ways train in turn within one run, a round of H steps each, and only times of one run are compared. Computation is
emulated by sleeping, as in train.py, and takes as long as one message at 200 Mbit/s. A round's time is that of the
slowest rank; the first round, in which nothing is on its way yet, is not counted. Bytes are counted, not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import launched
import torch
import torch.distributed as dist
from train import Net, inputs

from fused_dlam import Gossip
from fused_dlam.tools.plain import table

SHARE = 0.02  # of a step's time, which the exchange may take
WAYS: dict[str, dict | None] = {
    "AdamW alone": None,
    "DiLoCo: nesterov-pmsgd": {"outer": "nesterov-pmsgd"},
    "mi-dmsgd, midpoint": {"outer": "mi-dmsgd"},
    "mi-dmsgd, awc": {"outer": "mi-dmsgd", "schedule": "awc"},
}
GATED = ("mi-dmsgd, midpoint", "mi-dmsgd, awc")


class Way(NamedTuple):
    seconds: list[float]  # of each round, a step's mean
    sent: list[int]  # bytes that this rank sent in each step of the last round
    message: int  # bytes of all parameters


def stepper(name: str, options: argparse.Namespace) -> tuple[Callable[[torch.Tensor], None], Callable[[], float], int]:
    model = Net(options.mb, options.compute)
    inner, how = torch.optim.AdamW(model.parameters(), lr=1e-4), WAYS[name]
    optimizer = inner if how is None else Gossip(inner, every=options.every, hierarchical=False, **how)

    def step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return step, lambda: getattr(optimizer, "bytes_sent", 0), whole


def measure(rank: int, options: argparse.Namespace) -> dict[str, Way]:
    torch.set_num_threads(1)
    ways, x = {name: stepper(name, options) for name in options.ways or WAYS}, inputs(options)
    found: dict[str, Way] = {name: Way([], [], whole) for name, (_, _, whole) in ways.items()}
    for turn in range(options.rounds + 1):
        for name, (step, sent, _) in ways.items():
            counts = [sent()]
            dist.barrier()
            start = time.perf_counter()
            for _ in range(options.every):
                step(x)
                counts.append(sent())
            seconds = torch.tensor([time.perf_counter() - start])
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if turn:
                found[name].seconds.append(seconds.item() / options.every)
                found[name].sent[:] = [int(b - a) for a, b in zip(counts, counts[1:], strict=False)]
    return found


def report(found: dict[str, Way], n: int, options: argparse.Namespace) -> bool:
    median = {name: statistics.median(way.seconds) for name, way in found.items()}
    alone = median["AdamW alone"]
    share = {name: 1 - alone / seconds for name, seconds in median.items()}
    rows = []
    for name, way in found.items():
        mean, peak = sum(way.sent) / options.every, max(way.sent)
        rows.append((name, f"{median[name]:.4f}", f"{min(way.seconds):.4f}", f"{max(way.seconds):.4f}",
                     f"{100 * share[name]:.2f} %", f"{mean / 1e3:.0f}", f"{peak / 1e3:.0f}",
                     f"{mean * options.every / way.message:.2f}"))  # fmt: skip
    print(
        f"{n} workers, {options.mb:g} MB of parameters, {options.compute:g} s of computation, H = {options.every},"
        f" torch {torch.__version__}, {options.rounds} rounds.\n\n"
        + table(
            (
                "",
                "s a step",
                "min",
                "max",
                "the exchange's\nshare",
                "kB a step",
                "most in\none step",
                "messages of M\na round",
            ),
            rows,
        )  # fmt: skip
    )
    holds = True
    for name in GATED if options.gate else ():
        holds &= share[name] < SHARE
        word = "holds" if share[name] < SHARE else "FAILS"
        print(f"{word}  {name}: {100 * share[name]:.2f} % of a step, below {100 * SHARE:g} %")
    if options.json:
        ways = {name: way._asdict() | {"share": share[name]} for name, way in found.items()}
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"workers": n, **settings, "ways": ways}, indent=1, default=str) + "\n")
    return holds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help="start that many processes here (else torchrun's variables count)")
    parser.add_argument("--mb", type=float, default=8.4, help="megabytes of parameters (8.4)")
    parser.add_argument("--compute", type=float, default=0.35, help="seconds of emulated computation per step (0.35)")
    parser.add_argument("--every", type=int, default=50, help="H (50)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", help=f"some of: {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gate", action="store_true", help="exit with 1 if an exchange's share leaves its margin")
    options = parser.parse_args(argv)
    launched.check(parser, options.workers)
    rank, n, found = launched.run(measure, options.workers, options)
    return 0 if rank or report(found, n, options) else 1


if __name__ == "__main__":
    sys.exit(main())
