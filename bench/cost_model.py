"""What one averaging step costs on a network of given latency and rate, from 8 to 100,000 workers.

    python bench/cost_model.py                                        # assumed networks, and the published figures
    python bench/cost_model.py exchange.json --picture cost.png       # and what bench/exchange.py measured

The formulas are in costs.py. A claim about many workers means nothing without naming the all-reduce it compares with:
against a flat ring the gain grows without bound, against a hierarchical tree it ends at 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cost_fits import fit_measured, fit_published
from costs import (
    COSTS,
    INFINIBAND,
    MEASURED,
    MODELS,
    PUBLISHED,
    PUBLISHED_WORKERS,
    TCP,
    WORKERS,
    Link,
    Network,
    best_one_peer,
    predict,
    steps,
    wait_for_slowest,
)  # fmt: skip

from fused_dlam.tools.plain import table


def speed(link: Link) -> str:
    return f"{1e3 * link.latency:.3g} ms a message, {link.rate * 8e-9:.3g} Gbit/s"


def published_text(found: dict[str, Any]) -> str:
    columns = ("published", "from the ring", "from all four")
    rows = [
        (name, *(f"{1e3 * r:.0f} {1e3 * p:6.0f} {p / r:5.2f}" for r, p in (model[column] for column in columns)))
        for name, model in found["models"].items()
    ]
    partial, together = found["partial"], found["together"]
    shared = " and ".join(f"{1e3 * model['8 behind a card']:.0f}" for model in found["models"].values())
    return (
        f"Published, {PUBLISHED_WORKERS} GPUs: ms by ring all-reduce, by partial averaging, ratio; and as modeled\n\n"
        f"{table(('', *columns), rows)}\n\n"
        f"The ring's two figures alone: {speed(found['ring'])}.\n"
        f"Partial averaging's alone: {1e3 * partial.latency:.0f} ms a round, {partial.rate * 8e-9:.3g} Gbit/s.\n"
        f"All four: {speed(together.link)}, {1e3 * together.round_seconds:.0f} ms a round of partial averaging.\n"
        "Reproduced: partial averaging is faster for both. Not reproduced: that ResNet-50's took 150 ms, for which\n"
        "only a constant per round accounts (negotiation, averaging inside the hosts, waiting), and hence that the\n"
        "ratio falls with the size of the model (with the constant it does, but less); and that partial averaging\n"
        "ran at a higher rate than the ring.\n"
        f"Flat one-peer with 8 GPUs behind a card would take {shared} ms, more than the ring: what was published is\n"
        "hierarchical, or had a card for each GPU."
    )


def measured_text(found: dict[str, Any]) -> str:
    fits = [f"  {name:21} {speed(link)}" for name, link in {"all": found["link"], **found["alone"]}.items()]
    rows = [
        (
            r["operation"], str(r["size"]), f"{1e3 * r['seconds']:.2f}", f"{1e3 * r['model']:.2f}",
            f"{r['residual']:+.0%}", f"{r['residual_alone']:+.0%}",
        )
        for r in found["residuals"]
    ]  # fmt: skip
    header = ("operation", "bytes", "ms", "fit of all", "off by", "fit alone\noff by")
    title = f"Measured, {found['workers']} workers, {found['per_host']} per host. Fits:"
    return "\n".join([title, *fits, "", table(header, rows)])


def predicted_text(network: Network, compute: float | None) -> str:
    """Averaging steps, and the better one-peer's ratio to each all-reduce; with `compute` training steps too."""
    cases = [(name, M, n) for name, M in MODELS.items() for n in WORKERS]
    rows = []
    for _, M, n in cases:
        seconds = predict(network, n, M)
        reduces = [name for name in seconds if "all-reduce" in name]
        ratios = {f"one-peer / {name}": f"{best_one_peer(seconds) / seconds[name]:.3f}" for name in reduces}
        rows.append(milliseconds(seconds) | ratios)
    title = f"{network.name}: {speed(network.link)}, {network.per_host} per card. Averaging step, ms:"
    text = f"{title}\n\n{grid(cases, rows)}"
    if compute is not None:
        training = [milliseconds(steps(network, n, M, compute)) for _, M, n in cases]
        text += f"\n\nTraining step with {1e3 * compute:g} ms of compute, ms:\n\n{grid(cases, training)}"
    return text


def milliseconds(seconds: dict[str, float]) -> dict[str, str]:
    return {name: f"{1e3 * s:.1f}" for name, s in seconds.items()}


def grid(cases: Sequence[tuple[str, float, int]], rows: Sequence[dict[str, str]]) -> str:
    heads = ["\n".join(textwrap.wrap(name.replace("all-reduce", "a-r"), 12)) for name in rows[0]]
    return table(
        ("", "workers", *heads), [(m, str(n), *row.values()) for (m, _, n), row in zip(cases, rows, strict=True)]
    )


def objects(value: Any) -> Any:
    """For JSON: named tuples as objects."""
    value = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(value, dict):
        return {key: objects(v) for key, v in value.items()}
    return [objects(v) for v in value] if isinstance(value, (list, tuple)) else value


def draw(networks: Sequence[Network], fitted: Sequence[dict[str, Any]], file: str) -> None:
    from matplotlib.figure import Figure

    rows = -(-(len(networks) + len(fitted)) // 2)
    figure = Figure(figsize=(11, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 2)
    for spare in axes.flat[len(networks) + len(fitted) :]:
        spare.remove()
    red, blue, orange, green = "#c1121f", "#0b5fa5", "#e08e0b", "#3a8f4d"
    styles = {
        "ring all-reduce": (red, "-"), "tree all-reduce": (red, ":"), "hierarchical tree all-reduce": (red, "--"),
        "one-peer": (blue, "-"), "hierarchical one-peer": (blue, "--"), "hierarchical exponential": (orange, "--"),
    }  # fmt: skip
    workers, M = [16 << t for t in range(14)], MODELS["ResNet-50"]
    for plot, network in zip(axes.flat, networks, strict=False):
        times = [predict(network, n, M) for n in workers]
        for name, (color, style) in styles.items():
            if name in times[0]:
                plot.plot(workers, [1e3 * t[name] for t in times], color=color, linestyle=style, label=name)
        if network.round_seconds:
            ring, partial = PUBLISHED["ResNet-50"]
            plot.plot(PUBLISHED_WORKERS, 1e3 * ring, "o", color=red, label="published, ring all-reduce")
            plot.plot(PUBLISHED_WORKERS, 1e3 * partial, "o", color=blue, label="published, partial averaging")
        card = f"{network.per_host} workers a card" if network.per_host > 1 else "a card each"
        plot.set(title=f"25.5M parameters (ResNet-50)\n{network.name}, {card}", xlabel="workers")
    for plot, one in zip(axes.flat[len(networks) :], fitted, strict=False):
        for name, color in zip(MEASURED, (red, blue, orange, green), strict=True):
            points = [r for r in one["residuals"] if r["operation"] == name]
            sizes = np.geomspace(points[0]["size"], points[-1]["size"])
            costs = [COSTS[MEASURED[name]](one["workers"], size, one["per_host"]) for size in sizes]
            plot.plot([r["size"] for r in points], [1e3 * r["seconds"] for r in points], "o", color=color, label=name)
            plot.plot(sizes, [1e3 * one["link"].seconds(cost) for cost in costs], color=color, linewidth=1)
        title = f"{one['workers']} workers, measured (points)\nand fitted ({speed(one['link'])})"
        plot.set(title=title, xlabel="bytes averaged per step")
    for plot in figure.axes:
        plot.set(xscale="log", yscale="log", ylabel="milliseconds per averaging step")
        plot.grid(True, alpha=0.3)
        plot.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", nargs="*", help="JSON files of bench/exchange.py")
    parser.add_argument("--compute-ms", type=float, default=200.0, help="forward and backward pass (default 200)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FILE", help="time over workers (needs matplotlib)")
    options = parser.parse_args(argv)
    compute = options.compute_ms / 1e3
    published = fit_published()
    fitted = [fit_measured(json.loads(Path(file).read_text())) for file in options.measured]
    networks = [TCP, INFINIBAND, published["together"]]
    for one in fitted:
        name = f"fitted to {one['workers']} workers measured"
        networks.append(Network(name, one["link"], one["link"], 1))
    print(published_text(published))
    for text in (
        *map(measured_text, fitted),
        *(predicted_text(network, compute if network in (TCP, INFINIBAND) else None) for network in networks),
    ):
        print(f"\n{text}")
    print(f"\nWaiting for the slowest when a step's time has a standard deviation of 5 % ({50 * compute:.3g} ms):")
    waits = ", ".join(f"{n} {1e3 * wait_for_slowest(n, compute / 20):.0f} ms" for n in WORKERS)
    print(f"  all-reduce among {waits}; one-peer, whatever n, at most {1e3 * wait_for_slowest(2, compute / 20):.0f} ms")
    if options.json:
        predictions = [
            {"network": network.name, "model": name, "workers": n, "averaging": predict(network, n, M),
             "training": steps(network, n, M, compute)}
            for network in networks for name, M in MODELS.items() for n in WORKERS
        ]  # fmt: skip
        found = {"published": published, "measured": fitted, "networks": networks, "predictions": predictions}
        Path(options.json).write_text(json.dumps(objects(found), indent=1) + "\n")
    if options.picture:
        draw(networks[:3], fitted, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
