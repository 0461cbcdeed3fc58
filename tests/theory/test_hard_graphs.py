"""Promises about PC-DmSGD's automatic correction rate, without gradients: it is stable on every hard graph we know, at
every momentum and gain, under both schedules; and without its third term it is not.
"""

import itertools
import math

import oracle
import pytest
from hard_graphs import BETAS, GAINS, matchings, one_way_ring

from fused_dlam import consensus_growth, rules, topology

HARD = [
    *(topology.ring(n) for n in (2, 3, 5, 8, 16, 32, 64, 128, 256)),
    *(one_way_ring(n) for n in (2, 3, 5, 8, 16, 32, 64, 128)),
    topology.grid(256),
    topology.torus(16),
    topology.star(64),
    *(topology.exponential(n) for n in (3, 8, 64, 1000)),
    *(topology.one_peer_exponential(n) for n in (2, 3, 6, 12, 64, 1000, 12_000)),
    topology.one_peer_hypercube(16),
    matchings(16, 64),
    matchings(16, 64, skipped=0.9),
    *(topology.one_peer_exponential(16).every(k) for k in (2, 16, 32)),
    *(topology.one_peer_exponential(64).every(k) for k in (4, 8)),
    *(topology.full(4).every(k) for k in (16, 64)),
    *(topology.ring(8).every(k) for k in (16, 32)),
]


@pytest.mark.parametrize("top", HARD, ids=repr)
def test_pc_dmsgd_is_stable_on_hard_graphs(top):
    """With the automatic rate disagreement dies out, under both schedules."""
    for momentum, gain, schedule in itertools.product(BETAS, GAINS, ("atc", "awc")):
        growth = consensus_growth("pc-dmsgd", top, momentum, correction_gain=gain, schedule=schedule)
        assert growth < 1, (momentum, gain, schedule)


@pytest.mark.parametrize(
    "top", [one_way_ring(16), matchings(16, 64, skipped=0.9), topology.ring(8).every(32)], ids=repr
)
def test_the_third_term_of_the_automatic_rate_is_needed(top):
    """The control: min{(1 - beta) / 10, (1 - beta)^2} alone is unstable on badly connected graphs."""
    momentum = 0.9
    rate = min((1 - momentum) / 10, (1 - momentum) ** 2)
    assert consensus_growth("pc-dmsgd", top, momentum, correction_rate=rate, correction_gain=math.inf) > 1


def test_the_automatic_rate():
    for momentum, rho in itertools.product((0.0, 0.3, 0.9, 0.95, 0.99), (0.0, 0.5, 0.95, 0.999)):
        h = rules.pc_dmsgd.scalars(1.0, momentum, 0.0, rho)
        assert h.correction_rate == pytest.approx(oracle.pull_rate(momentum, rho), rel=1e-12)
        assert rules.pc_dmsgd.scalars(1.0, momentum, 0.0, rho, {"correction_rate": "auto"}) == h
