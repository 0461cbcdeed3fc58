"""After a loss the centered buffers are centered over those that are left (engine/regroup.py), here in the simulator.

Promise: the workers' mean is then as near to the optimum of the data that are left as where nobody was lost. With the
buffers as they were it is elsewhere, and stays there where the correction does not leak.
"""

import math

import numpy as np
import pytest

from fused_dlam import Simulation

N, D, LR = 8, 20, 0.02
RNG = np.random.default_rng(0)
CURVATURES, OPTIMA = RNG.uniform(0.3, 1.7, (N, D)), RNG.standard_normal((N, D))


LEFT = np.arange(1, N)


def workers_at(x, method, gain):
    return Simulation(method, "one-peer-exponential", x, momentum=0.9, correction_gain=gain)


def run(simulation, workers, steps):
    for _ in range(steps):
        simulation.step(CURVATURES[workers] * (simulation.x - OPTIMA[workers]), LR)
    return simulation


def after_a_loss(method, gain, centered):
    before = run(workers_at(np.zeros((N, D)), method, gain), np.arange(N), 1000)
    after = workers_at(before.x[LEFT], method, gain)
    state = [buffer[LEFT] for buffer in before.state]
    if centered:
        at = after.rule.state.index("correction_buffer")
        state[at] = state[at] - state[at].mean(0)
    after.state, after.memory = after.rule.State(*state), dict(before.memory)
    return run(after, LEFT, 1000)


def error(simulation):
    """Of the mean, relative to the optimum of those that are left."""
    optimum = (CURVATURES[LEFT] * OPTIMA[LEFT]).sum(0) / CURVATURES[LEFT].sum(0)
    return np.linalg.norm(simulation.x.mean(0) - optimum) / np.linalg.norm(optimum)


@pytest.mark.parametrize("method", ["mi-dmsgd", "pc-dmsgd"])
@pytest.mark.parametrize("gain", [300.0, math.inf])
def test_the_mean_finds_the_optimum_of_those_that_are_left(method, gain, capsys):
    kept, centered = (error(after_a_loss(method, gain, way)) for way in (False, True))
    alone = error(run(workers_at(np.zeros((N - 1, D)), method, gain), LEFT, 2000))
    with capsys.disabled():
        print(f"\n{method}, gain {gain}: kept {kept:.2g}, centered {centered:.2g}, never more than these {alone:.2g}")
    assert centered < 1.1 * alone + 1e-9 and kept > 10 * centered
