"""The proofs of theory/README.md, run: the sums of squares that never grow, on random cases.

- One worker's midpoint step has the singular values 1 and beta, so V never grows, whatever doubly stochastic matrices
  come and however the workers' curvatures differ. Held to 1e-10 of V per step; V falls much faster where it falls.
- Adapt then combine, and a rate above the limit, do break this: the check can fail.
- Without gradients MI-DmSGD's disagreement has such functions for every schedule of learning rates.
"""

import math

import numpy as np
import pytest
from everyday import everyday
from hard_graphs import one_way_ring

from fused_dlam import consensus_growth, rules, topology

SIZES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 33, 64)
ROUNDING = 1e-10
DMSGD, MI = rules.get("dmsgd"), rules.get("mi-dmsgd")


# -- random cases, all with n workers at once --------------------------------------------------------------------------


def permutations(random, cases, n):
    return np.eye(n)[random.random((cases, n)).argsort(axis=1)]


def matchings(random, cases, n):
    """Symmetric permutations: pairs swap, and with odd n one worker stays. Their eigenvalues are 1 and -1."""
    order, swapped = random.random((cases, n)).argsort(axis=1), np.arange(n)
    swapped[: n // 2 * 2] = swapped[: n // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
    W = np.zeros((cases, n, n))
    np.put_along_axis(W, order[:, :, None], np.eye(n)[order[:, swapped]], axis=1)
    return W


def doubly_stochastic(random, cases, n):
    """One matrix for each case, of a kind drawn for it: directed, symmetric, swaps, skipped or an exact average."""
    weights = random.dirichlet(np.full(4, 0.5), cases)
    mixed = sum(w[:, None, None] * permutations(random, cases, n) for w in weights.T)
    one_peer = (np.eye(n) + permutations(random, cases, n)) / 2
    swaps = matchings(random, cases, n)
    share = random.random((cases, 1, 1))
    partial = share * np.eye(n) + (1 - share) * swaps
    skipped, exact = np.broadcast_to(np.eye(n), mixed.shape), np.full(mixed.shape, 1 / n)
    kinds = np.stack(
        [mixed, one_peer, permutations(random, cases, n), swaps, partial, (mixed + mixed.mT) / 2, skipped, exact]
    )
    return kinds[random.integers(len(kinds), size=cases), np.arange(cases)]


def curvatures(random, limit, n, d):
    """lr H_i = Q a Q^T for each case and worker: unlike, not commuting, a from 0 to .999 of the limit; zeros too."""
    cases = len(limit)
    Q = np.linalg.qr(random.standard_normal((cases, n, d, d)))[0]
    share = np.where(random.random((cases, n, d)) < 0.3, 10.0 ** random.uniform(-4, 0, (cases, n, d)),
                     random.random((cases, n, d)))  # fmt: skip
    share[random.random((cases, n, d)) < 0.15] = 0.999
    share[random.random((cases, n, d)) < 0.15] = 0.0
    return Q, 0.999 * share / share.max(axis=(1, 2), keepdims=True).clip(0.1) * limit[:, None, None]


def quadratic_form(Q, weights, D):
    return (weights * np.einsum("bnde,bnd->bne", Q, D) ** 2).sum(axis=(1, 2))


def largest_rise(rule, cases, n, seed, steps=40, of_limit=1.0, d=3, matrices=doubly_stochastic):
    """The largest (V after a step) / V before it, over all cases and steps, minus one.

    The steps are the rule's own equations. Every case has its own momentum, rate, curvatures, start and matrices.
    """
    random = np.random.default_rng([seed, n])
    beta = np.where(random.random(cases) < 0.1, 0.0, random.uniform(0, 0.99, cases))
    Q, a = curvatures(random, of_limit * 2 * (1 + beta), n, d)
    lr = 10 ** random.uniform(-4, 2, (cases, 1, 1))
    H = np.einsum("bnde,bne,bnfe->bndf", Q, a, Q) / lr[..., None]
    # On what a worker's curvature does not see its momentum is zero at the start, and stays so: V does not count it.
    weights = np.where(a > 0, (1 + beta)[:, None, None] / 2 / np.where(a > 0, a, 1) - 1 / 4, 0.0)
    m = np.einsum("bnde,bne->bnd", Q, (a > 0) * random.standard_normal(a.shape)) * random.integers(
        2, size=(cases, 1, 1)
    )
    x = random.standard_normal((cases, n, d))
    h = rule.scalars(1.0, 0.0, 0.0)._replace(lr=lr, momentum=beta[:, None, None])

    def V(x, m):
        D = -lr * m
        return ((x - D / 2) ** 2).sum(axis=(1, 2)) + quadratic_form(Q, weights, D)

    state, before, worst = rule.State(m), V(x, m), -math.inf
    for _ in range(steps):
        g, W = np.einsum("bnde,bne->bnd", H, x), matrices(random, cases, n)
        (y,) = rule.send.fn(x, g, state, h)
        x, state = rule.update.fn(x, g, state, (W @ y - y,), h)
        state = rule.State(*state)
        after = V(x, *state)
        worst, before = max(worst, float((after / before).max() - 1)), after
    return worst


# -- the theorem -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99, 0.999])
def test_one_workers_step_has_the_singular_values_1_and_beta(beta):
    """To 1e-13, for every curvature between 0 and the limit 2 (1 + beta)."""
    a = np.concatenate([np.geomspace(1e-9, 1, 400), np.linspace(0, 1, 402)[1:-1]]) * 2 * (1 + beta)
    a = a[a < 2 * (1 + beta)]
    c, p, G = beta - a / 2, 1 - a / 2, np.sqrt(a * ((1 + beta) / 2 - a / 4))
    sizes = np.linalg.svd(np.stack([np.stack([c, -G], -1), np.stack([G, p], -1)], -2), compute_uv=False)
    assert abs(sizes - [1, beta]).max() < 1e-13


def test_that_step_is_the_rules_own():
    """(D, q) -> (D', y) by the rule's equations, without neighbors: the matrix of the proof, to 1e-15."""
    beta, a = 0.9, 1.7
    h = DMSGD.under("midpoint").scalars(1.0, beta, 0.0)
    columns = []
    for D, q in ((1.0, 0.0), (0.0, 1.0)):
        x, state = q + D / 2, DMSGD.State(-D)
        (y,) = DMSGD.under("midpoint").send.fn(x, a * x, state, h)
        x, (m,) = DMSGD.update.fn(x, a * x, state, (0.0,), h)
        columns.append((-m, y))
        assert x + m / 2 == pytest.approx(y, abs=1e-15)  # the midpoint is what is sent
    expected = [[beta - a / 2, -a], [(1 + beta) / 2 - a / 4, 1 - a / 2]]
    np.testing.assert_allclose(np.transpose(columns), expected, atol=1e-15)


@pytest.mark.parametrize("cases", everyday([1_000, 10_000], [1_000]))
def test_V_never_grows(cases):
    """Random curvatures, momenta, rates and sequences of matrices, 1 to 64 workers."""
    rule, each = DMSGD.under("midpoint"), -(-cases // len(SIZES))
    worst = {n: largest_rise(rule, each, n, seed=cases) for n in SIZES}
    assert max(worst.values()) < ROUNDING, worst


def one_peer(random, cases, n):
    return (np.eye(n) + permutations(random, cases, n)) / 2


def test_the_check_can_fail():
    """Adapt then combine and adapt while communicating break it on one-peer graphs; so does a rate 1 % above the limit,
    where V is no sum of squares any more."""
    for rule in (DMSGD.under("atc"), DMSGD.under("awc")):
        assert largest_rise(rule, 100, 8, seed=1, matrices=one_peer) > 0.1
    assert largest_rise(DMSGD.under("midpoint"), 100, 8, seed=1, matrices=one_peer) < ROUNDING
    assert largest_rise(DMSGD.under("midpoint"), 100, 8, seed=1, of_limit=1.02) > 1e-3


# -- the integral at a constant rate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("e", [0.05, 0.5, 1.0, 1.9])
def test_equal_curvature_on_symmetric_static_graphs(e):
    """Theorem 2: shrinks for every eigenvalue in (-1, 1), momentum and curvature up to .999 of the limit."""
    random, cases = np.random.default_rng(0), 5_000
    mu, beta = random.uniform(0.01, 1.99, cases), random.uniform(0, 0.99, cases)
    a = 2 * (1 + beta) * random.choice([0, 0.01, 0.5, 0.999], cases)
    step = np.zeros((cases, 3, 3))
    for column, (x, D, p) in enumerate(np.eye(3)):
        d = p + (D_new := beta * D - a * x)
        y = x + d / 2
        step[:, :, column] = np.stack([x + d - mu * y, D_new, p - e * mu * y], axis=1)
    assert abs(np.linalg.eigvals(step)).max() < 1


def limit_on_normal_graphs(eigenvalues):
    turning = eigenvalues[abs(eigenvalues.imag) > 1e-9]
    sigma = ((1 - abs(turning) ** 2) * abs(1 - turning) ** 2 / (4 * turning.imag**2)).min()
    return (2 * sigma + 1 - math.sqrt(4 * sigma + 1)) / sigma


@pytest.mark.parametrize(
    "top", [topology.exponential(8), topology.exponential(16), one_way_ring(3), one_way_ring(8), one_way_ring(16)],
    ids=repr,
)  # fmt: skip
def test_the_largest_rate_of_correction_on_directed_static_graphs(top):
    """e* to 0.3 %, and the default is at most half of it."""
    for times, shrinks in ((0.997, True), (1.003, False)):
        e = times * (limit := limit_on_normal_graphs(top.modes.ravel()))
        growth = consensus_growth(MI, top, 0.9, correction_rate=e, correction_gain=math.inf)
        assert (growth < 1) == shrinks, (limit, growth)
    assert rules.auto_displacement_rate(0.9, top.rho, False) <= limit / 2 * (1 + 1e-9)


@pytest.mark.parametrize("T", [4, 8, 16])
def test_the_largest_rate_of_correction_where_a_period_averages_exactly(T):
    """2/(T - 1), and the default is .76/T: the reason for the floor of rho."""
    for top in (topology.full(6).every(T), *([topology.one_peer_exponential(2**T)] if T < 16 else [])):
        for times, shrinks in ((0.997, True), (1.003, False)):
            e = times * 2 / (T - 1)
            growth = consensus_growth(MI, top, 0.5, correction_rate=e, correction_gain=math.inf)
            assert (growth < 1) == shrinks, (top, growth)
        default = rules.auto_displacement_rate(0.9, top.slowest_rho, False)
        assert default == pytest.approx(math.log(1 / 0.22) / 2 / T, rel=0.02)


# -- any schedule: MI-DmSGD's (x, p) without gradients -----------------------------------------------------------------


def at_rest(W, e, gain, shares, x, p):
    """Yields (x, p) after each step of MI-DmSGD at zero gradient, shares[k] = lr / (the largest lr so far)."""
    h = MI.scalars(1.0, 0.0, 0.0, hyper={"correction_rate": 0.5})._replace(correction=e)
    m = 0.0 * x
    yield x, p
    for k, share in enumerate(shares):
        h, state = h._replace(share=share, leak=1 - e * share / gain), MI.State(m, p)
        (y,) = MI.send.fn(x, m, state, h)
        x, (_, p) = MI.update.fn(x, m, state, (W(k) @ y - y,), h)
        yield x, p


def schedules(random, steps, cases):
    """Shares from 0 to 1 for each case: toggles of any two lengths, pauses, random, and constant."""
    on, off = random.integers(1, 30, size=(2, cases))
    low = random.choice([0.0, 1e-3, 0.1, 0.5, 1.0], cases)
    toggled = np.where(np.arange(steps)[:, None] % (on + off) < on, 1.0, low)
    drawn = random.choice([0.0, 0.01, 0.3, 1.0], (steps, cases))
    kinds = np.stack([toggled, drawn, random.random((steps, cases))])
    return kinds[random.integers(3, size=cases), :, np.arange(cases)].T[:, :, None, None]


def rise(V, path):
    """The largest growth in one step of V at what differs between workers; below 1e-20 of the start it is rounding."""
    sizes = np.stack([V(*(v - v.mean(axis=1, keepdims=True) for v in both)) for both in path])
    return ((sizes[1:] - sizes[:-1]) / (sizes[:-1] + 1e-20 * sizes[0])).max()


def contracting(random, cases, n, r):
    """Directed doubly stochastic matrices with |W - J| = r."""
    W, J = doubly_stochastic(random, cases, n), 1 / n
    norm = np.linalg.norm(W - J, 2, axis=(1, 2)).clip(1e-9)[:, None, None]
    return J + np.minimum(1, r / norm) * (W - J)


@pytest.mark.parametrize("gain", [1.0, 10.0, 300.0, math.inf])
def test_any_schedule_on_graphs_that_contract_at_every_step(gain):
    """|x|^2 + s |p/e - x|^2 never grows if |W_k - J| <= r at every step, e = (1 - r)/(1 + (1 - r)/(2 gain)): on
    directed graphs that change at every step. Twice that rate breaks it."""
    random, n, cases, steps = np.random.default_rng(0), 7, 150, 120
    r = random.uniform(0.02, 0.98, (cases, 1, 1))
    largest, s = (1 - r) / (1 + (1 - r) / (2 * gain)), (1 + r) / 2 / (1 + 1 / gain)
    x, p = (v - v.mean(axis=1, keepdims=True) for v in random.standard_normal((2, cases, n, 2)))
    shares = schedules(random, steps, cases)
    Ws = [contracting(random, cases, n, r) for _ in range(steps)]
    for times, holds in ((1.0, True), (0.5, True), (2.0, False)):
        e = times * largest

        def V(x, p, e=e):
            return (x**2 + s * (p / e - x) ** 2).sum(axis=(1, 2))

        rises = rise(V, at_rest(Ws.__getitem__, e, gain, shares, x, e * p))
        assert (rises < ROUNDING) == holds, rises


def two_workers(eigenvalue):
    one = np.ones((2, 2))
    return one / 2 + eigenvalue * (np.eye(2) - one / 2)


def test_any_schedule_at_the_default_rate_on_symmetric_graphs():
    """Every eigenvalue 1 - mu of every static symmetric W, e = min(1/2, 2 (1 - rho)), no leak: (p/e - x)^2 +
    4/(3 - mu) max(0, x p/e) never grows for mu <= 1, nor x^2 + (1 - mu/2) (p/e - x)^2 for mu >= 1."""
    random, cases, steps = np.random.default_rng(0), 2_000, 120
    mu = np.concatenate([np.geomspace(1e-4, 1, cases // 2), random.uniform(0, 2, cases // 2)])[:, None, None]
    slowest = np.minimum(mu, 2 - mu) * np.where(random.random(mu.shape) < 0.5, 1, random.random(mu.shape))
    e = np.minimum(0.5, 2 * slowest)
    assert all(e[k] == pytest.approx(rules.auto_displacement_rate(0.9, 1 - slowest[k], True)) for k in range(20))
    W = two_workers(1 - mu)
    shares = schedules(random, steps, cases)
    x, p = random.standard_normal((2, cases, 1, 1)) * np.array([[1.0], [-1.0]])

    def V(x, p):
        w = p / e - x
        low = w**2 + 4 / (3 - mu) * np.maximum(0, x * p / e)
        return np.where(mu <= 1, low, x**2 + (1 - mu / 2) * w**2).sum(axis=(1, 2))

    assert rise(V, at_rest(lambda k: W, e, math.inf, shares, x, e * p)) < ROUNDING


def after_bursts(times, mu=0.02, bursts=4, pause=250):
    """The largest growth of p per burst and pause, over bursts of 20 to 140 steps; e = times * mu, no leak."""
    on = np.arange(20, 145, 10)
    start = np.tile([[1.0], [-1.0]], (len(on), 1, 1))
    shares = [np.array(k < on, float)[:, None, None] for k in range(on.max() + pause)] * bursts
    *_, (_, p) = at_rest(lambda k: two_workers(1 - mu), times * mu, math.inf, shares, 0 * start, start)
    return abs(p).max() ** (1 / bursts)


def test_pauses_pump_a_rate_that_is_too_large():
    """mu = 0.02: at e = 2 mu, the largest default, every rhythm makes p smaller. The limit is 3.0 mu
    (bench/midpoint_schedules.py has it for every mu); at 3.3 mu bursts of 50 steps make it grow by 7 % each."""
    assert after_bursts(2.0) < 0.8
    assert after_bursts(3.3) > 1.05
