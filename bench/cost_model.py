"""What one averaging step costs on a network of latency a and rate 1/b, from 8 to 100,000 workers.

    python bench/cost_model.py                                        # assumed networks, and the published figures
    python bench/cost_model.py exchange.json --picture cost.png       # and what bench/exchange.py measured

n workers average M bytes; a is the time of a message without payload, b that of a byte through a network card, each
way; g workers share a card, and inside a host messages cost a', b':

    ring all-reduce             2(n-1) a + 2(n-1)/n M b     Patarasuk & Yuan 2009; gloo, Horovod, NCCL's ring
    tree all-reduce             2 log2(n) a + 2(n-1)/n M b  halving-doubling (Thakur et al. 2005), NCCL's double tree
    one-peer                    a + M b                     g workers behind a card: the mean over hops of min(h, g) M b
    static exponential          a + log2(n) M b             likewise the sum over hops; d neighbors: a + d M b
    hierarchical all-reduce     2(g-1) a' + 2(g-1)/g M b' + a tree among the n/g hosts
    hierarchical gossip         the same for the gradients, half of it again for each message gathered, + among hosts

A claim about many workers means nothing without naming the all-reduce it compares with: against a flat ring the gain
grows without bound, against a hierarchical tree it ends at 2. Not modeled: an oversubscribed fabric (long hops cross
its spine all at once), two messages that meet on a path, and how many more steps inexact averaging needs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Cost(NamedTuple):
    """Messages one after the other, and bytes through the busiest network card, each way."""

    messages: float
    bytes: float


class Link(NamedTuple):
    latency: float  # seconds per message
    rate: float  # bytes per second, each way

    def seconds(self, cost: Cost) -> float:
        return cost.messages * self.latency + cost.bytes / self.rate


class Network(NamedTuple):
    name: str
    link: Link  # between hosts
    inside: Link  # between the workers of a host
    per_host: int  # workers that share a card
    round_seconds: float = 0.0  # what each round of partial averaging costs besides messages


def gbit(latency: float, rate: float) -> Link:
    return Link(latency, rate * 1e9 / 8)


NVLINK = gbit(3e-6, 1200)
TCP = Network("25 GbE card, TCP", gbit(50e-6, 21), NVLINK, 8)
INFINIBAND = Network("200 Gbit/s InfiniBand card", gbit(5e-6, 190), NVLINK, 8)
MODELS = {"ResNet-50": 25.5e6 * 4, "BERT": 300e6 * 4}  # bytes
# Published, 256 GPUs: seconds by ring all-reduce, by partial averaging.
PUBLISHED = {"ResNet-50": (0.278, 0.150), "BERT": (1.469, 0.567)}
PUBLISHED_WORKERS = 256
WORKERS = (256, 4096, 100_000)
BACKWARD = 2 / 3  # of a step's compute


def doublings(n: int) -> int:
    return math.ceil(math.log2(n))


def hops(n: int, g: int) -> list[int]:
    """For each hop 1, 2, 4, ... below n: how many of a host's g workers have their peer on another host."""
    return [min(1 << t, n - (1 << t), g) for t in range(doublings(n))] or [0]


# In rank order a host's part of a ring, or of a tree laid out along the hosts, enters and leaves its card once.
COSTS: dict[str, Callable[[int, float, int], Cost]] = {  # of n workers, M bytes, g workers a card
    "ring all-reduce": lambda n, M, g: Cost(2 * (n - 1), 2 * (n - 1) / n * M),
    "tree all-reduce": lambda n, M, g: Cost(2 * doublings(n), 2 * (n - 1) / n * M),
    "one-peer": lambda n, M, g: Cost(1, statistics.fmean(hops(n, g)) * M),
    "exponential": lambda n, M, g: Cost(1, sum(hops(n, g)) * M),
    "ring neighbors": lambda n, M, g: Cost(1, min(2, n - 1) * M),
}
MEASURED = {  # what bench/exchange.py calls them
    "all-reduce": "ring all-reduce",
    "one-peer-exponential": "one-peer",
    "exponential": "exponential",
    "ring": "ring neighbors",
}


def hierarchical(name: str, n: int, M: float, network: Network) -> float:
    """Each worker's M/g goes to its peers on other hosts.

    Inside: reduce-scatter and all-gather; for gossip all-reduce of the gradients and all-gather of each message.
    """
    g = network.per_host
    if n % g:
        raise ValueError(f"{n} workers cannot be {g} on every host")
    outside = COSTS[name](n // g, M, 1)
    passes = 2 + (0 if "all-reduce" in name else outside.bytes / M)
    inside = Cost(passes * (g - 1), passes * (g - 1) / g * M)
    return network.inside.seconds(inside) + network.link.seconds(outside)


def predict(network: Network, n: int, M: float) -> dict[str, float]:
    """Seconds of one averaging step, for each way to do it."""
    flat = ("ring all-reduce", "tree all-reduce", "one-peer", "exponential")
    seconds = {name: network.link.seconds(COSTS[name](n, M, network.per_host)) for name in flat}
    if network.per_host > 1:
        for name in flat[1:]:
            seconds[f"hierarchical {name}"] = hierarchical(name, n, M, network)
    return {name: s + (0 if "all-reduce" in name else network.round_seconds) for name, s in seconds.items()}


def best_one_peer(seconds: dict[str, float]) -> float:
    return min(s for name, s in seconds.items() if name.endswith("one-peer"))


def step(compute: float, communication: float, hidden: float) -> float:
    """A training step when communication may hide behind the last `hidden` of the compute."""
    return compute + max(0.0, communication - hidden * compute)


def steps(network: Network, n: int, M: float, compute: float) -> dict[str, float]:
    """Training steps: AWC hides behind the whole step, ATC and bucketed all-reduce behind the backward pass."""
    seconds = predict(network, n, M)
    return {
        "ring all-reduce after backward": step(compute, seconds["ring all-reduce"], 0),
        **{f"{name} overlapped": step(compute, s, BACKWARD) for name, s in seconds.items() if "all-reduce" in name},
        "one-peer ATC": step(compute, best_one_peer(seconds), BACKWARD),
        "one-peer AWC": step(compute, best_one_peer(seconds), 1),
    }


def wait_for_slowest(workers: int, sigma: float) -> float:
    """About the mean of the largest of so many normal delays. One-peer waits for two at a time: at most that of 2."""
    return sigma * math.sqrt(2 * math.log(workers)) if workers > 1 else 0.0


def least_squares(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> np.ndarray:
    """Coefficients c >= 0 for which terms @ c is near the seconds, in relative error."""
    X = np.asarray(terms, dtype=float) / np.asarray(seconds, dtype=float)[:, None]
    scale = np.linalg.norm(X, axis=0)
    kept = scale > 0
    while True:
        c = np.zeros(X.shape[1])
        c[kept] = np.linalg.lstsq(X[:, kept] / scale[kept], np.ones(len(X)), rcond=None)[0] / scale[kept]
        if (c >= 0).all():
            return c
        kept &= c >= 0


def fit(costs: Sequence[Cost], seconds: Sequence[float]) -> Link:
    a, b = least_squares(costs, seconds)
    return Link(float(a), float(1 / b) if b else math.inf)


def fit_measured(result: dict[str, Any]) -> dict[str, Any]:
    """One link for everything that bench/exchange.py measured, one for each operation alone, and the residuals."""
    n, g = result["workers"], result["per_host"]
    rows = [row for row in result["rows"] if row["operation"] in MEASURED]
    costs = [COSTS[MEASURED[row["operation"]]](n, row["size"], g) for row in rows]
    seconds = [row["seconds"] for row in rows]
    link, alone = fit(costs, seconds), {}
    for name in MEASURED:
        mine = [i for i, row in enumerate(rows) if row["operation"] == name]
        alone[name] = fit([costs[i] for i in mine], [seconds[i] for i in mine])
    residuals = [
        {"operation": row["operation"], "size": row["size"], "seconds": s, "model": link.seconds(c),
         "residual": link.seconds(c) / s - 1, "residual_alone": alone[row["operation"]].seconds(c) / s - 1}
        for row, c, s in zip(rows, costs, seconds, strict=True)
    ]  # fmt: skip
    return {"workers": n, "per_host": g, "link": link, "alone": alone, "residuals": residuals}


def fit_published() -> dict[str, Any]:
    """The published figures by the ring's two alone (a and b), the other two alone, and all four (a, b, a constant)."""
    n = PUBLISHED_WORKERS
    rings, partials = ([COSTS[name](n, M, 1) for M in MODELS.values()] for name in ("ring all-reduce", "one-peer"))
    seconds = np.array([PUBLISHED[name] for name in MODELS])
    ring, partial = fit(rings, seconds[:, 0].tolist()), fit(partials, seconds[:, 1].tolist())
    terms = [(*cost, 0) for cost in rings] + [(*cost, 1) for cost in partials]
    a, b, constant = map(float, least_squares(terms, seconds.T.ravel().tolist()))
    together = Network("fitted to the published figures", Link(a, 1 / b), NVLINK, 1, constant)
    out: dict[str, Any] = {"ring": ring, "partial": partial, "together": together, "models": {}}
    for (name, M), r, p in zip(MODELS.items(), rings, partials, strict=True):
        both = predict(together, n, M)
        out["models"][name] = {
            "published": PUBLISHED[name],
            "from the ring": (ring.seconds(r), ring.seconds(p)),
            "from all four": (both["ring all-reduce"], both["one-peer"]),
            "8 behind a card": ring.seconds(COSTS["one-peer"](n, M, 8)),
        }
    return out


def speed(link: Link) -> str:
    return f"{1e3 * link.latency:.3g} ms a message, {link.rate * 8e-9:.3g} Gbit/s"


def published_text(found: dict[str, Any]) -> str:
    columns = ("published", "from the ring", "from all four")
    lines = [
        f"Published, {PUBLISHED_WORKERS} GPUs: ms by ring all-reduce, by partial averaging, ratio; and as modeled",
        " " * 10 + "".join(f"{column:>24}" for column in columns),
    ]
    for name, model in found["models"].items():
        pairs = (model[column] for column in columns)
        lines.append(f"{name:10}" + "".join(f"{1e3 * r:11.0f} {1e3 * p:6.0f} {p / r:5.2f}" for r, p in pairs))
    partial, together = found["partial"], found["together"]
    shared = " and ".join(f"{1e3 * model['8 behind a card']:.0f}" for model in found["models"].values())
    lines.append(
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
    return "\n".join(lines)


def measured_text(found: dict[str, Any]) -> str:
    lines = [f"Measured, {found['workers']} workers, {found['per_host']} per host. Fits:"]
    lines += [f"  {name:21} {speed(link)}" for name, link in {"all": found["link"], **found["alone"]}.items()]
    lines.append(f"  {'operation':21} {'bytes':>10} {'ms':>9} {'all':>9} {'off by':>7} {'off by, alone':>14}")
    for r in found["residuals"]:
        ms = f"{1e3 * r['seconds']:9.2f} {1e3 * r['model']:9.2f}"
        lines.append(
            f"  {r['operation']:21} {r['size']:10d} {ms} {r['residual']:+7.0%} {r['residual_alone']:+14.0%}"
        )  # fmt: skip
    return "\n".join(lines)


def predicted_text(network: Network, compute: float | None) -> str:
    """Averaging steps, and the better one-peer's ratio to each all-reduce; with `compute` training steps too."""
    cases = [(name, M, n) for name, M in MODELS.items() for n in WORKERS]
    rows = []
    for _, M, n in cases:
        seconds = predict(network, n, M)
        reduces = [name for name in seconds if "all-reduce" in name]
        ratios = {f"one-peer / {name}": f"{best_one_peer(seconds) / seconds[name]:.3f}" for name in reduces}
        rows.append(milliseconds(seconds) | ratios)
    lines = [f"{network.name}: {speed(network.link)}, {network.per_host} per card. Averaging step, ms:"]
    lines += grid(cases, rows)
    if compute is not None:
        lines.append(f"Training step with {1e3 * compute:g} ms of compute, ms:")
        lines += grid(cases, [milliseconds(steps(network, n, M, compute)) for _, M, n in cases])
    return "\n".join(lines)


def milliseconds(seconds: dict[str, float]) -> dict[str, str]:
    return {name: f"{1e3 * s:.1f}" for name, s in seconds.items()}


def grid(cases: Sequence[tuple[str, float, int]], rows: Sequence[dict[str, str]]) -> list[str]:
    heads = [textwrap.wrap(name.replace("all-reduce", "a-r"), 12) for name in rows[0]]
    depth = max(map(len, heads))
    heads = [head + [""] * (depth - len(head)) for head in heads]
    lines = [" " * 17 + "".join(f"{head[k]:>13}" for head in heads) for k in range(depth)]
    lines += [
        f"{model:10}{n:7d}" + "".join(f"{value:>13}" for value in row.values())
        for (model, _, n), row in zip(cases, rows, strict=True)
    ]
    return lines


def plain(value: Any) -> Any:
    """For JSON: named tuples as objects."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def draw(networks: Sequence[Network], fitted: Sequence[dict[str, Any]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-(len(networks) + len(fitted)) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 4.2 * rows), layout="constrained")
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
        Path(options.json).write_text(json.dumps(plain(found), indent=1) + "\n")
    if options.picture:
        draw(networks[:3], fitted, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
