"""Promises about stability, all without gradients unless said:

- `consensus_growth` is what a simulation of the disagreement measures, by whichever path it is computed;
- the published figures: where DecentLaM diverges, up to which momentum it does not, how fast PC-DmSGD forgets;
- PC-DmSGD with the automatic rate is stable on every hard graph we know, at every momentum and gain;
- its guards keep warm restarts and toggling learning rates bounded, and without them those blow up.
"""

import itertools
import math
import warnings

import numpy as np
import oracle
import pytest

from fused_dlam import Rule, Topology, consensus_growth, jit, rules, simulate, topology
from fused_dlam.theory import stability
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


# -- the certificate is what happens -----------------------------------------------------------------------------------


def measured_growth(method, top, momentum, schedule="atc", **hyper):
    """Growth per step of the disagreement, read off a run of the oracle that is kicked at random and then left alone.

    Many columns of kicks, over four steps or more, span all the disagreement that there can be. What is seen of it
    during one period and during the next is related by a linear map, found by least squares; its spectral radius is
    the growth.
    """
    Ws, T, columns = [top.weights(k) for k in range(top.period)], top.period, 5 * top.n
    kicked, seen = math.ceil(4 / T) * T, T + 4
    kicks = np.random.default_rng(0).standard_normal((kicked + 1, top.n, columns))
    if method == "pc-dmsgd":
        hyper.setdefault("correction_rate", oracle.auto_rate(momentum, top.rho))
    x = oracle.run(
        method,
        lambda k: Ws[k % T],
        lambda k, x: kicks[k] if k < kicked else np.zeros_like(x),
        kicks[-1],
        lambda k: 1.0,
        momentum,
        0.0,
        steps=kicked + T + seen,
        schedule=schedule,
        **hyper,
    )
    x = x - x.mean(axis=1, keepdims=True)
    before, after = (x[start : start + seen].reshape(-1, columns) for start in (kicked, kicked + T))
    U, sizes, V = np.linalg.svd(before, full_matrices=False)
    rank = int((sizes > 1e-10).sum())
    if rank == 0:
        return 0.0
    return abs(np.linalg.eigvals(U[:, :rank].T @ after @ V[:rank].T / sizes[:rank])).max() ** (1 / T)


@pytest.mark.parametrize("momentum", [0.8, 0.9])
@pytest.mark.parametrize(
    "top",
    [
        topology.ring(8),
        topology.star(5),
        topology.exponential(8),
        one_way_ring(6),
        topology.one_peer_exponential(12),
        topology.one_peer_hypercube(8),
        topology.one_peer_exponential(8).every(3),
        topology.one_peer_exponential(6).with_global_average(5),
        matchings(8, 6),
        row_stochastic(5, 1),
        row_stochastic(5, 4),
    ],
    ids=repr,
)
def test_the_certificate_is_what_a_simulation_measures(top, momentum):
    """For every method and schedule, growing or shrinking, to 1e-5 per step."""
    for method in GOSSIP:
        for schedule in ("atc", "awc")[: 1 if method == "da-dmsgd" else 2]:
            growth = consensus_growth(method, top, momentum, schedule=schedule)
            measured = measured_growth(method, top, momentum, schedule)
            if method == "qg-dmsgd":  # momentum on a mode that W kills is never seen in x; it decays by mu = beta
                measured = max(measured, momentum) if growth == pytest.approx(momentum, abs=1e-5) else measured
            if max(growth, measured) ** top.period > 1e-12:  # below, the root of a rounding error
                assert measured == pytest.approx(growth, abs=1e-5), (method, schedule)


def test_gain_and_rate_enter_the_certificate():
    top = topology.one_peer_exponential(12)
    for gain, rate in itertools.product((1.0, 4.0, math.inf), (0.002, 0.03, 0.2)):
        hyper = {"correction_gain": gain, "correction_rate": rate}
        growth = consensus_growth("pc-dmsgd", top, 0.9, **hyper)
        assert measured_growth("pc-dmsgd", top, 0.9, **hyper) == pytest.approx(growth, abs=1e-5), hyper
    for mu in (0.1, 0.97):
        growth = consensus_growth("qg-dmsgd", top, 0.9, mu=mu)
        assert measured_growth("qg-dmsgd", top, 0.9, mu=mu) == pytest.approx(growth, abs=1e-5), mu


# Graphs whose matrices at n = 8 have no eigenvectors in common.
WITHOUT_MODES = ["one-peer-ring", "inner-outer-exponential", "random-match", "od-equidyn", "ou-equidyn"]


class WithoutModes(Topology):
    """The certificate must take the long way: the dense map of all workers."""

    modes = None


@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize(
    "top",
    [
        *(topology.get(name, 8) for name in topology.FAMILY if name not in ("full", *WITHOUT_MODES)),
        topology.one_peer_exponential(12),
        topology.one_peer_exponential(5).every(3),
        Topology([topology.star(6).weights(), topology.full(6).weights(), topology.star(6).lazy().weights()], "stars"),
        row_stochastic(6, 1),
    ],
    ids=repr,
)
def test_modes_and_the_dense_map_agree(top, momentum):
    """Per step to 1e-8, wherever there are modes; over a period to 1e-13 where it averages exactly (the root of a
    rounding error is not small)."""
    assert top.modes is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = WithoutModes([top.weights(t) for t in range(top.period)])
    for method in GOSSIP:
        by_modes, by_map = consensus_growth(method, top, momentum), consensus_growth(method, dense, momentum)
        if min(by_modes, by_map) ** top.period < 1e-13:
            assert max(by_modes, by_map) ** top.period < 1e-13, method
        else:
            assert by_modes == pytest.approx(by_map, abs=1e-8), method


def test_a_circulant_is_the_same_written_as_a_matrix():
    for top in (topology.exponential(8), topology.one_peer_exponential(6)):
        dense = Topology([top.weights(t) for t in range(top.period)])
        for method in GOSSIP:
            assert consensus_growth(method, dense) == pytest.approx(consensus_growth(method, top), abs=1e-8), method


def test_exact_averages_have_nothing_to_disagree_on():
    for method in ("psgd", "pmsgd"):
        assert consensus_growth(method, topology.ring(8)) == 0.0
    assert all(consensus_growth(method, topology.ring(1)) == 0.0 for method in GOSSIP)
    assert consensus_growth("dsgd", topology.full(8)) == pytest.approx(0, abs=1e-12)


def test_workers_that_only_swap_never_agree():
    """W = [[0, 1], [1, 0]] is doubly stochastic and connected, but contracts nothing."""
    swap = Topology([[0.0, 1.0], [1.0, 0.0]])
    assert swap.rho == pytest.approx(1) and consensus_growth("dsgd", swap) == pytest.approx(1)


def test_long_periods_neither_overflow_nor_vanish():
    """However long a random sequence is, its growth is a number, and so is the rate chosen for it."""
    once = topology.one_peer_exponential(16)
    for k in (400, 1500):
        for phases in ([*once.phases] * k, [phase.dense() for phase in once.phases] * (k // 10)):
            growth = consensus_growth("decentlam", Topology(phases))
            assert growth == pytest.approx(consensus_growth("decentlam", once), abs=1e-6)
    once = one_way_ring(16)
    for k in (500, 3000):
        growth = consensus_growth("pc-dmsgd", Topology([*once.phases] * k))
        assert growth == pytest.approx(consensus_growth("pc-dmsgd", once), abs=1e-6)


# -- published figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("symmetric-exponential", (0.949, 0.949, 0.949, 0.949)),
        ("ring", (0.949, 0.949, 0.949, 0.949)),
        ("exponential", (1.155, 1.237, 1.252, 1.231)),
        ("one-peer-exponential", (1.080, 1.114, 1.196, 1.231)),
        ("one-peer-hypercube", (0.949, 1.052, 1.220, 1.238)),
    ],
)
def test_where_decentlam_diverges(name, figures):
    """beta = 0.9, n = 4, 8, 16, 64, to three digits."""
    for n, figure in zip((4, 8, 16, 64), figures, strict=True):
        assert consensus_growth("decentlam", topology.get(name, n)) == pytest.approx(figure, abs=5.1e-4), n


@pytest.mark.parametrize(
    ("name", "momentum", "figures"),
    [
        ("one-peer-exponential", 0.8, (0.8953, 0.9046, 0.9127, 0.9210, 0.9351, 0.9427, 0.9506, 0.9580)),
        ("one-peer-exponential", 0.9, (0.9488, 0.9535, 0.9569, 0.9615, 0.9674, 0.9716, 0.9759, 0.9798)),
        ("one-peer-exponential", 0.95, (0.9747, 0.9759, 0.9767, 0.9779, 0.9795, 0.9806, 0.9823, 0.9834)),
        ("one-peer-exponential", 0.99, (0.9950, 0.9950, 0.9951, 0.9951, 0.9952, 0.9952, 0.9953, 0.9953)),
        ("exponential", 0.9, (0.9491, 0.9538, 0.9576, 0.9621, 0.9673, 0.9714)),
    ],
)
def test_how_fast_pc_dmsgd_forgets(name, momentum, figures):
    """The automatic rate; n = 8, 64, 1024, 16384, each at gain 1 and infinity; to four digits."""
    cases = list(itertools.product((8, 64, 1024, 16384), (1.0, math.inf)))[: len(figures)]
    for (n, gain), figure in zip(cases, figures, strict=True):
        growth = consensus_growth("pc-dmsgd", topology.get(name, n), momentum, correction_gain=gain)
        assert growth == pytest.approx(figure, abs=5.1e-5), (n, gain)


def largest_stable_momentum(method, top):
    low, high = 0.0, 0.999
    if consensus_growth(method, top, high) < 1:
        return high
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if consensus_growth(method, top, middle) < 1 else (low, middle)
    return low


@pytest.mark.parametrize(
    ("top", "beta"),
    [
        (topology.ring(16), 0.999),
        (topology.hypercube(8), 0.999),
        (topology.torus(8), 0.999),
        (topology.star(8), 0.999),
        (topology.exponential(8).symmetrize(), 0.999),
        (topology.exponential(4), 0.638),
        (topology.exponential(8), 0.520),
        (topology.exponential(64), 0.527),
        (topology.exponential(8).lazy(), 0.675),
        (Topology(circulant(16, [1, 4]), "exponential base 4"), 0.303),
        (topology.one_peer_exponential(8), 0.706),
        (topology.one_peer_exponential(64), 0.506),
        (topology.one_peer_exponential(8).lazy(), 0.764),
        (topology.one_peer_hypercube(4), 0.999),
        (topology.one_peer_hypercube(8), 0.707),
        (topology.one_peer_hypercube(16), 0.549),
        (topology.one_peer_hypercube(16).lazy(), 0.999),
        (one_way_ring(4), 0.355),
        (one_way_ring(32), 0.221),
    ],
    ids=repr,
)
def test_the_largest_stable_momentum_of_decentlam(top, beta):
    """By bisection, to 0.002: independent figures."""
    assert largest_stable_momentum("decentlam", top) == pytest.approx(beta, abs=2e-3)


def test_decentlam_by_schur_and_jury():
    """A static W is stable iff ((Re l + beta)/(1 + beta))^2 + (Im l/(1 - beta))^2 < 1 for all eigenvalues but 1."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, beta = int(rng.integers(3, 13)), float(rng.random())
        offsets, weights = rng.choice(np.arange(2, n), n // 3, replace=False), rng.dirichlet(np.ones(2 + n // 3))
        phase = circulant(n, dict(zip([0, 1, *offsets.tolist()], weights, strict=True)))
        l = np.linalg.eigvals(phase.dense())
        l = np.delete(l, np.argmin(abs(l - 1)))
        stable = (((l.real + beta) / (1 + beta)) ** 2 + (l.imag / (1 - beta)) ** 2 < 1).all()
        assert (consensus_growth("decentlam", Topology(phase), beta) < 1) == stable


def test_the_other_methods_are_stable_where_decentlam_is_not():
    for n, name in itertools.product((8, 16, 32), ("exponential", "one-peer-exponential", "one-peer-hypercube")):
        top = topology.get(name, n)
        for method in set(GOSSIP) - {"decentlam"}:
            assert consensus_growth(method, top, 0.9) < 1, (method, name, n)
        assert consensus_growth("decentlam", top, 0.9) > 1


def test_sixty_five_thousand_workers():
    top = topology.one_peer_exponential(65_536)
    assert consensus_growth("pc-dmsgd", top, 0.9) < 1 < consensus_growth("decentlam", top, 0.9)


# -- PC-DmSGD on every hard graph --------------------------------------------------------------------------------------

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
        assert h.correction_rate == pytest.approx(oracle.auto_rate(momentum, rho), rel=1e-12)
        assert rules.pc_dmsgd.scalars(1.0, momentum, 0.0, rho, {"correction_rate": "auto"}) == h


# -- learning rates that come and go -----------------------------------------------------------------------------------


def derive_unguarded(h, memory):
    rate = h["correction_rate"]
    return {"leak": 1 - rate / h["correction_gain"], "correction": rate / h["lr"] if h["lr"] else 0.0}


@jit
def send_rounded(x, g, s, h):
    """x - lr u as bfloat16: split = 2^45 + 1 leaves 8 of the 53 bits (Veltkamp)."""
    u = h.momentum * s.momentum_buffer + (g + h.weight_decay * x)
    y = x - h.lr * u
    t = h.split * y
    return (t - (t - y),)


@jit
def send_descended_rounded(x, g, s, h):
    y = x - h.lr * (g + h.weight_decay * x)
    t = h.split * y
    return (t - (t - y),)


def rounded(rule, send, derive):
    """A rule of the package with bfloat16 messages, and with `derive` in place of its own."""
    hyper = {**rule.hyper, "split": 2.0**45 + 1}
    return Rule(f"{rule.name}, bfloat16 messages", send, rule.update, rule.state, hyper=hyper, derive=derive)


PC = rules.pc_dmsgd
ROUNDED = rounded(PC, send_rounded, PC.derive)
UNGUARDED = Rule("pc-dmsgd, 1/lr", PC.send, PC.update, PC.state, hyper=PC.hyper, derive=derive_unguarded)
UNGUARDED_ROUNDED = rounded(PC, send_rounded, derive_unguarded)
LR = 0.05


def restart(k):
    """A warm restart: 500 steps at 1e-6 in between."""
    return 1e-6 if 500 <= k < 1000 else LR


def toggle(k):
    return LR * (1, 1e-3)[k // 5 % 2]


def peak_error(method, top, lr, **hyper):
    """The largest squared error after the first 50 steps of 2,000, relative to the optimum."""
    problem = oracle.LeastSquares(top.n, d=10, rows=50)
    with np.errstate(all="ignore"):
        error = problem.error(simulate(method, top, problem, np.zeros((top.n, 10)), 2000, lr, **hyper))
    return np.nan_to_num(error[50:], nan=math.inf).max()


@pytest.mark.parametrize(("gain", "bound"), [(1.0, 0.4), (10.0, 0.2), (math.inf, 0.02)])
def test_a_warm_restart_stays_bounded(gain, bound):
    """n = 16, one-peer exponential: the peak is at most DmSGD's own (0.30), at gain 10 a fraction of it, at infinity
    none; with bfloat16 messages too. The control, 1/lr without guard, replays the rounding of the messages."""
    top = topology.one_peer_exponential(16)
    assert peak_error("dmsgd", top, restart) == pytest.approx(0.30, abs=0.02)
    assert peak_error("pc-dmsgd", top, restart, correction_gain=gain) < bound
    assert peak_error(ROUNDED, top, restart, correction_gain=gain) < bound
    assert peak_error(UNGUARDED_ROUNDED, top, restart, correction_gain=gain) > 10


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("name", ["one-peer-exponential", "exponential", "ring"])
def test_toggling_rates_stay_bounded(name, gain):
    """Every five steps between lr and lr / 1000: below DmSGD's peak on the same graph. The control overflows."""
    top = topology.get(name, 16)
    bound = min(0.15, peak_error("dmsgd", top, toggle))
    assert peak_error("pc-dmsgd", top, toggle, correction_gain=gain) < bound
    assert peak_error(ROUNDED, top, toggle, correction_gain=gain) < bound
    assert not peak_error(UNGUARDED, top, toggle, correction_gain=gain) < 1e6


def test_decentlam_restarts_warm():
    """On the ring, with bfloat16 messages: 0.4. The control, 1/lr without guard: 1e4 and more."""
    guarded = rounded(rules.decentlam, send_descended_rounded, rules.decentlam.derive)
    unguarded = rounded(rules.decentlam, send_descended_rounded, lambda h, memory: {"inverse_lr": 1 / h["lr"]})
    assert peak_error("decentlam", topology.ring(16), restart) < 1
    assert peak_error(guarded, topology.ring(16), restart) < 1
    assert peak_error(unguarded, topology.ring(16), restart) > 1e3


# -- the refusal's advice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "top", [topology.one_peer_exponential(8), topology.exponential(8), matchings(8, 6), row_stochastic(5, 4)], ids=repr
)
def test_remedies_are_true(top):
    """What a refusal recommends has a growth below one; a graph that cannot be symmetrized is no obstacle."""
    growth = consensus_growth("decentlam", top, 0.95)
    assert growth > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = stability.remedies(rules.decentlam, top, 0.95, growth)
    assert f"{growth:.4f}-fold" in text and repr(top.name) in text and f"{top.n} workers" in text
    assert ("pc-dmsgd" in text) == (consensus_growth("pc-dmsgd", top, 0.95) < 1)
    if "momentum=" in text:
        beta = float(text.split("momentum=")[1].split(" ")[0])
        assert 0 < beta < 0.95 and consensus_growth("decentlam", top, beta) < 1


def test_names_are_not_topologies():
    with pytest.raises(TypeError, match="needs a Topology"):
        consensus_growth("dsgd", "ring")
