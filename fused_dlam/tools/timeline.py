"""`fused-dlam timeline`: one step of a few workers as a picture, see fused_dlam/examples/timeline.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..examples import timeline
from .cli import Parser, count, need, picture
from .launch import run_workers

WHAT_FOR = """\
Records one step of GossipSGD with torch's profiler, with messages that leave during the backward pass and without, and
draws when what was computed and when each bucket's message was on its way: worker 0's, on this machine's cores.
"""


def main(argv: list[str]) -> int:
    parser = Parser("fused-dlam timeline", description=WHAT_FOR, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=count, default=2, help="worker processes, from 2 on (2)")
    parser.add_argument("--out", type=picture, default="fused-dlam-timeline.png", help="the picture's file")
    parser.add_argument("--trace", type=Path, help="file for the whole trace of overlap=True, a .json for Perfetto")
    options = parser.parse_args(argv)
    if options.workers == 1:
        parser.error("--workers 1: one worker sends nothing; take 2 or more")
    if options.trace is not None and not options.trace.parent.is_dir():
        parser.error(f"there is no folder {options.trace.parent}")
    need(parser, "matplotlib")
    steps = run_workers(work, options.workers, options.trace)[0]
    print("\n".join(timeline.summary(title, found) for title, found in steps.items()))
    timeline.draw(steps).savefig(options.out)
    print(f"Picture: {Path(options.out).resolve()}")
    return 0


def work(rank: int, trace: Path | None) -> dict[str, list[timeline.Span]]:
    """One worker's spans."""
    return timeline.both(trace if rank == 0 else None)
