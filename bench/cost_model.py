"""What one averaging step costs on a network of latency a and rate 1/b, from 8 to 100,000 workers.

    python bench/cost_model.py                                        # assumed networks, and the published figures
    python bench/cost_model.py exchange.json --picture cost.png       # and what bench/exchange.py measured

n workers average M bytes; a is the time of a message without payload, b that of a byte through a network card, each
way; g workers share a card, and inside a host messages cost a', b':

    ring all-reduce             2(n-1) a + 2(n-1)/n M b     Patarasuk & Yuan 2009; gloo, Horovod, NCCL's ring
    tree all-reduce             2 log2(n) a + 2(n-1)/n M b  halving-doubling (Thakur et al. 2005), NCCL's double tree
    one-peer                    a + M b                     g workers behind a card: the mean over hops of min(h, g) M b
    static exponential          a + log2(n) M b             likewise the sum over hops; d neighbors: a + d M b
    hierarchical X              2(g-1) a' + 2(g-1)/g M b' + X among the n/g hosts

A claim about many workers means nothing without naming the all-reduce it compares with: against a flat ring the gain
grows without bound, against a hierarchical tree it ends at 2. Not modeled: an oversubscribed fabric (long hops cross
its spine all at once), two messages that meet on a path, and how many more steps inexact averaging needs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
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
    return math.ceil(math.log2(n)) if n > 1 else 0


def leaving(n: int, hop: int, g: int) -> int:
    """How many of a host's g workers have the worker `hop` further on another host."""
    return min(hop, n - hop, g)


def ring_all_reduce(n: int, M: float, g: int = 1) -> Cost:
    return Cost(2 * (n - 1), 2 * (n - 1) / n * M)  # in rank order a host's ring enters and leaves it once


def tree_all_reduce(n: int, M: float, g: int = 1) -> Cost:
    return Cost(2 * doublings(n), 2 * (n - 1) / n * M)  # laid out along the hosts, as NCCL does


def one_peer(n: int, M: float, g: int = 1) -> Cost:
    hops = [leaving(n, 1 << t, g) for t in range(doublings(n))]
    return Cost(1, M * sum(hops) / len(hops)) if hops else Cost(0, 0)


def static_exponential(n: int, M: float, g: int = 1) -> Cost:
    hops = [leaving(n, 1 << t, g) for t in range(doublings(n))]
    return Cost(1, M * sum(hops)) if hops else Cost(0, 0)


def ring_neighbors(n: int, M: float, g: int = 1) -> Cost:
    return Cost(1, M * min(2, n - 1)) if n > 1 else Cost(0, 0)


FLAT = {
    "ring all-reduce": ring_all_reduce,
    "tree all-reduce": tree_all_reduce,
    "one-peer": one_peer,
    "exponential": static_exponential,
}
ALL_REDUCES = ("ring all-reduce", "tree all-reduce", "hierarchical all-reduce")
GOSSIP = ("one-peer", "exponential", "hierarchical one-peer", "hierarchical exponential")
MEASURED = {
    "all-reduce": ring_all_reduce,
    "one-peer-exponential": one_peer,
    "exponential": static_exponential,
    "ring": ring_neighbors,
}


def hierarchical(outer: Callable[..., Cost], n: int, M: float, network: Network) -> float:
    """Reduce-scatter in the host, each worker's M/g with its peers on other hosts, all-gather in the host."""
    g = network.per_host
    if n % g:
        raise ValueError(f"{n} workers cannot be {g} on every host")
    inside = Cost(2 * (g - 1), 2 * (g - 1) / g * M)
    return network.inside.seconds(inside) + network.link.seconds(outer(n // g, M))


def predict(network: Network, n: int, M: float) -> dict[str, float]:
    """Seconds of one averaging step, for each way to do it."""
    seconds = {name: network.link.seconds(cost(n, M, network.per_host)) for name, cost in FLAT.items()}
    seconds["hierarchical all-reduce"] = hierarchical(tree_all_reduce, n, M, network)
    seconds["hierarchical one-peer"] = hierarchical(one_peer, n, M, network)
    seconds["hierarchical exponential"] = hierarchical(static_exponential, n, M, network)
    return {name: s + (network.round_seconds if name in GOSSIP else 0) for name, s in seconds.items()}


def step(compute: float, communication: float, hidden: float) -> float:
    """A training step when communication may hide behind the last `hidden` of the compute."""
    return compute + max(0.0, communication - hidden * compute)


def steps(network: Network, n: int, M: float, compute: float) -> dict[str, float]:
    """Training steps: AWC hides behind the whole step, ATC and bucketed all-reduce behind the backward pass."""
    seconds = predict(network, n, M)
    behind = {f"{name}, overlapped": step(compute, seconds[name], BACKWARD) for name in ALL_REDUCES}
    best = min(seconds["one-peer"], seconds["hierarchical one-peer"])
    return {
        "local": compute,
        "ring all-reduce, after backward": step(compute, seconds["ring all-reduce"], 0),
        **behind,
        "one-peer ATC": step(compute, best, BACKWARD),
        "one-peer AWC": step(compute, best, 1),
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
    costs = [MEASURED[row["operation"]](n, row["size"], g) for row in rows]
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
    """What the published figures say: the ring's two give a and b; all four give a, b and a constant per round."""
    n, rings, partials = PUBLISHED_WORKERS, [], []
    for M in MODELS.values():
        rings.append(ring_all_reduce(n, M))
        partials.append(one_peer(n, M))
    seconds = np.array([PUBLISHED[name] for name in MODELS])
    link = fit(rings, seconds[:, 0])
    terms = [(*cost, 0) for cost in rings] + [(*cost, 1) for cost in partials]
    a, b, c = least_squares(terms, seconds.T.ravel())
    together = Network("fitted to the published figures", Link(float(a), float(1 / b)), NVLINK, 1, float(c))
    out: dict[str, Any] = {"ring_link": link, "together": together, "models": {}}
    for name, M in MODELS.items():
        both = predict(together, n, M)
        out["models"][name] = {
            "published": PUBLISHED[name],
            "from_ring": (link.seconds(ring_all_reduce(n, M)), link.seconds(one_peer(n, M))),
            "together": (both["ring all-reduce"], both["one-peer"]),
            "eight_behind_a_card": link.seconds(one_peer(n, M, 8)),
        }
    return out


def published_text(fitted: dict[str, Any]) -> str:
    link, together = fitted["ring_link"], fitted["together"]
    lines = [
        f"Published, {PUBLISHED_WORKERS} GPUs. Milliseconds by ring all-reduce, by partial averaging, and their ratio:",
        f"{'':10} {'published':>22} {'model, from the ring':>22} {'model, from all four':>22}",
    ]
    for name, m in fitted["models"].items():
        columns = (m["published"], m["from_ring"], m["together"])
        lines.append(f"{name:10} " + " ".join(f"{1e3 * r:8.0f} {1e3 * p:6.0f} {p / r:6.2f}" for r, p in columns))
    return "\n".join([
        *lines,
        f"From the ring's two figures: {1e6 * link.latency:.0f} us and {link.rate * 8e-9:.1f} Gbit/s. From all four:"
        f" {1e6 * together.link.latency:.0f} us, {together.link.rate * 8e-9:.1f} Gbit/s and"
        f" {1e3 * together.round_seconds:.0f} ms per round of partial averaging.",
        "Reproduced: partial averaging is faster for both models. Not reproduced without a constant per round: how much",
        "for ResNet-50 (the model has no such constant: negotiation, averaging inside hosts, jitter), and that the ratio",
        "is smaller for the larger model. Not reproduced at all: that partial averaging used the network at a higher rate",
        "than the ring. With 8 GPUs behind a card flat one-peer would take "
        + " and ".join(f"{1e3 * m['eight_behind_a_card']:.0f} ms" for m in fitted["models"].values())
        + ", more than the ring: the published runs were hierarchical or had more cards.",
    ])  # fmt: skip


def measured_text(fitted: dict[str, Any]) -> str:
    lines = [f"Measured, {fitted['workers']} workers, {fitted['per_host']} per host. Fits:"]
    for name, link in {"all together": fitted["link"], **fitted["alone"]}.items():
        lines.append(f"  {name:21} {1e3 * link.latency:8.3f} ms per message, {link.rate * 8e-6:9.1f} Mbit/s")
    lines.append(f"  {'operation':21} {'bytes':>11} {'measured ms':>11} {'model':>9} {'off by':>7} {'alone':>7}")
    for r in fitted["residuals"]:
        lines.append(
            f"  {r['operation']:21} {r['size']:11d} {1e3 * r['seconds']:11.2f} {1e3 * r['model']:9.2f}"
            f" {r['residual']:+7.0%} {r['residual_alone']:+7.0%}"
        )
    return "\n".join(lines)


def prediction_text(network: Network, compute: float) -> str:
    link = network.link
    lines = [
        f"{network.name}: {1e6 * link.latency:.3g} us per message, {link.rate * 8e-9:.3g} Gbit/s, {network.per_host}"
        " workers behind a card. Milliseconds of an averaging step; the better one-peer's ratio to each all-reduce;",
        f"and of a training step with {1e3 * compute:g} ms of compute.",
        f"{'':10} {'':>7} {'all-reduce':^26} {'one-peer':^17} {'expon.':>8} {'one-peer / a-r':^20} {'overlapped a-r':^26}"
        f" {'one-peer':^17}",
        f"{'':10} {'workers':>7} {'ring':>8} {'tree':>8} {'hier.':>8} {'flat':>8} {'hier.':>8} {'hier.':>8}"
        f" {'ring':>6} {'tree':>6} {'hier.':>6} {'ring':>8} {'tree':>8} {'hier.':>8} {'ATC':>8} {'AWC':>8}",
    ]
    for name, M in MODELS.items():
        for n in WORKERS:
            p, t = predict(network, n, M), steps(network, n, M, compute)
            best = min(p["one-peer"], p["hierarchical one-peer"])
            shown = (*ALL_REDUCES, "one-peer", "hierarchical one-peer", "hierarchical exponential")
            overlapped = (*(f"{r}, overlapped" for r in ALL_REDUCES), "one-peer ATC", "one-peer AWC")
            lines.append(
                f"{name:10} {n:7d} " + " ".join(f"{1e3 * p[k]:8.1f}" for k in shown)
                + "".join(f" {best / p[k]:6.3f}" for k in ALL_REDUCES)
                + "".join(f" {1e3 * t[k]:8.1f}" for k in overlapped)
            )  # fmt: skip
    return "\n".join(lines)


def draw(networks: Sequence[Network], fitted: Sequence[dict[str, Any]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = len(networks) + len(fitted)
    figure, axes = plt.subplots(-(-panels // 2), 2, figsize=(11, 4.2 * -(-panels // 2)), layout="constrained")
    for spare in axes.flat[panels:]:
        spare.axis("off")
    lines = {
        "ring all-reduce": ("#c1121f", "-"),
        "tree all-reduce": ("#c1121f", ":"),
        "hierarchical all-reduce": ("#c1121f", "--"),
        "one-peer": ("#0b5fa5", "-"),
        "hierarchical one-peer": ("#0b5fa5", "--"),
        "hierarchical exponential": ("#e08e0b", "--"),
    }
    M = MODELS["ResNet-50"]
    workers = [8 << t for t in range(15)]
    for plot, network in zip(axes.flat, networks, strict=False):
        for name, (color, style) in lines.items():
            if network.per_host > 1 or not name.startswith("hierarchical"):
                ms = [1e3 * predict(network, n, M)[name] for n in workers]
                plot.plot(workers, ms, color=color, linestyle=style, label=name)
        if network.round_seconds:
            for seconds, color in zip(PUBLISHED["ResNet-50"], ("#c1121f", "#0b5fa5"), strict=True):
                plot.plot(PUBLISHED_WORKERS, 1e3 * seconds, "o", color=color)
        plot.set(title=f"{network.name}, {network.per_host} workers a card", xlabel="workers")
    colors = dict(zip(MEASURED, ("#c1121f", "#0b5fa5", "#e08e0b", "#3a8f4d"), strict=True))
    for plot, one in zip(axes.flat[len(networks) :], fitted, strict=False):
        for name, color in colors.items():
            rows = [r for r in one["residuals"] if r["operation"] == name]
            plot.plot([r["size"] for r in rows], [1e3 * r["seconds"] for r in rows], "o", color=color, label=name)
            plot.plot([r["size"] for r in rows], [1e3 * r["model"] for r in rows], color=color, linewidth=1)
        plot.set(title=f"measured (points) and fitted, {one['workers']} workers", xlabel="bytes averaged per step")
    for plot in axes.flat[:panels]:
        plot.set(xscale="log", yscale="log", ylabel="milliseconds per averaging step")
        plot.grid(True, alpha=0.3)
        plot.legend(frameon=False, fontsize=8)
    figure.suptitle("One averaging step of 25.5M parameters (ResNet-50), by the latency-bandwidth model", fontsize=11)
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
    for text in (*map(measured_text, fitted), *(prediction_text(network, compute) for network in networks)):
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
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.picture:
        draw(networks[:3], fitted, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
