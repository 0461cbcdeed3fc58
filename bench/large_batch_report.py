"""Tables and a picture of what bench/large_batch.py measured: means and standard deviations over the seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fused_dlam.tools.plain import spread, table

Cells = dict[str, dict[int, list[dict[str, Any]]]]  # method, batch: one record per seed
YARDSTICK = "PmSGD"
STYLES = {  # color (distinguishable with any color vision: Tol, Okabe and Ito), marker, line
    "PmSGD": ("#000000", "o", "--"),
    "PmSGD + LARS": ("#999999", "o", "--"),
    "DmSGD": ("#d55e00", "v", "-"),
    "DA-DmSGD": ("#e69f00", "^", "-"),
    "AWC-DmSGD": ("#cc79a7", "<", "-"),
    "SlowMo": ("#b8a800", ">", "-"),
    "QG-DmSGD": ("#882255", "P", "-"),
    "D2-DmSGD": ("#7f4f1f", "X", "-"),
    "DecentLaM": ("#009e73", "s", "-"),
    "PC-DmSGD": ("#56b4e9", "D", "-"),
    "PC-DmSGD, one-peer": ("#0072b2", "D", "-"),
}


def less_yardstick(cells: Cells, method: str, batch: int) -> list[float]:
    """Accuracy less that of PmSGD, seed by seed, so that the choice of images drops out."""
    pairs = zip(cells[method][batch], cells[YARDSTICK][batch], strict=True)
    return [r["accuracy"] - y["accuracy"] for r, y in pairs]


def report(cells: Cells, tuned: bool) -> str:
    """The tables, with footnotes for graphs that were not the ones asked for, and for runs that overflowed."""
    first = next(iter(cells.values()))
    notes: list[str] = []

    def mark(text: str) -> str:
        if text and text not in notes:
            notes.append(text)
        return f" [{notes.index(text) + 1}]" if text else ""

    names = {m: m + mark(row[next(iter(row))][0]["note"]) for m, row in cells.items()}
    head = [f"{b:,}\n{several[0]['steps']:,} steps" for b, several in first.items()]

    def part(title: str, cell: Callable[[str, int], str], methods: Iterable[str] = tuple(cells)) -> str:
        return table((title, *head), [(names[m], *(cell(m, b) for b in first)) for m in methods])

    def accuracy(m: str, b: int) -> str:
        failed = sum(r["diverged"] for r in cells[m][b])
        text = spread(r["accuracy"] for r in cells[m][b])
        return text + mark(f"{failed} of {len(cells[m][b])} runs overflowed" if failed else "")

    parts = [part("test accuracy of the\naveraged model, %", accuracy)]
    if YARDSTICK in cells and len(cells) > 1:
        others = [m for m in cells if m != YARDSTICK]
        parts.append(
            part(f"less {YARDSTICK},\nseed by seed", lambda m, b: spread(less_yardstick(cells, m, b), "+"), others)
        )
    parts.append(
        part("accuracy halfway,\nworst worker, %", lambda m, b: spread(r["worst_halfway"] for r in cells[m][b]))
    )
    parts.append(
        part("training loss of the\naveraged model", lambda m, b: spread((r["train_loss"] for r in cells[m][b]), "", 3))
    )
    if tuned:
        parts.append(part("\nlearning rate", lambda m, b: f"{cells[m][b][0]['lr']:.4g}"))
    return "\n\n".join(parts) + "".join(f"\n[{k}] {text}" for k, text in enumerate(notes, 1))


def draw(cells: Cells, title: str, path: Path) -> None:
    """Accuracy over batch, and its difference to PmSGD. Long error bars leave the picture: means decide its limits."""
    from matplotlib.figure import Figure

    batches = list(next(iter(cells.values())))
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    for k, (m, row) in enumerate(cells.items()):
        several = row[batches[0]]
        x = np.arange(len(batches)) + 0.05 * (k - (len(cells) - 1) / 2)  # side by side: they would hide each other
        color, marker, line = STYLES[m]
        style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 1.0, "elinewidth": 1.0}
        panels = [(left, [[r["accuracy"] for r in row[b]] for b in batches])]
        if YARDSTICK in cells and m != YARDSTICK:
            panels.append((right, [less_yardstick(cells, m, b) for b in batches]))
        for axes, values in panels:
            error = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
            label = None if axes is right else f"{m} ({several[0]['topology']})" if several[0]["note"] else m
            axes.errorbar(x, [np.mean(v) for v in values], error, label=label, markersize=6, **style)
    right.axhline(0, color="black", linewidth=1, linestyle="--")
    left.set_title("Test accuracy of the averaged model, %")
    right.set_title(f"The same less {YARDSTICK}, seed by seed")
    for axes in (left, right):
        means = np.concatenate([line.get_ydata() for line in axes.get_lines()])
        room = max(0.5, 0.25 * np.ptp(means))
        axes.set_ylim(means.min() - room, min(100.0, means.max() + room))
        axes.set(xlabel="total batch", xticks=range(len(batches)), xticklabels=[f"{b:,}" for b in batches])
        axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)
