"""EquiTopo (Song et al. 2022): random offsets around a circle. Their consensus rate does not depend on n.

In the matrix A_a worker i hears from i + a with weight (n-1)/n and keeps 1/n. The mean of A_a over all offsets
a = 1, ..., n-1 is J.

    d-equistatic   W = mean of A_a over M offsets drawn once, with replacement
    u-equistatic   W = mean of (A_a + A_a^T)/2 over M offsets drawn once
    od-equidyn     W_k = (1-eta) I + eta A_a, one offset drawn at every step
    ou-equidyn     W_k = (1-eta) I + eta B, where B is a matching i <-> i+a drawn at every step: a pair exchanges with
                   weight (n-1)/n, and a worker without a partner keeps its value

With M >= 8 ln(2n/p) / (3 eps^2) offsets the static graphs have |W - J| <= eps with probability 1-p. Per step,
od-equidyn multiplies the mean square of the disagreement by at most 1 - 2 eta (1-eta), and ou-equidyn by at most
1 - 2 eta/3 if eta <= 1/2.
"""

from __future__ import annotations

import math
from functools import partial
from numbers import Real

import numpy as np

from .drawn import RandomTopology, check_seed, generator
from .matrix import Circulant, Sparse, check_count, check_workers, circulant
from .topology import Topology


def d_equistatic(n: int, offsets: int | None = None, seed: int = 0) -> Topology:
    """A fixed random circulant: worker i hears from i + a for M offsets a. Directed.

    Args:
        offsets: M, ceil(log2 n) by default. They are drawn with replacement, so the degree is at most M.
        seed: if the draw is not connected, the next seed is tried, and so on. All ranks find the same one.
    """
    return Topology(_static(n, offsets, seed, mirror=False), _name("d-equistatic", M=(offsets, None), seed=(seed, 0)))


def u_equistatic(n: int, offsets: int | None = None, seed: int = 0) -> Topology:
    """A fixed random circulant: worker i hears from i +- a for M offsets a. Symmetric.

    A worker has at most 2M neighbors. The arguments are those of `d_equistatic`.
    """
    return Topology(_static(n, offsets, seed, mirror=True), _name("u-equistatic", M=(offsets, None), seed=(seed, 0)))


def od_equidyn(n: int, eta: float = 0.5, seed: int = 0) -> RandomTopology:
    """At every step worker i hears from i + a, with one random offset a. Directed; never repeats.

    Args:
        eta: the share of the exchange, in (0, 1]. 1/2 contracts fastest. The paper's code has 1, which nearly rotates
            the workers' values.
    """
    n, seed = check_workers(n), check_seed(seed)
    draw = partial(_rotation, n, seed, _share(eta))
    return RandomTopology(draw, n, min(1, n - 1), _name("od-equidyn", eta=(eta, 0.5), seed=(seed, 0)))


def ou_equidyn(n: int, eta: float = 0.5, seed: int = 0) -> RandomTopology:
    """At every step pairs i, i + a exchange, with one random offset a. Symmetric; never repeats.

    Args:
        eta: the share of the exchange, in (0, 1]. 1/2 contracts fastest. The paper's code has 1, at which pairs nearly
            swap their values.
    """
    n, seed = check_workers(n), check_seed(seed)
    draw = partial(_pairs, n, seed, _share(eta))
    return RandomTopology(draw, n, min(1, n - 1), _name("ou-equidyn", eta=(eta, 0.5), seed=(seed, 0)))


def _static(n: int, offsets: int | None, seed: int, mirror: bool) -> Circulant:
    n, seed = check_workers(n), check_seed(seed)
    M = max(1, math.ceil(math.log2(n))) if offsets is None else check_count("the number of offsets", offsets)
    drawn = [0] if n == 1 else generator(seed, 0).randint(1, n, size=M).tolist()
    if math.gcd(n, *drawn) > 1:
        return _static(n, offsets, seed + 1, mirror)
    weights = {0: 1 / n}
    for a in drawn:
        for hears_from in (-a, a) if mirror else (-a,):
            share = (n - 1) / n / len(drawn) / (2 if mirror else 1)
            weights[hears_from % n] = weights.get(hears_from % n, 0.0) + share
    return circulant(n, weights)


def _rotation(n: int, seed: int, eta: float, step: int) -> Circulant:
    if n == 1:
        return circulant(1, {0: 1.0})
    a = generator(seed, step).randint(1, n)
    share = eta * (n - 1) / n
    return circulant(n, {0: 1 - share, -a: share})


def _pairs(n: int, seed: int, eta: float, step: int) -> Sparse:
    """Goes round from a random worker s, and pairs each worker i that is free with i + a if that is free too."""
    random = generator(seed, step)
    a, s = (random.randint(1, n), random.randint(n)) if n > 1 else (0, 0)
    partner = np.arange(n)
    first = _first_of_pairs(n, a)
    i, j = (first + s) % n, (first + a + s) % n
    partner[i], partner[j] = j, i
    weight = np.where(partner != np.arange(n), eta * (n - 1) / n, 0.0)
    return Sparse(partner[:, None], weight[:, None])


def _first_of_pairs(n: int, a: int) -> np.ndarray:
    """The workers i that the walk from s = 0 pairs with i + a.

    They are every other block of b = min(a, n-a) workers, without the last b workers: i + a is free where the block
    before has not taken i's own block.
    """
    b = min(a, n - a)
    i = np.arange(n - b if n > 1 else 0)
    return i[i // max(b, 1) % 2 == 0]


def _share(eta: float) -> float:
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], not {eta!r}")
    return float(eta)


def _name(name: str, **settings) -> str:
    """The name with all settings, {key: (value, default)}, that differ from their defaults. Ranks compare names."""
    return ", ".join([name, *(f"{key} = {value}" for key, (value, default) in settings.items() if value != default)])
