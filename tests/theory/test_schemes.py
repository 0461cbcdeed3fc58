"""Promises about loss, absence, delay and noise in simulations, float64, one process:

- a simulation is what plain loops over the messages give (lossy_loops.py), to 1e-12: each scheme, and all together, on
  graphs that are static, directed and change, of 1, 2, 3, 5 and 8 workers; in torch too;
- equal workers stay bit-equal whatever is lost or late; the mean moves with single losses, and not where pairs lose,
  workers are absent, or all are late alike;
- chances are those that were asked for, depend on the seed, and not on the other schemes;
- bad input is refused by a sentence.
"""

import lossy_loops as loops
import numpy as np
import oracle
import pytest
import torch

from fused_dlam import Simulation, simulate, topology
from fused_dlam.theory.schemes import edges

LR, STEPS = 0.02, 25


def quarter(step, source, destination):
    return 0.25 if source < destination else step % 5 == 0


def in_turn(n):
    return lambda step: [(step + i) % 3 != 0 for i in range(n)]


def unlike(source, destination):
    return (source + 2 * destination) % 4


SCHEMES = {
    "none": {},
    "loss": {"loss": 0.3},
    "pairs": {"loss": 0.3, "loss_of": "pairs"},
    "a function of the message": {"loss": quarter},
    "participation": {"participation": 0.6},
    "in turn": {"participation": in_turn},
    "delay": {"delay": 2},
    "unlike delays": {"delay": unlike},
    "noise": {"noise": 0.1},
    "everything": {"loss": quarter, "participation": 0.8, "delay": unlike, "noise": 0.1},
    "everything in pairs": {"loss": 0.2, "loss_of": "pairs", "participation": in_turn, "delay": 1, "noise": 0.1},
}
GRAPHS = [("ring", 8), ("one-peer-exponential", 5), ("star", 3), ("one-way-ring", 8), ("base-k", 5), ("full", 3),
          ("ring", 1), ("one-peer-exponential", 2)]  # fmt: skip


def of(n, scheme):
    """The options for n workers."""
    options = dict(SCHEMES[scheme])
    if options.get("participation") is in_turn:
        options["participation"] = in_turn(n)
    return options


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name, n", GRAPHS)
def test_a_simulation_is_what_plain_loops_give(name, n, scheme):
    top, options = topology.get(name, n), of(n, scheme)
    grad, x0 = oracle.LeastSquares(n, gradient_noise=0.3, seed=n), np.random.default_rng(n).standard_normal((n, 3))
    order = loops.in_offsets if isinstance(top.phases[0], topology.Circulant) else loops.heard
    theirs = {k: v for k, v in options.items() if k != "loss_of"} | {"pairs": "loss_of" in options}
    for method in ("dmsgd", "exact-diffusion", "gradient-tracking"):
        ours = simulate(method, top, grad, x0, STEPS, LR, 0.7, seed=5, **options)
        want = loops.simulate(method, top, grad, x0, STEPS, LR, 0.7, seed=5, order=order, **theirs)
        scale = np.maximum.accumulate(abs(want).max(axis=(1, 2)))
        assert (abs(ours - want).max(axis=(1, 2)) <= 1e-12 * scale).all(), method
        if n > 1 and scheme != "none":
            assert abs(ours - simulate(method, top, grad, x0, STEPS, LR, 0.7)).max() > 1e-3


@pytest.mark.parametrize("scheme", ["loss", "in turn", "unlike delays", "everything in pairs"])
def test_a_simulation_in_torch(scheme):
    grad, x0 = oracle.LeastSquares(5), np.random.default_rng(0).standard_normal((5, 3))
    want = simulate("mi-dmsgd", "ring", grad, x0, STEPS, LR, **of(5, scheme))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        workers = Simulation("mi-dmsgd", "ring", torch.from_numpy(x0).to(dtype), **of(5, scheme))
        for k in range(STEPS):
            x = workers.step(torch.from_numpy(grad(k, workers.x.double().numpy())).to(dtype), LR)
        assert x.dtype == dtype and abs(x.double().numpy() - want[-1]).max() < tolerance * abs(want).max()


@pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES if "noise" not in SCHEMES[s] and "participation" not in SCHEMES[s]]
)
def test_equal_workers_stay_bit_equal(scheme):
    for name in ("ring", "star", "one-peer-exponential"):
        for method in ("mi-dmsgd", "exact-diffusion", "gradient-tracking", "k-gt", "da-dmsgd"):
            x = simulate(method, name, lambda k, x: 0.3 * x - 1 / 3, np.full((5, 3), 0.3), 40, LR, **of(5, scheme))
            assert (x == x[:, :1]).all(), (name, method)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_the_mean_moves(scheme):
    """Without gradients, on a symmetric graph, from unlike starts."""
    x0 = np.random.default_rng(0).standard_normal((8, 3))
    x = simulate("dsgd", topology.ring(8).lazy(), lambda k, x: 0.0 * x, x0, 20, LR, **of(8, scheme))
    moved = abs(x.mean(axis=1) - x0.mean(axis=0)).max()
    keeps = scheme in ("none", "pairs", "participation", "in turn", "delay")
    assert moved < 1e-14 if keeps else moved > 1e-3


def test_delays_alike_both_ways_keep_the_mean():
    x0 = np.random.default_rng(0).standard_normal((8, 3))
    of_pair = lambda source, destination: source * destination % 4  # noqa: E731
    for graph, keeps in ((topology.torus(8), True), (topology.base_k(8), True), (topology.exponential(8), False)):
        x = simulate("dsgd", graph.lazy(), lambda k, x: 0.0 * x, x0, 20, LR, delay=of_pair)
        moved = abs(x.mean(axis=1) - x0.mean(axis=0)).max() / abs(x).max()
        assert moved < 1e-14 if keeps else moved > 1e-3


def test_absent_workers_stay():
    """Bit for bit: x, every buffer, and the running norms of the clip."""
    mask = np.arange(6) % 3 > 0
    workers = Simulation("gradient-tracking", "ring", np.ones((6, 3)), clip="spikes", participation=lambda k: mask)
    grad = oracle.LeastSquares(6)
    for k in range(5):
        workers.step(grad(k, workers.x.view(np.ndarray)).view(type(workers.x)), LR)
    for value, start in [(workers.x, 1.0), *((buffer, 0.0) for buffer in workers.state)]:
        assert (value[~mask] == start).all() and (value[mask] != start).all()
    assert (workers.usual[torch.as_tensor(~mask)] == 0).all() and (workers.usual[torch.as_tensor(mask)] > 0).all()


def test_chances_are_those_asked_for():
    """8 workers on a ring, 2,000 steps: 32,000 messages, of whose share the deviation is 0.003."""
    arrived, present = [], []
    schemes = Simulation("dsgd", "ring", np.ones((8, 1)), loss=0.3, participation=0.75).schemes
    pairs = Simulation("dsgd", "ring", np.ones((8, 1)), loss=0.3, loss_of="pairs").schemes
    sent = edges(topology.ring(8).phase(0))
    for k in range(2000):
        lost, both = schemes.lost(k, sent), pairs.lost(k, sent)
        arrived.append(1 - lost.mean())
        present.append(schemes.present(k).mean())
        matrix = np.zeros((8, 8))
        matrix[sent.i, sent.j] = both
        assert np.array_equal(matrix, matrix.T)
    assert np.mean(arrived) == pytest.approx(0.7, abs=0.012) and np.mean(present) == pytest.approx(0.75, abs=0.015)
    grad, x0 = (lambda k, x: 0.0 * x), np.random.default_rng(0).standard_normal((8, 2000))
    still = simulate("dsgd", topology.ring(8), grad, 0 * x0, 1, LR, noise=0.5)
    assert still[1].std(axis=1) == pytest.approx(0.5 * np.sqrt(2) / 3, rel=0.08)  # two messages of weight 1/3


def test_the_seed_draws_everything():
    """Another seed, another run; the same messages are lost whatever the noise."""
    grad, x0 = oracle.LeastSquares(5), np.random.default_rng(0).standard_normal((5, 3))

    def run(**options):
        return simulate("dsgd", "ring", grad, x0, 20, LR, **options)

    for options in ({"loss": 0.3}, {"participation": 0.6}, {"noise": 0.1}):
        assert np.array_equal(run(**options, seed=3), run(**options, seed=3))
        assert not np.array_equal(run(**options, seed=3), run(**options, seed=4))
    quiet = run(loss=0.3, noise=1e-9)
    assert 0 < abs(quiet - run(loss=0.3)).max() < 1e-7


def test_what_is_refused():
    x = np.ones((4, 2))
    for wrong, said in (
        ({"loss": -0.1}, "loss must be a probability, from 0 to 1, not -0.1"),
        ({"loss": 1.5}, "loss must be a probability"),
        ({"loss_of": "all"}, "loss_of must be 'messages' or 'pairs', not 'all'"),
        ({"participation": 0}, "participation must be above 0"),
        ({"delay": -1}, "delay must be an integer >= 0, not -1"),
        ({"delay": 1.5}, "delay must be an integer >= 0, not 1.5"),
        ({"delay": 10**5}, "delay must be at most 10,000 steps, not 100000"),
        ({"delay": lambda j, i: -1}, r"delay\(1, 0\) must be an integer >= 0"),
        ({"noise": -1}, "noise must be a standard deviation"),
        ({"noise": np.inf}, "noise must be a standard deviation"),
        ({"seed": -1}, "seed must be an integer"),
    ):
        with pytest.raises(ValueError, match=said):
            Simulation("dsgd", "ring", x, **wrong)
    for wrong in ({"loss": "much"}, {"loss": True}, {"noise": None}, {"participation": "all"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be a number"):
            Simulation("dsgd", "ring", x, **wrong)
    for wrong, said in (
        ({"loss": lambda k, j, i: 2}, r"loss\(0, \d, \d\) must be a probability"),
        ({"participation": lambda k: [True]}, r"participation\(0\) must return 4 truth values"),
        ({"participation": lambda k: [0.5] * 4}, r"participation\(0\) must return 4 truth values"),
    ):
        with pytest.raises(ValueError, match=said):
            simulate("dsgd", "ring", lambda k, x: x, x, 1, 0.1, **wrong)
    for options in ({"loss": 0.1}, {"participation": 0.5}, {"delay": 1}, {"noise": 0.1}):
        with pytest.raises(
            ValueError, match="'pmsgd' averages gradients by all-reduce, which loses and delays nothing"
        ):
            Simulation("pmsgd", "ring", x, **options)
