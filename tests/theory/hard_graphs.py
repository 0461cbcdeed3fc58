"""What the tests of this folder share: methods, momenta, gains, and graphs that are hard to be stable on."""

import math
import warnings

import numpy as np

from fused_dlam import Topology
from fused_dlam.topology import circulant

GOSSIP = ["dsgd", "dmsgd", "da-dmsgd", "awc-dmsgd", "qg-dmsgd", "decentlam", "pc-dmsgd"]
BETAS = [0.5, 0.8, 0.9, 0.95, 0.99]
GAINS = [1.0, 10.0, math.inf]


def one_way_ring(n):
    return Topology(circulant(n, [1]), "one-way ring")


def matchings(n=16, period=64, skipped=0.0, seed=0):
    """Random pairs, a new pairing each step; `skipped` is the share of steps without any exchange."""
    rng = np.random.default_rng(seed)
    phases = []
    for _ in range(period):
        W = np.eye(n)
        for i, j in rng.permutation(n).reshape(-1, 2):
            W[i, i] = W[i, j] = W[j, i] = W[j, j] = 0.5
        local = round(skipped / (1 - skipped)) if skipped else 0
        phases += [np.eye(n)] * local + [W]
    rng.shuffle(phases)  # so that the exchanges come at irregular times
    return Topology(phases, "random matchings" + (f", {skipped:.0%} skipped" if skipped else ""))


def row_stochastic(n, period, seed=0):
    rng = np.random.default_rng(seed)
    W = rng.random((period, n, n)) * (rng.random((period, n, n)) < 0.4) + np.eye(n) + np.roll(np.eye(n), 1, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Topology(W / W.sum(axis=2, keepdims=True), "random row stochastic")
