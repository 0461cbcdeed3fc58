"""Why local steps are as they are (optim/local_steps.py): MI-DmSGD with the other ways to do it, dense, float64.

Promises, for 4 workers on the one-peer graph: with p in step() alone the squared bias is 1e4 times larger; where every
exchange corrects steps at the full rate, the range is smaller for counts that last, and larger for counts drawn anew.
"""

import numpy as np
import pytest

from fused_dlam import topology

N, BETA, E, KAPPA = 4, 0.9, 0.2, 300.0
OPTIMA = np.random.default_rng(0).standard_normal((N, 3))
DRAWN = np.random.default_rng(1).integers(1, 6, (500, N))


def last(lr, counts, steps, guessed=True, everywhere=True):
    """x after `steps` exchanges, curvature 1 on all workers.

    guessed: local steps have the weight of the last exchange, else the full rate. everywhere: p acts in every step.
    """
    x, m, p, guess = np.zeros_like(OPTIMA), np.zeros_like(OPTIMA), np.zeros_like(OPTIMA), np.ones((N, 1))
    graph = topology.get("one-peer-exponential", N)
    for k in range(steps):
        c = np.asarray(counts(k))[:, None]
        s, before, start = c.mean() / c, guess if guessed else np.ones((N, 1)), x
        for done in range(1, c.max()):
            u = BETA * m + x - OPTIMA
            steps_now = c > done
            m, x = np.where(steps_now, u, m), x + steps_now * before * (everywhere * p - lr * u)
        u = BETA * m + x - OPTIMA
        x = start + s / before * (x - start)
        d = s * (p - lr * u) if everywhere else p - lr * s * u
        y = x + d / 2
        pull = graph.weights(k) @ y - y
        x, m, p = x + d + pull, u, (1 - E / KAPPA) * p + E / (c.mean() if everywhere else 1) * pull
        guess = s
        if abs(x).max() > 1e6:
            break
    return x


def squared_bias(x):
    return ((x - OPTIMA.mean(0)) ** 2).mean()


def test_the_correction_acts_in_every_local_step():
    def uneven(_):
        return (5, 5, 5, 1)

    once, each = (squared_bias(last(0.01, uneven, 1500, everywhere=way)) for way in (False, True))
    assert 3e3 < once / each < 3e5


@pytest.mark.parametrize("guessed, stable, unstable", [(True, 1.45, 1.6), (False, 0.48, 0.56)])
def test_the_range_for_speeds_that_last(guessed, stable, unstable):
    def steady(_):
        return (8, 8, 2, 2)

    assert abs(last(stable, steady, 1500, guessed)).max() < 10
    assert abs(last(unstable, steady, 1500, guessed)).max() > 1e3


@pytest.mark.parametrize("guessed, stable, unstable", [(True, 0.9, 1.4), (False, 1.4, 2.1)])
def test_the_range_for_counts_that_are_drawn(guessed, stable, unstable):
    assert abs(last(stable, lambda k: DRAWN[k], 500, guessed)).max() < 10
    assert abs(last(unstable, lambda k: DRAWN[k], 500, guessed)).max() > 1e3
