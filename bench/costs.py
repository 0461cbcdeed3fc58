"""What one averaging step costs on a network of latency a and rate 1/b, from 8 to 100,000 workers.

n workers average M bytes; a is the time of a message without payload, b that of a byte through a network card, each
way; g workers share a card, and inside a host messages cost a', b':

    ring all-reduce             2(n-1) a + 2(n-1)/n M b     Patarasuk & Yuan 2009; gloo, Horovod, NCCL's ring
    tree all-reduce             2 log2(n) a + 2(n-1)/n M b  halving-doubling (Thakur et al. 2005), NCCL's double tree
    one-peer                    a + M b                     g workers behind a card: the mean over hops of min(h, g) M b
    static exponential          a + log2(n) M b             likewise the sum over hops; d neighbors: a + d M b
    hierarchical all-reduce     2(g-1) a' + 2(g-1)/g M b' + a tree among the n/g hosts
    hierarchical gossip         the same for the gradients, half of it again for each message gathered, + among hosts

Not modeled: an oversubscribed fabric (long hops cross its spine all at once), two messages that meet on a path, and how
many more steps inexact averaging needs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple


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
