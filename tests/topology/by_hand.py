"""Topologies by hand: the family's definitions by plain loops, which share no code with the package."""

import itertools
import math
import warnings

import numpy as np

from fused_dlam import Topology, topology

RANDOM = ["random-match", "od-equidyn", "ou-equidyn"]
SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24]
DIRECTED = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])  # 0 hears 1, 1 hears 2, 2 hears 0
UNEVEN = np.array([[0.7, 0.3, 0.0], [0.0, 0.2, 0.8], [0.5, 0.4, 0.1]])  # rows sum to one, columns do not


def family(sizes):
    return [(name, n) for name in topology.FAMILY for n in sizes if "hypercube" not in name or n & (n - 1) == 0]


def steps(top, more=1):
    """All steps of a period and some more, or some of a graph that never repeats."""
    return range((top.period or 5) + more)


def quiet(weights, name="custom"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Topology(weights, name)


def equal_weights(n, heard):
    """Worker i gives equal weights to itself and to heard(i)."""
    W = np.zeros((n, n))
    for i in range(n):
        sources = {i} | {j % n for j in heard(i)}
        for j in sources:
            W[i, j] = 1 / len(sources)
    return W


def metropolis(n, heard):
    neighbors = [{j for j in heard(i)} - {i} for i in range(n)]
    W = np.zeros((n, n))
    for i in range(n):
        for j in neighbors[i]:
            W[i, j] = 1 / (1 + max(len(neighbors[i]), len(neighbors[j])))
        W[i, i] = 1 - sum(W[i])
    return W


def lattice(n, wrap):
    """Neighbors on a grid with rows <= columns, as square as the divisors of n allow."""
    rows = max(r for r in range(1, n + 1) if n % r == 0 and r * r <= n)
    columns = n // rows

    def heard(i):
        r, c = i // columns, i % columns
        for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if wrap:
                yield (r + dr) % rows * columns + (c + dc) % columns
            elif 0 <= r + dr < rows and 0 <= c + dc < columns:
                yield (r + dr) * columns + c + dc

    return heard


def powers_of_two_below(n):
    return [2**t for t in range(n) if 2**t < n]


def equistatic(n, seed=0, mirror=False):
    """As the paper's code states it, workers numbered from 1: the mean of A_a over M offsets, or of A_a and A_a^T."""
    M = next(t for t in itertools.count(1) if 2**t >= n)
    offsets = np.random.RandomState(np.random.Philox(key=(seed, 0))).randint(1, n, size=M) if n > 1 else []
    if math.gcd(n, *(int(a) for a in offsets)) > 1 and n > 1:
        return equistatic(n, seed + 1, mirror)
    K = np.zeros((n, n)) if n > 1 else np.eye(1)
    for a in offsets:
        W = np.zeros((n, n))
        for i in range(1, n + 1):
            j = (i + a) % n or n
            W[i - 1, j - 1] = (n - 1) / n
            W[i - 1, i - 1] = 1 / n
        K += ((W + W.T) / 2 if mirror else W) / M
    return K


def one_peer(n, heard):
    """Worker i hears from heard(i), half and half."""
    W = np.zeros((n, n))
    for i in range(n):
        W[i, i] += 0.5
        W[i, heard(i) % n] += 0.5
    return W


def inner_outer(n):
    """As BlueFog's GetInnerOuterExpo2DynamicSendRecvRanks states it, rank by rank: whom a rank receives from. With
    machines of one worker, or one machine, there is nobody to skip."""
    m = {6: 3, 8: 4, 12: 3, 16: 4, 24: 4}.get(n, 1)
    if m == 1:
        return [one_peer(n, lambda i, p=p: i - p) for p in powers_of_two_below(n) or [0]]
    machines = n // m
    outer, inner = int(np.log2(machines - 1)) + 1, int(np.log2(m - 2)) + 1

    def receives_from(rank, index):
        machine, local, outside = rank // m, rank % m, index % m
        if local == outside:
            return (machine - 2 ** (index % outer)) % machines * m + local
        distance = 2 ** (index % inner)
        if distance >= (local - outside) % m:
            distance += 1
        return machine * m + (local - distance) % m

    return [one_peer(n, lambda i, t=t: receives_from(i, t)) for t in range(math.lcm(m, outer, inner))]


def inner_outer_ring(n):
    """As BlueFog's GetInnerOuterRingDynamicSendRecvRanks states it: whom a rank receives from, machines as above."""
    m = {6: 3, 8: 4, 12: 3, 16: 4, 24: 4}.get(n, 1)
    if m == 1:
        return [one_peer(n, lambda i: i - 1)]

    def receives_from(rank, index):
        machine, local, outside = rank // m, rank % m, index % m
        if local == outside:
            return (machine - 1) % (n // m) * m + local
        source = (local - 1) % m
        if source == outside:
            source = (source - 1) % m
        return machine * m + source

    return [one_peer(n, lambda i, t=t: receives_from(i, t)) for t in range(m)]


def alternating(n):
    """The pairs of a ring by turns; if n is odd the pairs (i, i+1) for i = t, t+2, ... leave worker t-1 out."""
    if n < 3:
        return [np.full((n, n), 1 / n)]

    def partner(i, t):
        place = (i - t) % n
        return i if place == n - 1 and n % 2 else i + (1 if place % 2 == 0 else -1)

    return [one_peer(n, lambda i, t=t: partner(i, t)) for t in range(n if n % 2 else 2)]


def definition(name, n):
    powers = powers_of_two_below(n)
    return {
        "full": lambda: [np.full((n, n), 1 / n)],
        "one-way-ring": lambda: [one_peer(n, lambda i: i - 1)],
        "d-equistatic": lambda: [equistatic(n)],
        "u-equistatic": lambda: [equistatic(n, mirror=True)],
        "one-peer-ring": lambda: alternating(n),
        "inner-outer-exponential": lambda: inner_outer(n),
        "inner-outer-ring": lambda: inner_outer_ring(n),
        "ring": lambda: [equal_weights(n, lambda i: [i - 1, i + 1])],
        "grid": lambda: [metropolis(n, lattice(n, wrap=False))],
        "torus": lambda: [metropolis(n, lattice(n, wrap=True))],
        "star": lambda: [metropolis(n, lambda i: range(1, n) if i == 0 else [0])],
        "hypercube": lambda: [equal_weights(n, lambda i: [i ^ p for p in powers])],
        "exponential": lambda: [equal_weights(n, lambda i: [i - p for p in powers])],
        "symmetric-exponential": lambda: [equal_weights(n, lambda i: [i + s * p for p in powers for s in (1, -1)])],
        "one-peer-exponential": lambda: [equal_weights(n, lambda i, p=p: [i - p]) for p in powers or [0]],
        "one-peer-hypercube": lambda: [equal_weights(n, lambda i, p=p: [i ^ p]) for p in powers or [0]],
    }[name]()
