"""Promises of `clip="spikes"`, which shortens gradients far longer than a worker's recent ones:

- with real processes every method follows the dense oracle within 1e-5, each bucket shortened for itself, and whole;
- it is the same bit for bit whether messages leave early, with no message and no byte more;
- steady gradients are never shortened: bit for bit the training without it;
- running norms are in checkpoints: training goes on from one bit for bit;
- zero, missing and infinite gradients leave the running norm as it was; a loss scale does not show.
"""

import math

import numpy as np
import oracle
import pytest
import torch
import workers
from spike_workers import relaid, size_of, spiky, train_each
from test_processes import STEPS, network_gradient

from fused_dlam import GossipSGD, Simulation, simulate, topology
from fused_dlam.layers import Lars
from fused_dlam.layers.spikes import shorten

N, GRAPH = 3, "one-peer-exponential"
PIECES = {"bucket_mb": 1e-6}  # every parameter is a bucket of its own
CASES = [
    (method, {"schedule": schedule, "clip": "spikes", **pieces})
    for method, schedule, both in (("dmsgd", "atc", ()), ("mi-dmsgd", "auto", (PIECES, {})), ("pc-dmsgd", "awc", ()),
                                   ("pmsgd", "atc", ()), ("adamw", "midpoint", ()))
    for pieces in both or (PIECES,)
]  # fmt: skip


@pytest.fixture(scope="module")
def results():
    late = [(method, {**options, "overlap": False}) for method, options in CASES]
    plain = [(method, {**options, "clip": None, "overlap": False}) for method, options in CASES]
    return workers.run_together(
        N,
        {
            "trained": (train_each, CASES, STEPS),
            "late": (train_each, late, STEPS),
            "plain": (train_each, plain, STEPS),
            "back": (workers.roll_back, {"clip": "spikes", "method": "mi-dmsgd"}),
            "spiky": (spiky,),
            "relaid": (relaid,),
        },
    )


def buckets(pieces):
    """The columns of each bucket."""
    sizes = [getattr(workers.Tied(), name).numel() for name in workers.TRAINED]
    ends = np.cumsum(sizes)
    return [slice(e - s, e) for e, s in zip(ends, sizes, strict=True)] if pieces else [slice(0, int(ends[-1]))]


@pytest.mark.parametrize("c", range(len(CASES)), ids=[f"{m}-{o}" for m, o in CASES])
def test_follows_the_oracle(c, results):
    method, options = CASES[c]
    graph = topology.get(GRAPH, N)
    hyper = {"correction_rate": oracle.auto_rate(method, graph, 0.9)} if "c-" in method or "mi-" in method else {}
    network, sizes = network_gradient(N), [[[size_of(k, i)] for i in range(N)] for k in range(STEPS)]
    expected, without = (
        oracle.run(
            method, graph.weights, lambda k, x: sizes[k] * network(k, x),
            np.tile(workers.trained(workers.Tied()).numpy(), (N, 1)), workers.lr_at, 0.9, 0.0, steps=STEPS,
            schedule=options["schedule"], spikes=spikes, **hyper,
        )
        for spikes in (buckets("bucket_mb" in options), None)
    )  # fmt: skip
    scale = abs(expected[-1]).max()
    for rank in range(N):
        got = results["trained"][rank][c][0][-1].double().numpy()
        assert abs(got - expected[-1, rank]).max() / scale < 1e-5, (CASES[c], rank)
    assert abs(expected[-1] - without[-1]).max() / scale > 1e-3, "it must act, or nothing was tested"


def test_it_does_not_matter_when_messages_leave(results):
    """Bit for bit, with as many bytes as without it."""
    for rank in range(N):
        each = (results[which][rank] for which in ("trained", "late", "plain"))
        for case, (early, _), (late, sent), (_, without) in zip(CASES, *each, strict=True):
            assert torch.equal(early, late), case
            assert sent == without, case


def test_a_checkpoint_has_the_running_norms(results):
    """Back to step 5 and on to step 12 again: the same bits."""
    for first, second in results["back"]:
        assert torch.equal(first, second)


def test_in_other_buckets_running_norms_start_anew(results):
    """What was one bucket's norm shortens no other's; the workers' mean has none, and is equal on all."""
    for moved, means in results["relaid"]:
        assert moved == pytest.approx([0.1 * math.sqrt(8)] * 2, rel=1e-5)
        assert means == results["relaid"][0][1]
        assert not any("usual" in str(group["memory"]) for groups in means for group in groups)


def test_spikes_of_one_worker(results):
    """One rank's gradient is 1,000 times as long in step 6, zero in 8, infinite in 9, missing in 10, and scaled by a
    GradScaler all along: it moves nobody further than half again as far as usual."""
    for rank, (norms, moved) in enumerate(results["spiky"]):
        steady = moved[5]
        assert all(m <= 1.6 * steady for m in moved[6:]), (rank, moved)
        assert all(math.isfinite(r) and r > 0 for r in norms), norms
        assert norms[8] == norms[7] and norms[9] == norms[7] and norms[10] == norms[7], norms
        assert norms[6] == pytest.approx(norms[5] * (1.025 if rank == 1 else 1.0), rel=1e-4)


def test_the_rule_itself():
    """`shorten` against its statement in plain numbers, to 1e-15; what tells nothing leaves the running norm."""
    norms = [3.0, 3.0, 100.0, 1e-3, 0.0, math.inf, math.nan, 4.0, 1e30]
    usual, r = torch.zeros((), dtype=torch.float64), None
    for norm in norms:
        factor, usual = shorten(torch.tensor(norm, dtype=torch.float64), usual)
        if not math.isfinite(norm):
            expected = 0.0
        elif norm == 0:
            expected = 1.0
        else:
            r = norm if r is None else r
            expected = min(1.0, 1.5 * r / norm)
            r = 0.95 * r + 0.05 * min(norm, 1.5 * r)
        assert float(factor) == pytest.approx(expected, rel=1e-15)
        assert float(usual) == pytest.approx(r, rel=1e-15)
    assert float(shorten(torch.tensor(math.inf), torch.tensor(0.0))[1]) == 0.0, "nothing is usual yet"


@pytest.mark.parametrize("method", ["dmsgd", "mi-dmsgd", "adamw"])
def test_steady_gradients_are_never_shortened(method):
    """Gradients that grow by less than half from the running norm: bit for bit as without it."""
    random = np.random.default_rng(0)
    steady = [random.standard_normal((5, 4)) for _ in range(60)]
    steady = [g / np.linalg.norm(g, axis=1, keepdims=True) * random.uniform(0.8, 1.2, (5, 1)) for g in steady]
    steady[0] /= np.linalg.norm(steady[0], axis=1, keepdims=True)
    paths = [
        simulate(method, "one-peer-exponential", lambda k, x: steady[k], np.zeros((5, 4)), 60, 0.1, clip=clip)
        for clip in (None, "spikes")
    ]
    assert np.array_equal(*paths)


def test_a_simulation_in_torch_is_the_one_in_numpy():
    grad, graph = oracle.LeastSquares(5, gradient_noise=3.0), topology.one_peer_exponential(5)
    want = simulate("mi-dmsgd", graph, grad, np.ones(3), 60, 0.05, clip="spikes")
    sim = Simulation("mi-dmsgd", graph, torch.ones(5, 3, dtype=torch.float64), clip="spikes")
    for k in range(60):
        sim.step(torch.from_numpy(grad(k, sim.x.numpy())), 0.05)
    assert abs(sim.x.numpy() - want[-1]).max() < 1e-12
    assert abs(want - simulate("mi-dmsgd", graph, grad, np.ones(3), 60, 0.05)).max() > 1e-3


def test_what_is_refused():
    p = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="Invalid clip: 'norm', must be 'spikes' or None"):
        GossipSGD(p, lr=0.1, clip="norm")
    with pytest.raises(ValueError, match="clip='spikes' and max_grad_norm= both shorten gradients"):
        GossipSGD(p, lr=0.1, clip="spikes", max_grad_norm=1.0)
    with pytest.raises(ValueError, match="clip='spikes' shortens the gradient before the rule, and .*Lars"):
        GossipSGD(p, lr=0.1, clip="spikes", layers=[Lars(0.01)])
