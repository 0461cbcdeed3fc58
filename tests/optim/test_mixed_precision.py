"""Promises about autocast and loss scalers:

- one worker follows `torch.optim.SGD` under the same scaler and autocast, clipped or not, within 1e-6;
- three gloo workers, of which one overflows in one step: nobody hangs, nobody takes that local step, and float64 is
  followed within 1e-5, for gossip in both schedules and for averaged gradients; momentum is untouched by it;
- with `fused_dlam.GradScaler` scales and growth trackers are equal on all ranks in every step;
- float16 gradients that unscaled are zero move x as float64 does, within 1e-3, whoever averages them and whatever the
  ranks' scales, and replicas stay bit-equal; means of 30,000 do not overflow;
- a scaler costs one all-reduce of 4 bytes per step (8 where gradients are averaged), and nothing where there is none.
"""

import amp_workers as workers
import numpy as np
import oracle
import pytest
import torch
from torch import nn
from workers import run_together

import fused_dlam
from fused_dlam import topology

N = 3
OPTIONS = [{}, {"schedule": "awc"}, {"method": "da-dmsgd", "overlap": False}, {"method": "pmsgd"}]
CASES = [
    *((o, kind, "overflow") for o in OPTIONS for kind in ("ours", "torch")),
    ({}, "ours", "plain"),
    ({}, "ours", "unscale"),
    ({}, "torch", "unscale"),
    ({}, "off", "plain"),
    ({"method": "pmsgd"}, "ours", "plain"),
    ({"method": "pmsgd"}, "off", "plain"),
    ({}, "ours", "silent"),
    ({"overlap": True}, "ours", "plain"),
]


@pytest.fixture(scope="module")
def results():
    ranks = run_together(N, {"scaled": (workers.scaled, CASES)}, deadline=120)["scaled"]
    return [(case, [rank[i] for rank in ranks]) for i, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def pairs():
    """By whether `Gossip` or `GossipSGD` steps."""
    return run_together(2, {gossip: (workers.overflow_after_going_back, gossip) for gossip in (False, True)})


def expected(options, skips):
    graph, problem = topology.one_peer_exponential(N), workers.problem(N)
    method = options.get("method", "mi-dmsgd")
    hyper = {"correction_rate": oracle.auto_rate(method, graph, 0.9)} if method in ("pc-dmsgd", "mi-dmsgd") else {}
    return oracle.run(
        method, graph.weights, problem, np.ones((N, workers.DIMENSION)), lambda k: workers.LR, 0.9, 0.0,
        steps=workers.STEPS, schedule=options.get("schedule", "auto"), skips=skips, **hyper,
    )  # fmt: skip


def find(results, *case):
    return next(ranks for c, ranks in results if c == case)


@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_overflow_is_nobodys_step(results, options, kind):
    """1e-5 of float64 at every step on every rank, the skipped one included; no message leaves early."""
    ranks = find(results, options, kind, "overflow")
    path = expected(options, {workers.OVERFLOW})
    for rank, got in enumerate(ranks):
        assert got["error"] is None and got["early"] == 0
        assert abs(got["path"].double().numpy() - path[:, rank]).max() < 1e-5 * abs(path).max(), (options, rank)
    assert abs(path - expected(options, ())).max() > 1e-2 * abs(path).max()  # the oracle tells the two apart


def test_scales_stay_in_step(results):
    """Bit-equal on all ranks in every step: halved after the overflow, doubled after three good steps."""
    for options in OPTIONS:
        first, *others = (got["scales"] for got in find(results, options, "ours", "overflow"))
        assert all(scales == first for scales in others)
        assert [scale / 2**16 for scale, _ in first] == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1]


def test_torchs_scaler_follows_its_own_rank_and_the_others_are_told(results):
    ranks = find(results, {}, "torch", "overflow")
    assert ranks[1]["scales"][2][0] == 2**15 and all(r["scales"][2][0] == 2**17 for r in (ranks[0], ranks[2]))
    for rank, got in enumerate(ranks):
        assert any("fused_dlam.GradScaler keeps" in line for line in got["log"]) == (rank != 1)


def test_unscaling_by_hand_changes_nothing(results):
    """Bit-equal (scales are powers of two): unscale_ before step, or left to step, or no scaler at all."""
    wanted = [got["path"] for got in find(results, {}, "off", "plain")]
    for case in (({}, "ours", "plain"), ({}, "ours", "unscale"), ({}, "torch", "unscale")):
        assert all(torch.equal(got["path"], path) for got, path in zip(find(results, *case), wanted, strict=True)), case


def test_a_rank_without_any_gradient_takes_part(results):
    ranks = find(results, {}, "ours", "silent")
    assert all(got["error"] is None and len(got["path"]) == workers.STEPS + 1 for got in ranks)
    assert all(got["scales"] == ranks[0]["scales"] for got in ranks)


def test_what_a_scaler_costs(results):
    """By all-reduce 4 bytes per step, 8 where gradients are averaged, and not a message; without a scaler nothing."""
    free = find(results, {}, "off", "plain")
    for case in (({}, "ours", "plain"), ({}, "ours", "unscale"), ({}, "torch", "unscale"), ({}, "ours", "overflow")):
        for got, without in zip(find(results, *case), free, strict=True):
            assert got["messages"] == without["messages"]
            assert got["bytes"] - without["bytes"] == round(workers.STEPS * 4 * 2 * (N - 1) / N)
    averaged = find(results, {"method": "pmsgd"}, "off", "plain")
    for got, without in zip(find(results, {"method": "pmsgd"}, "ours", "plain"), averaged, strict=True):
        assert abs(got["bytes"] - without["bytes"] - workers.STEPS * 8 * 2 * (N - 1) / N) < 1  # both are rounded


FLOAT16 = [
    (options, scales, kind)
    for options in ({"method": "pmsgd"}, {"method": "dmsgd"}, {"method": "dmsgd", "hierarchical": True})
    for kind in (fused_dlam.GradScaler, torch.amp.GradScaler)
    for scales in ([65536.0] * 4, [65536.0, 32768.0, 65536.0, 131072.0], [50000.0, 65536.0, 30000.0, 65536.0])
]
LARGE = [{"method": "pmsgd"}, {"method": "psgd"}, {"method": "dmsgd", "hierarchical": True}, {}]


@pytest.fixture(scope="module")
def fours():
    calls = {"small": (workers.float16, FLOAT16), "large": (workers.float16_large, LARGE)}
    return run_together(4, calls, deadline=120)


def test_small_float16_gradients_are_averaged_as_they_are_scaled(fours):
    """-4e-4 after twenty steps."""
    for i, (options, scales, kind) in enumerate(FLOAT16):
        ranks = [rank[i] for rank in fours["small"]]
        for x in ranks:
            assert abs(x / -4e-4 - 1).max() < 1e-3, (options, scales, kind)
        if options["method"] == "pmsgd":
            assert all(torch.equal(x, ranks[0]) for x in ranks)
        if options.get("hierarchical"):
            assert torch.equal(ranks[0], ranks[1]) and torch.equal(ranks[2], ranks[3])


def test_means_of_large_float16_gradients_do_not_overflow(fours):
    for rank in fours["large"]:
        assert all(x.tolist() == [-3.0, -3.0] for x in rank)


def test_messages_that_left_in_the_backward_pass_are_sent_again_where_a_scaler_comes(results):
    """On CPUs: what counts is unscaled, bit for bit what is sent in step()."""
    early, late = find(results, {"overlap": True}, "ours", "plain"), find(results, {}, "ours", "plain")
    for a, b in zip(early, late, strict=True):
        assert a["error"] is None and a["early"] > 0 and torch.equal(a["path"], b["path"])
    assert all(any("GradScaler" in line for line in got["log"]) for got in find(results, {}, "ours", "plain"))


def test_machines_agree_inside_and_across():
    """Two machines of two ranks: an overflow on one rank is known to all four, whose scales stay equal."""
    case = ({"hierarchical": True, "topology": "ring", "method": "dmsgd"}, "ours", "overflow")
    results = run_together(4, {"machines": (workers.machines, [case])}, deadline=120)
    ranks = [rank[0] for rank in results["machines"]]
    assert all(got["scales"] == ranks[0]["scales"] and got["scales"][2][0] == 2**15 for got in ranks)
    for a, b in ((0, 1), (2, 3)):
        assert torch.equal(ranks[a]["path"], ranks[b]["path"]) and ranks[a]["path"].isfinite().all()


@pytest.mark.parametrize("gossip", [False, True])
def test_an_overflow_right_after_going_back(gossip, pairs):
    """One rank overflows in the very step that was agreed on before the checkpoint was loaded: it is nobody's step."""
    for momentum, back in pairs[gossip]:
        assert torch.equal(momentum, back)


# -- one worker ------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(params=["host", "device"])
def skips(request, monkeypatch):
    """Where a single worker learns that a step is skipped: on the host, or, as on a GPU, in the passes alone."""
    if request.param == "device":
        monkeypatch.setattr(fused_dlam.optim.mixed_precision, "on_host", lambda found: False)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kind", [fused_dlam.GradScaler, torch.amp.GradScaler])
@pytest.mark.usefixtures("skips")
def test_one_worker_follows_torch_under_a_scaler(kind, clip):
    """1e-6 with an overflow in step 3: max_grad_norm clips what is unscaled, as unscale_ and clip_grad_norm_ do."""
    ours, theirs = network(), network()
    a = fused_dlam.GossipSGD(ours.parameters(), lr=0.1, max_grad_norm=clip)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    scalers = kind("cpu", init_scale=1000.0), torch.amp.GradScaler("cpu", init_scale=1000.0)
    for step in range(8):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer, scaler in ((ours, a, scalers[0]), (theirs, b, scalers[1])):
            optimizer.zero_grad()
            loss = model(x).square().mean() * (1e38 if step == 3 else 1.0)
            scaler.scale(loss).backward()
            if optimizer is b and clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("skips")
def test_a_skipped_step_is_not_counted():
    """AdamW's bias corrections, under an overflow in the first and in a later step: torch.optim.AdamW's within 1e-5."""
    ours, theirs = network(), network()
    a = fused_dlam.GossipSGD(ours.parameters(), lr=1e-2, method="adamw", weight_decay=0.1)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999))
    scalers = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    for step in range(6):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer, scaler in ((ours, a, scalers[0]), (theirs, b, scalers[1])):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean() * (1e38 if step in (0, 3) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_worker_follows_torch_under_autocast(dtype):
    ours, theirs = network(), network()
    a = fused_dlam.GossipSGD(ours.parameters(), lr=0.1)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(8):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            if optimizer is b:  # a bit of 16-bit activations may flip: errors of one step must not add up
                for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
                    with torch.no_grad():
                        q.copy_(p)
                        b.state[q]["momentum_buffer"].copy_(a.state[p]["momentum_buffer"])
