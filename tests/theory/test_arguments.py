"""Promise: simulator and certificate refuse numbers that make no sense, by a sentence."""

import math

import numpy as np
import pytest

from fused_dlam import Simulation, consensus_growth, simulate, topology


def run(steps=2, lr=0.1, **options):
    return simulate("dmsgd", "ring", lambda k, x: x, np.ones((3, 2)), steps, lr, **options)


def test_steps():
    assert run(0).shape == (1, 3, 2) and run(np.int64(2)).shape == (3, 3, 2)
    for steps in (-1, 1.5, True, "2", None):
        with pytest.raises(ValueError, match="steps must be an integer >= 0, not"):
            run(steps)


def test_settings():
    for options in ({"lr": "0.1"}, {"lr": None}, {"momentum": "0.9"}, {"weight_decay": True}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be a number, not"):
            run(**options)
    with pytest.raises(TypeError, match="momentum must be a number"):
        Simulation("dmsgd", "ring", np.ones((3, 2)), momentum=[0.9])


def test_the_certificates_momentum():
    for momentum in (-1, -1e-9, 1, 1.5, math.nan, math.inf):
        for graph in (topology.ring(4), topology.random_match(4), topology.ring(1)):
            with pytest.raises(ValueError, match="Invalid momentum value: .*, must be in"):
                consensus_growth("dmsgd", graph, momentum)
    with pytest.raises(TypeError, match="momentum must be a number, not '0.9'"):
        consensus_growth("dmsgd", topology.ring(4), "0.9")
    assert consensus_growth("dmsgd", topology.ring(4), 0) < 1
