"""One step as a picture: what is computed when, and when each bucket's message is on its way.

    torchrun --nproc-per-node 2 -m fused_dlam.examples.timeline --out step.png      or: fused-dlam timeline

`GossipSGD` and `Gossip` name what they do in a profiler's trace: `fused_dlam::exchange bucket 3 step 7` lasts from the
moment a message leaves until the neighbors' messages are there, and `pack`, `send`, `wait` and `combine` are what this
rank's own thread spends on it. Where an exchange lies beside the backward pass, communication is hidden. Take `spans`
and `draw` for a step of your own; `--trace` writes the whole trace, for https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fused_dlam import GossipSGD

WIDTH, LAYERS, BATCH = 512, 8, 256
COMPUTING = ("forward", "backward", "step")
PARTS = ("pack", "send", "wait", "combine")
NAME = re.compile(r"fused_dlam::(\w+) bucket (\d+) step (\d+)")


class Span(NamedTuple):
    """A named stretch of time, in milliseconds from the start of the trace's first one."""

    what: str  # one of COMPUTING, of PARTS, or "exchange"
    bucket: int | None  # None of COMPUTING
    start: float
    end: float


def record(overlap: bool, warm_up: int = 3, trace: Path | None = None) -> list[Span]:
    """Trains for a few steps, and then one under the profiler; on all ranks. The spans of this rank's step."""
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    optimizer = GossipSGD(model.parameters(), lr=0.01, overlap=overlap, bucket_mb=2, timeout=60)
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, 10, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        with record_function("forward"):
            loss = nn.functional.cross_entropy(model(x), y)
        with record_function("backward"):
            loss.backward()
        with record_function("step"):
            optimizer.step()

    for _ in range(warm_up):
        step()
    for _ in range(2):  # the first time it starts the profiler too, and is not kept
        dist.barrier()  # so that all ranks begin the step together
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return spans(profiler)


def spans(profiler: Any) -> list[Span]:
    """What a finished `torch.profiler.profile` has of COMPUTING (named by the script) and of exchanges, in order."""
    found = []
    for event in profiler.events():
        named = NAME.fullmatch(event.name)
        if named or event.name in COMPUTING:
            what, bucket = (named[1], int(named[2])) if named else (event.name, None)
            found.append(Span(what, bucket, event.time_range.start / 1e3, event.time_range.end / 1e3))
    first = min((span.start for span in found), default=0.0)
    return sorted((s._replace(start=s.start - first, end=s.end - first) for s in found), key=lambda s: s.start)


def hidden(found: Sequence[Span]) -> float:
    """The share of all exchanges' time that lies within the backward pass."""
    backward = [s for s in found if s.what == "backward"]
    exchanges = [s for s in found if s.what == "exchange"]
    inside = sum(max(0.0, min(e.end, b.end) - max(e.start, b.start)) for e in exchanges for b in backward)
    return inside / max(1e-9, sum(e.end - e.start for e in exchanges))


def summary(title: str, found: Sequence[Span]) -> str:
    """A line of figures: of one step."""
    exchanges = [s for s in found if s.what == "exchange"]
    told = ", ".join(f"{s.what} {s.end - s.start:.1f} ms" for s in found if s.what in COMPUTING)
    return (
        f"{title}: {told}; {len(exchanges)} exchanges, {100 * hidden(found):.0f} % of their time in the backward pass"
    )


def draw(steps: Mapping[str, Sequence[Span]]) -> Any:
    """A panel for each step: a row of what is computed, and a row for each bucket. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    computing = dict(zip(COMPUTING, ("#595959", "#ababab", "#cfcfcf"), strict=True))
    parts = dict(zip(PARTS, ("#ff800e", "#c85200", "#5f9ed1", "#006ba4"), strict=True))
    colors = {**computing, "exchange": "#a2c8ec", **parts}
    figure = Figure(figsize=(9, 3.4 * len(steps)), dpi=110, layout="constrained")
    last = max(s.end for found in steps.values() for s in found)
    for axes, (title, found) in zip(figure.subplots(len(steps), 1, squeeze=False)[:, 0], steps.items(), strict=True):
        buckets = sorted({s.bucket for s in found if s.bucket is not None})
        rows: dict[int | None, int] = {None: 0, **{bucket: 1 + i for i, bucket in enumerate(buckets)}}
        for s in sorted(found, key=lambda s: s.what in PARTS):  # parts on top of the exchange they belong to
            height = 0.4 if s.what in PARTS else 0.8
            axes.barh(rows[s.bucket], s.end - s.start, left=s.start, height=height, color=colors[s.what])
        axes.set(title=title, xlabel="ms", xlim=(0, 1.02 * last), yticks=range(len(rows)),
                 yticklabels=["computing", *(f"bucket {bucket}" for bucket in buckets)])  # fmt: skip
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    handles = [Patch(color=color, label=what) for what, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def both(trace: Path | None = None) -> dict[str, list[Span]]:
    """The same step with messages that leave during the backward pass, and with messages that leave behind it."""
    return {f"overlap={overlap}": record(overlap, trace=trace if overlap else None) for overlap in (True, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("timeline.png"), help="the picture's file")
    parser.add_argument("--trace", type=Path, help="file for the whole trace of overlap=True, a .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = both(options.trace if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        print("\n".join(summary(title, found) for title, found in steps.items()))
        draw(steps).savefig(options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
