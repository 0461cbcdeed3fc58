"""Tables and a picture of what bench/low_communication.py found, and the modeled time of its methods.

The losses are those of the small GPT that was trained. Bytes and times are modeled for a larger one, of --parameters
numbers of 4 bytes, for which a step's forward and backward pass take --compute seconds: the default, 1e8 and 0.2 s, is
about a GPU that does 120 TFLOP/s on 40,000 tokens, at 6 FLOP per parameter and token. A message costs --latency, and
its bytes pass one network card per worker, each way (costs.py):

    an exchange   ring all-reduce 2(n-1) a + 2(n-1)/n M b; one peer a + M b
    a round       H steps of computation + max(0, exchange - the computation it may hide behind)

See `Method.hidden` for what may hide where. The optimizer's own time, and waiting for slow workers, are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from costs import Cost, gbit, step
from low_communication_training import METHODS

from fused_dlam.tools.plain import BLACK, BLUE, GREEN, OLIVE, ORANGE, PINK, RED, SKY, spread, table

Found = dict[tuple[str, int, str, int], dict[str, Any]]  # method, H, split, seed
RATES = (0.1, 1.0, 10.0, 100.0)  # Gbit/s
YARDSTICK = ("all-reduce AdamW", 1)
COLORS = dict(
    zip(METHODS, (BLACK, SKY, OLIVE, "#777777", ORANGE, RED, PINK, "#7f4f1f", BLUE, GREEN, "#9467bd"), strict=True)
)


def exchange(method: str, n: int, parameters: float) -> Cost:
    m = METHODS[method]
    return Cost(2 * (n - 1) if m.averages_all else 1, m.sends(n) * 4 * parameters)


def seconds(method: str, every: int, n: int, rate: float, options: argparse.Namespace) -> float:
    """Modeled, of one step, its share of the exchange included."""
    communication = gbit(options.latency, rate).seconds(exchange(method, n, options.parameters))
    return step(every * options.compute, communication, METHODS[method].hidden) / every


def steps_to(curve: list[list[float]], level: float) -> float | None:
    """Where a run's loss first comes to a level, between looks by a line; None if it never does."""
    for (k0, a), (k1, b) in zip(curve, curve[1:], strict=False):
        if b <= level:
            return k0 if a <= level else k0 + (k1 - k0) * (a - level) / (a - b)
    return None


def report(found: Found, options: argparse.Namespace) -> str:
    cases = list(dict.fromkeys((m, H) for m, H, _, _ in found))
    splits = list(dict.fromkeys(split for _, _, split, _ in found))
    n = options.sizes["workers"]

    def records(case: tuple[str, int], split: str) -> dict[int, dict[str, Any]]:
        return {seed: r for (m, H, s, seed), r in found.items() if (m, H) == case and s == split}

    def values(case: tuple[str, int], split: str, name: str) -> list[float]:
        return [r[name] for r in records(case, split).values()]

    def less(case: tuple[str, int], split: str) -> list[float]:
        base = records(YARDSTICK, split)
        return [r["loss"] - base[seed]["loss"] for seed, r in records(case, split).items() if seed in base]

    def cell(numbers: Iterable[float], sign: str = "") -> str:
        numbers = list(numbers)
        return spread(numbers, sign, 3) + f" [{len(numbers)}]" if numbers else ""

    def rows(cells: Callable[[tuple[str, int]], list[str]]) -> list[list[str]]:
        return [[case[0], str(case[1]), *cells(case)] for case in cases]

    sizes = options.sizes
    heads = [f"{s},\n{what}" for s in splits for what in ("loss", "less all-reduce", "worst worker")]
    losses = rows(
        lambda case: [
            f"{METHODS[case[0]].sends(n) / case[1]:.3f}",
            *(
                text
                for s in splits
                for text in (
                    cell(values(case, s, "loss")),
                    cell(less(case, s), "+"),
                    cell(values(case, s, "worst_worker_less"), "+"),
                )
            ),
        ]
    )
    parts = [
        f"{n} workers, {sizes['steps']} steps of {sizes['batch']} x 64 characters each: nats per held out character of"
        " the mean model [seeds];\nthe worst worker's less it; what a worker sends per step, in models",
        table(("", "H", "sent", *heads), losses),
        f"Modeled seconds of a step: {options.parameters:g} parameters, {options.compute:g} s of computation,"
        f" {1e3 * options.latency:g} ms a message",
        table(
            ("", "H", *(f"{r:g} Gbit/s" for r in RATES)),
            rows(lambda case: [f"{seconds(*case, n, r, options):.3f}" for r in RATES]),
        ),
    ]
    for split in splits:
        base = values(YARDSTICK, split, "loss")
        above = [(f"all-reduce's at the end + {a:g}", float(np.mean(base)) + a) for a in options.above if base]
        for text, level in [("as asked", level) for level in options.level] if options.level else above:
            parts += [
                f"Modeled minutes to a loss of {level:.3f} on {split} data, {text}:",
                table(
                    ("", "H", "steps", *(f"{r:g} Gbit/s" for r in RATES)),
                    rows(lambda case, s=split, level=level: minutes(case, records(case, s), level, n, options)),
                ),
            ]
    return "\n\n".join(parts)


def minutes(case: tuple[str, int], records: dict[int, dict], level: float, n: int, options) -> list[str]:
    """Steps and minutes to a level, means over the seeds; how many came to it, if not all did."""
    steps = [steps_to(r["curve"], level) for r in records.values()]
    came = [s for s in steps if s is not None]
    if len(came) < len(steps) or not came:
        return [f"{len(came)} of {len(steps)}" if steps else "", *("-" for _ in RATES)]
    mean = float(np.mean(came))
    return [f"{mean:.0f}", *(f"{mean * seconds(*case, n, r, options) / 60:.2f}" for r in RATES)]


def draw(found: Found, options: argparse.Namespace) -> None:
    """Loss against bytes, and against modeled time on three networks, for each split; means over the seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    cases = list(dict.fromkeys((m, H) for m, H, _, _ in found))
    splits = list(dict.fromkeys(split for _, _, split, _ in found))
    n, rates = options.sizes["workers"], (0.1, 1.0, 100.0)
    figure = Figure(figsize=(16, 4.6 * len(splits) + 1), layout="constrained")
    plots = figure.subplots(len(splits), 1 + len(rates), squeeze=False, sharey="row")
    every = sorted({H for _, H in cases if H > 1})
    for row, split in zip(plots, splits, strict=True):
        for case in cases:
            curves = [r["curve"] for (m, H, s, _), r in found.items() if (m, H) == case and s == split]
            if not curves:
                continue
            curve = np.mean(curves, 0)  # [looks, (step, loss)]
            method, H = case
            line = "-" if H == 1 else ("--", ":", "-.")[every.index(H) % 3]
            style = {"color": COLORS[method], "linestyle": line, "label": f"{method}, H = {H}", "linewidth": 1.6}
            marker = {"marker": "o" if H == 1 else "sv^"[every.index(H) % 3], "markersize": 4, "markevery": [-1]}
            sent = exchange(method, n, options.parameters).bytes / H
            scales = [sent / 1e9, *(seconds(method, H, n, r, options) / 60 for r in rates)]
            for plot, scale in zip(row, scales, strict=True):
                plot.plot(scale * curve[:, 0], curve[:, 1], **style, **marker)
        titles = ["bytes sent by each worker", *(f"modeled time at {r:g} Gbit/s" for r in rates)]
        for plot, title in zip(row, titles, strict=True):
            plot.set(title=f"{split} data: {title}", xscale="log", xlabel="GB" if "bytes" in title else "minutes")
            plot.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plot.xaxis.set_major_formatter("{x:g}")
            plot.xaxis.set_minor_formatter(NullFormatter())
            plot.grid(alpha=0.3)
        row[0].set_ylabel("nats per held out character, mean model")
        ends = [r["loss"] for (_, _, s, _), r in found.items() if s == split and np.isfinite(r["loss"])]
        row[0].set_ylim(min(ends) - 0.03, min(max(ends), min(ends) + 0.8) + 0.25)  # the first steps leave the picture
    handles, labels = plots[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"A GPT of 1M parameters, {n} workers, AdamW inside; bytes and times as of {options.parameters:g} parameters,"
        f" {options.compute:g} s a step",
        fontsize=11,
    )
    figure.savefig(options.picture, dpi=110)
