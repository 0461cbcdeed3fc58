"""Promises about `compress=`, with real processes over gloo:

- the distributed optimizer is the simulator with the same codec, to float64's rounding, in every step, for every codec,
  schedule and kind of graph, for two messages and for `Gossip` (tests/theory/test_compression.py has the simulator
  against the equations);
- with messages in the backward pass it is what it is without, bit for bit, in several buckets, where parameters get no
  gradient in some steps;
- the workers' mean stays that of the gradients' sum in float32, and int8 sends at least 3.9 times fewer bytes;
- a checkpoint goes on bit for bit, and what is remembered is in it; from the mean nothing is remembered;
- a NaN stays where it arose, and what is remembered stays finite;
- a machine's ranks remember the same, and send parts; a late exchange that is left out changes nothing at either end;
- ranks with unlike codecs are told, and what cannot be is refused before anything is sent.
"""

from functools import partial

import compression_workers
import numpy as np
import pytest
import torch
from compression_workers import LR, SEVERAL, D, Quadratic, averaging
from everyday import everyday
from workers import run_together

import fused_dlam
from fused_dlam import Simulation, topology
from fused_dlam.engine.compressed import is_memory, places
from fused_dlam.layers import Int8, TopK
from fused_dlam.optim.options import Options
from fused_dlam.optim.succession import Succession

ONE = ((D,),)
KINDS = {
    "midpoint": {},
    "awc": {"schedule": "awc"},
    "directed": {"topology": "exponential"},
    "two messages": {"method": "da-dmsgd"},
    "with averages": {"topology": lambda n: topology.ring(n).with_global_average(4), "method": "dmsgd"},
}
CODECS = ("int8", "int4", "topk")
EVERY_DAY = [
    ("int8", "midpoint"),
    ("int8", "awc"),
    ("int4", "midpoint"),
    ("topk", "directed"),
    ("int4", "with averages"),
]
PAIRS = [(c, k) for c in CODECS for k in KINDS]


def calls(pairs, compressed):
    exact = [("sgd", {"compress": c, **_named(k)}, torch.float64, ONE) for c, k in pairs]
    exact += [("gossip", {"compress": c}, torch.float64, ONE) for c in compressed]
    overlapped = [
        ("sgd", {"compress": c, "overlap": overlap, "bucket_mb": 4e-3, **options}, torch.float32, SEVERAL)
        for c in compressed
        for options in ({}, {"method": "da-dmsgd"})[: 1 if c == "int4" else 2]
        for overlap in ("auto", False)
    ]
    low = [
        ("sgd", {"compress": c, "schedule": s}, torch.bfloat16, SEVERAL) for c in compressed for s in ("auto", "awc")
    ]
    return exact, overlapped, low


def _named(kind):
    return {k: v if k != "topology" or isinstance(v, str) else averaging for k, v in KINDS[kind].items()}


@pytest.fixture(scope="module", params=[pytest.param("slow", marks=pytest.mark.slow), "quick"])
def told(request):
    quick = request.param == "quick"
    pairs, compressed = (EVERY_DAY, ("int8", "int4")) if quick else (PAIRS, CODECS)
    exact, overlapped, low = calls(pairs, compressed)
    resumed = [("sgd", {"compress": c}, torch.float32) for c in compressed]
    resumed += [
        ("gossip", {"compress": "int8"}, torch.bfloat16),
        ("sgd", {"compress": "int8", "schedule": "awc"}, torch.float32),
    ]
    jobs = {
        "exact": (compression_workers.trained, exact),
        "overlapped": (compression_workers.trained, overlapped),
        "low": (compression_workers.trained, low),
        "full": (
            compression_workers.trained,
            [("sgd", {"compress": c}, torch.float32, ((100_000,),)) for c in (None, "int8")],
        ),
        "resumed": (compression_workers.resumed, resumed),
        "disagreeing": (compression_workers.disagreeing,),
        "machines": (compression_workers.machines, [{"compress": c} for c in compressed]),
    }
    for c in compressed[: 1 if quick else None]:
        jobs[f"means {c}"] = (compression_workers.means, c, 500)
    for c in compressed[1:] if quick else compressed:
        jobs[f"else {c}"] = (compression_workers.everything_else, c)
    for c in compressed:
        jobs[f"nan {c}"] = (compression_workers.not_finite, c)
    return pairs, compressed, resumed, run_together(4, jobs)


def simulated(compress, kind, gossip=False, n=4):
    options = dict(_named(kind))
    graph = topology.get(options.pop("topology", "one-peer-exponential"), n)
    problems = [Quadratic(rank, torch.float64) for rank in range(n)]
    c, t = (torch.stack([getattr(p, name)[0] for p in problems]) for name in ("c", "t"))
    x = problems[0].x.repeat(n, 1)
    method = "dmsgd" if gossip else options.pop("method", "mi-dmsgd")
    workers = Simulation(method, graph, x, 0.9, compress=compress, **options)
    return torch.stack([workers.step(c * (workers.x - t), LR).clone() for _ in range(25)])


def test_it_is_the_simulator(told):
    pairs, compressed, _, found = told
    cases = [(c, k, False) for c, k in pairs] + [(c, "midpoint", True) for c in compressed]
    for number, (compress, kind, gossip) in enumerate(cases):
        path = torch.stack([rank[number][0] for rank in found["exact"]], 1)
        assert (path - simulated(compress, kind, gossip)).abs().max() < 1e-12, (compress, kind, gossip)


def test_the_overlap_changes_no_bit(told):
    _, _, _, found = told
    for rank in found["overlapped"]:
        for (early, sent, kept), (late, sent_late, kept_late) in zip(rank[::2], rank[1::2], strict=True):
            assert len(kept) >= 3 and torch.equal(early, late) and sent == sent_late
            for a, b in zip(kept, kept_late, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)


def test_low_precision_parameters_train(told):
    _, _, _, found = told
    for path, _, _ in (case for rank in found["low"] for case in rank):
        assert path.isfinite().all() and not torch.equal(path[0], path[-1])


def test_the_mean_is_kept(told):
    _, compressed, _, found = told
    for compress in [c for c in compressed if f"means {c}" in found]:
        x, gradients, largest = zip(*found[f"means {compress}"], strict=True)
        g = torch.stack(gradients).mean(0)
        mean, m = torch.linspace(-1, 1, D).double(), torch.zeros(D, dtype=torch.float64)
        for k in range(500):
            m = 0.9 * m + g[k % 20]
            mean = mean - 0.01 * m
        off = torch.stack(x).mean(0) - mean
        assert off.square().mean().sqrt() < 1e-6 * max(largest), "full messages: 0.3e-6"
        assert off.mean().abs() < 1e-6, "and no drift"


def test_bytes(told):
    _, _, _, found = told
    for full, int8 in found["full"]:
        assert full[1] / int8[1] >= 3.9
        assert int8[1] == 25 * (Int8().bytes(100_352) + 32)  # 98 * 1,024 elements with the padding, and the header


def test_checkpoints(told):
    _, _, resumed, found = told
    for rank in found["resumed"]:
        for (kind, options, _), (whole, back, kept, x, names, end) in zip(resumed, rank, strict=True):
            assert torch.equal(whole, back), (kind, options)
            assert not any("reference" in name or "error" in name for name in names)
            if options["compress"] == "int8":
                assert not any(t.any() for t in kept)
            else:  # the mean, to a rounding of it
                width = len(kept) // len(x)
                for i, t in enumerate(kept):
                    assert torch.allclose(t, x[i // width], rtol=1e-6, atol=1e-6)
            assert end.isfinite().all()
    for number in range(len(resumed)):  # what is remembered is alike where it must be: the mean keeps its place
        ends = [rank[number][5] for rank in found["resumed"]]
        assert torch.stack(ends).isfinite().all()


def test_a_nan_stays_where_it_arose(told):
    _, compressed, _, found = told
    for compress in compressed:
        for rank, (x, finite) in enumerate(found[f"nan {compress}"]):
            assert all(finite)
            bad = x.isfinite().logical_not().nonzero().flatten().tolist()
            assert bad == ([5] if rank == 0 else [])


def test_machines(told):
    _, compressed, _, found = told
    ranks = found["machines"]
    for number, compress in enumerate(compressed):
        for a, b in ((0, 1), (2, 3)):
            (x, kept, sent), (other, also, sent_too) = ranks[a][number], ranks[b][number]
            assert torch.equal(x, other) and sent == sent_too
            assert all(torch.equal(t, u) for t, u in zip(kept, also, strict=True)) and any(t.any() for t in kept)
        assert (ranks[0][number][0] - ranks[2][number][0]).abs().max() < (3.0 if compress == "topk" else 1.0)
        whole = sum(p.numel() for p in Quadratic(0, torch.float32, SEVERAL).params)
        if compress == "int8":  # a half of every message, and gradients inside the machine by a ring of two
            assert ranks[0][number][2] < 9 * (whole / 2 * 1.1 + 4096)


def test_everything_else(told):
    """Nothing grows, and both ends of every edge remember the same: else the workers' mean would leave its place."""
    _, compressed, _, found = told
    for compress in [c for c in compressed if f"else {c}" in found]:
        ranks = found[f"else {compress}"]
        for i, rank in enumerate(ranks):
            for name, (finite, distance, kept) in rank.items():
                assert finite and distance < (60.0 if compress == "topk" else 20.0), (compress, name)
                for bucket, own in enumerate(kept if compress != "int8" else ()):
                    for matrix in (0, 1):
                        source = i ^ 2**matrix if name == "skip_late" else (i - 2**matrix) % 4
                        theirs = ranks[source][name][2][bucket]
                        heard, said = own[f"reference_0_{matrix}_1"], theirs[f"reference_0_{matrix}_0"]
                        assert torch.equal(heard, said), (compress, name)


def test_unlike_codecs_are_told(told):
    _, _, _, found = told
    for first, second in found["disagreeing"]:
        assert "compress" in first and "Int8" in first
        assert "compress" in second and "0.25" in second and "0.125" in second


@pytest.mark.parametrize("compress", everyday(CODECS, ("int8",)))
def test_what_is_left_out_changes_nothing(compress):
    """Both ends list it; the mean is that of the gradients there were, and each end remembers what the other has."""
    ranks = run_together(2, {"it": (compression_workers.left_out, compress)})["it"]
    (x, skipped, kept, c, t), (y, skipped_too, kept_too, c2, t2) = ranks
    assert [step for step, _ in skipped] == [step for step, _ in skipped_too] and 2 in [step for step, _ in skipped]
    if compress != "int8":
        assert torch.equal(kept["reference_0_0_0"], kept_too["reference_0_0_1"])
        assert torch.equal(kept["reference_0_0_1"], kept_too["reference_0_0_0"])
    assert (x - y).abs().max() < 3.0


def test_refusals():
    x = torch.nn.Parameter(torch.zeros(3))
    for options, match in (
        ({"compress": "int8", "comm_dtype": torch.bfloat16}, "choose"),
        ({"compress": "int8", "method": "pmsgd"}, "averages gradients"),
        ({"compress": "zip"}, "'int8'"),
    ):
        with pytest.raises(ValueError, match=match):
            fused_dlam.GossipSGD([x], lr=0.1, **options)
    with pytest.raises(TypeError, match="compress"):
        fused_dlam.Gossip(torch.optim.SGD([x], lr=0.1), compress=8)
    with pytest.raises(ValueError, match="never repeats"):
        places(TopK(), topology.random_match(4, seed=0))
    with pytest.raises(ValueError, match="matrices"):
        places(TopK(), topology.Topology([topology.ring(5).weights() for _ in range(40)]))
    assert places(TopK(), topology.get("one-peer-exponential", 8).every(2)) == [None, 0, None, 1, None, 2]
    alone = fused_dlam.GossipSGD([x], lr=0.1, compress="int8")  # one worker sends nothing
    x.grad = torch.ones(3)
    alone.step()
    assert np.allclose(x.detach(), -0.1) and "compression_error" not in alone.state[x]


def test_names_of_what_is_remembered():
    """A rule's own buffers may begin alike, and are saved and loaded as all are."""
    for name in ("compression_error", "gossip_compression_error_1", "reference_0_1_2", "gossip_reference_1_0_0"):
        assert is_memory(name)
    for name in ("reference_point", "compression_errors", "reference_0", "my_reference_0_1_2"):
        assert not is_memory(name)


def test_graphs_after_a_loss():
    """With references a graph of too many matrices is no successor; a single worker needs none."""
    assert places(fused_dlam.layers.Int4(), topology.random_match(1)) == [0]
    chosen = Options("auto", False, None, (), None, None, None, compress="int4")
    suits = partial(chosen.check_compression, fused_dlam.rules.get("mi-dmsgd"))
    after = Succession("one-peer-ring", None, suits=suits)
    assert (after(34).name, after(33).name) == ("one-peer-ring", "one-peer-exponential")


@pytest.mark.parametrize("compress", ["int4", "topk"])
def test_thawed_and_cleared(compress):
    """A layer that thaws is not pulled by more than what workers differ by; a state that is cleared on one rank keeps
    what the neighbors remember too."""
    found = run_together(3, {"it": (compression_workers.thawed, compress)})["it"]
    for pulled, cleared, apart in found:
        assert pulled < 0.02 and cleared < 0.02 and apart < 0.02, found
