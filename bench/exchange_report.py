"""The table, the picture and the gate of what bench/exchange.py measured."""

from __future__ import annotations

from typing import Any

from fused_dlam.tools import plain
from fused_dlam.tools.plain import bytes_text

ALL_REDUCE, RAW, ONE_PEER = "all-reduce", "raw one-peer", "one-peer-exponential"
LIBRARY = (ONE_PEER, "exponential", "ring")
HIERARCHICAL = "hierarchical one-peer"
OPERATIONS = (ALL_REDUCE, RAW, *LIBRARY, HIERARCHICAL)
COLORS = dict(zip(OPERATIONS, ("#c1121f", "#7a7a7a", "#0b5fa5", "#e08e0b", "#3a8f4d", "#7b2cbf"), strict=True))
SMALL, LARGE = 10_000, 10_000_000  # bytes; from LARGE on the network's rate alone decides
MARGINS = (  # for 8 hosts, where the bytes alone give 1 and 8/14 = 0.571
    ("large", ONE_PEER, "to_raw", 1.08),
    ("large", ONE_PEER, "to_all_reduce", 0.65),
    ("small", ONE_PEER, "to_all_reduce", 0.25),
)
SHARED_MARGINS = (("large", HIERARCHICAL, "to_all_reduce", 0.70),)  # for 4 hosts of 4 ranks: 16/30 = 0.533
HEADER = (
    "message", "operation", "ms", "least", "most", "median\nrank", "over\nbytes/rate", "over\nall-reduce",
    "over\nraw", "payload", "messages", "wire",
)  # fmt: skip


def bytes_per_second(result: dict[str, Any]) -> float:
    """The network's rate; where it is not known, what raw one-peer reached with the largest message."""
    if result["rate"]:
        return result["rate"] / 8
    return max(row["card"] / row["seconds"] for row in result["rows"] if row["operation"] == RAW)


def network(result: dict[str, Any]) -> str:
    return f"{result['rate'] / 1e6:g} Mbit/s per host" if result["rate"] else "network as it is"


def table(result: dict[str, Any]) -> str:
    rate, rows = bytes_per_second(result), []
    for row in result["rows"]:
        times = (f"{1e3 * row[key]:.2f}" for key in ("seconds", "least", "most", "median_rank"))
        ratios = (row["seconds"] * rate / row["card"], row["to_all_reduce"], row["to_raw"])
        wire = "-" if row["wire"] is None else f"{row['wire']:.0f}"
        sent = (f"{row['payload']:.0f}", f"{row['messages']:g}", wire)
        rows.append((bytes_text(row["size"]), row["operation"], *times, *(f"{r:.3g}" for r in ratios), *sent))
    return (
        f"{result['workers']} workers, {result['per_host']} per host, {network(result)}, gloo, torch"
        f" {result['torch']}.\nPer step: milliseconds of the slowest rank (median, least and most over repetitions) and"
        " of the median rank;\nbytes and messages that a rank sends, bytes that its network interface sends.\n\n"
        + plain.table(HEADER, rows)
    )


def draw(result: dict[str, Any], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes, rate = figure.subplots(), bytes_per_second(result)
    for operation, color in COLORS.items():
        rows = [row for row in result["rows"] if row["operation"] == operation]
        sizes = [row["size"] for row in rows]
        ms = {key: [1e3 * row[key] for row in rows] for key in ("seconds", "least", "most")}
        style = {"marker": "x", "linestyle": "none", "zorder": 3} if operation == RAW else {"marker": "o"}
        if rows:
            axes.plot(sizes, ms["seconds"], color=color, label=operation, **style)
            axes.fill_between(sizes, ms["least"], ms["most"], color=color, alpha=0.15, lw=0)
        if operation != RAW:
            axes.plot(sizes, [1e3 * row["card"] / rate for row in rows], color=color, linestyle=":", linewidth=1)
    axes.plot([], [], color="black", linestyle=":", linewidth=1, label="bytes / rate")
    axes.set(xscale="log", yscale="log", xlabel="bytes averaged per step", ylabel="milliseconds per step, slowest rank")
    axes.set_title(f"One averaging step, {result['workers']} workers, {network(result)}", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)


def failures(result: dict[str, Any]) -> list[str]:
    """The ratios that exceed their margins; `large` is the largest message measured."""
    rows = {(row["size"], row["operation"]): row for row in result["rows"]}
    sizes = {"large": max(size for size, _ in rows), "small": SMALL}
    return [
        f"{bytes_text(sizes[which])}, {operation}: {key} is {rows[sizes[which], operation][key]:.3f}, allowed {most}"
        for which, operation, key, most in (MARGINS if result["per_host"] == 1 else SHARED_MARGINS)
        if rows[sizes[which], operation][key] > most
    ]
