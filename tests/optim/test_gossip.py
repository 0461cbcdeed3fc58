"""Promises about `Gossip`, any torch optimizer made decentralized:

- one worker is the inner optimizer, bit for bit, in float32 and bfloat16;
- with real processes, n = 2 to 4, AdamW, SGD and Adafactor follow n float64 copies of the inner optimizer and a dense
  W @ (X + D), W @ (X + D/2) + D/2 or W @ X + D within 1e-5, Muon (whose orthogonalization is bfloat16) within 1e-2;
- Gossip(SGD) is `GossipSGD`'s dmsgd within 1e-6;
- without gradients disagreement contracts as W^k says; what torch expects of an optimizer holds.
"""

import copy
from functools import partial

import gossip_workers
import numpy as np
import pytest
import torch
import workers
from everyday import everyday
from layers_of_users import spaced

from fused_dlam import Gossip, GossipSGD, topology
from fused_dlam.comm.errors import ExchangeError
from fused_dlam.comm.place import Place

STEPS = 20
SCHEDULES = ("atc", "midpoint", "awc")
OURS = {
    s: {"topology": partial(spaced, every=2, exact=5), "schedule": s, "comm_dtype": torch.bfloat16} for s in SCHEDULES
}
MACHINES = [({"kind": kind, "schedule": s}, ddp) for s in SCHEDULES for kind in ("ours", "gossip")
            for ddp in (False, True)]  # fmt: skip


ONE_PEER = "one-peer-exponential"
DENSE = [(3, ONE_PEER), (4, "star"), (2, ONE_PEER), (4, ONE_PEER)]


def dense_cases(graph):
    return [
        (name, {"topology": graph, "schedule": schedule, "bucket_mb": 1e-4})
        for name in gossip_workers.OPTIMIZERS
        for schedule in SCHEDULES
    ]


@pytest.fixture(scope="module")
def runs():
    """By the number of workers and a name, what the ranks return."""
    w = gossip_workers
    calls = {n: {"dense": (w.train_each, dense_cases(graph), STEPS)} for n, graph in DENSE[:2]}
    calls[2] = {"refused": (w.refused,)}
    for schedule, options in OURS.items():
        calls[3]["ours", schedule] = (w.train_ours, options, STEPS)
        calls[3]["theirs", schedule] = (w.train, "sgd", options, STEPS)
        calls[4]["contract", schedule] = (w.certificate, {"topology": "ring", "schedule": schedule}, 6)
    for yes in (False, True):
        calls[3]["our scaler", yes] = (w.scaled, yes)
        calls[4]["scaled", yes] = (w.scaled_machines, yes)
    calls[4]["machines"] = (w.machines_each, MACHINES, 8)  # last, for DDP's reducers stay
    return {n: workers.run_together(n, of_n) for n, of_n in calls.items()}


def expected_path(name, graph, schedule):
    """n copies of the inner optimizer in float64, their parameters mixed by the dense W: [steps + 1, n, d]."""
    n = graph.n
    models = [workers.Tied(torch.float64) for _ in range(n)]
    inner = [gossip_workers.build(name, m) for m in models]
    scheduler = [torch.optim.lr_scheduler.StepLR(o, 7, 0.5) for o in inner]
    X = torch.stack([workers.trained(m) for m in models])
    path = [X]
    for step in range(STEPS):
        for rank, (model, optimizer, s) in enumerate(zip(models, inner, scheduler, strict=True)):
            optimizer.zero_grad()
            model.loss(workers.data(rank, torch.float64)).backward()
            optimizer.step()
            s.step()
        stepped = torch.stack([workers.trained(m) for m in models])
        W = torch.from_numpy(graph.weights(step))
        D, theta = stepped - X, {"atc": 1.0, "midpoint": 0.5, "awc": 0.0}[schedule]
        X = W @ (X + theta * D) + (1 - theta) * D
        with torch.no_grad():
            for model, x in zip(models, X, strict=True):
                parts = x.split([getattr(model, k).numel() for k in workers.TRAINED])
                for key, part in zip(workers.TRAINED, parts, strict=True):
                    getattr(model, key).copy_(part.reshape(getattr(model, key).shape))
        path.append(X)
    return torch.stack(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", gossip_workers.OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_worker_is_the_inner_optimizer(name, dtype, schedule):
    """Bit for bit after every step, and so is its state; schedulers count the same steps."""
    models = [workers.Tied(dtype), workers.Tied(dtype)]
    plain = gossip_workers.build(name, models[0])
    gossip = Gossip(gossip_workers.build(name, models[1]), schedule=schedule)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (plain, gossip)]
    x = workers.data(0, dtype)
    for _ in range(8):
        for model, optimizer, scheduler in zip(models, (plain, gossip), schedulers, strict=True):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
            scheduler.step()
        assert torch.equal(workers.trained(models[0]), workers.trained(models[1]))
    assert plain.param_groups[0]["lr"] == gossip.param_groups[0]["lr"]
    for p, q in zip(plain.state.values(), gossip.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(p[k]), torch.as_tensor(q[k])) for k in p)


@pytest.mark.parametrize("n, graph", everyday(DENSE, DENSE[:2]))
def test_follows_the_dense_oracle(n, graph, runs):
    """Directed one-peer and static graphs, both schedules, several buckets; unused parameters are only averaged."""
    cases = dense_cases(graph)
    if (n, graph) in DENSE[:2]:
        results = runs[n]["dense"]
    else:
        results = workers.run_together(n, {"dense": (gossip_workers.train_each, cases, STEPS)})["dense"]
    start = workers.Tied()
    for c, (name, options) in enumerate(cases):
        expected = expected_path(name, topology.FAMILY[options["topology"]](n), options["schedule"])
        for rank in range(n):
            path, unused, distance = results[rank][c]
            error = float((path.double() - expected[:, rank]).abs().max())
            assert error < (1e-2 if name == "muon" else 1e-5), (name, options, rank, error)
            assert unused is None or torch.equal(unused, start.unused)
            spread = (expected[-1] - expected[-1].mean(0)).square().sum(-1).mean().sqrt()
            assert name == "muon" or distance == pytest.approx(float(spread), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sgd_is_dmsgd(schedule, runs):
    """Within 1e-6 of GossipSGD's own method, with bfloat16 messages, local steps and exact averages."""
    for x, (path, _, _) in zip(runs[3]["ours", schedule], runs[3]["theirs", schedule], strict=True):
        torch.testing.assert_close(path[-1], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_disagreement_contracts_as_the_graph_says(schedule, runs):
    """x_k = W^k x_0 within 1e-6, so the distance shrinks at least by rho each step."""
    graph, steps = topology.ring(4), 6
    results = runs[4]["contract", schedule]
    X = torch.stack([before for before, *_ in results]).double()
    W = torch.from_numpy(np.linalg.matrix_power(graph.weights(0), steps))
    for rank, (_, after, first, last) in enumerate(results):
        torch.testing.assert_close(after.double(), (W @ X)[rank], rtol=1e-6, atol=1e-6)
        assert 0 < last <= first * graph.rho**steps * (1 + 1e-5)


@pytest.mark.parametrize("ours", [False, True])
def test_a_grad_scaler_skips_no_exchange(ours, runs):
    """One rank's infinite gradient is nobody's local step; all exchange, and stay finite."""
    for rank, (finite, skipped, scale, steps) in enumerate(runs[3]["our scaler", ours]):
        assert finite == [True] * 3 and skipped == [False, True, False] and steps == 3
        assert scale == (4.0 if rank == 1 or ours else 8.0)


def test_machines_average_their_gradients(runs):
    """2 machines x 2 ranks: Gossip(SGD) is GossipSGD's dmsgd within 1e-6, by us and by DDP inside the machine.

    Ranks of a machine are bit-equal. Where DDP averages gradients we do not: a quarter fewer bytes at least.
    """
    results = runs[4]["machines"]
    for c, (options, ddp) in enumerate(MACHINES):
        first = 4 * SCHEDULES.index(options["schedule"])
        for rank in range(4):
            x, averages, _ = results[rank][c]
            assert averages is not ddp
            assert torch.equal(x, results[rank // 2 * 2][c][0])
            torch.testing.assert_close(x, results[rank][first][0], rtol=1e-6, atol=1e-6)


def test_workers_that_only_swap_are_refused(runs):
    """[[0, 1], [1, 0]] is connected and averages nothing; different inner optimizers are told apart, on every rank."""
    for swap, different in runs[2]["refused"]:
        assert "never brings its 2 workers together" in swap
        assert "do not agree on the optimizer: rank 0 has SGD, rank 1 has AdamW" in different


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def test_what_torch_expects_of_an_optimizer():
    """Groups and state are the inner optimizer's own, also after loading; hooks are called once; closures return."""
    model = network()
    inner = torch.optim.AdamW(model[0].parameters(), lr=0.1)
    optimizer = Gossip(inner)
    assert isinstance(optimizer, torch.optim.Optimizer) and "AdamW" in repr(optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.2})
    assert [g["lr"] for g in inner.param_groups] == [0.1, 0.2] and optimizer.param_groups is inner.param_groups
    calls = []
    optimizer.register_step_pre_hook(lambda o, a, k: calls.append(("pre", o is optimizer)))
    optimizer.register_step_post_hook(lambda o, a, k: calls.append(("post", o is optimizer)))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0 and calls == [("pre", True), ("post", True)]
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step(closure)
    optimizer.load_state_dict(saved)
    assert optimizer.state is inner.state and optimizer.param_groups is inner.param_groups
    assert optimizer.param_groups[0]["gossip_step"] == 1
    assert all(s["step"] == 1 for s in optimizer.state.values())
    with pytest.raises(RuntimeError, match="add_param_group of Gossip"):
        inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        optimizer.step()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)


def test_a_checkpoint_of_the_inner_optimizer_loads():
    model, other = network(), network()
    theirs = torch.optim.AdamW(other.parameters(), lr=0.3)
    other(torch.ones(2, 5)).sum().backward()
    theirs.step()
    optimizer = Gossip(torch.optim.AdamW(model.parameters(), lr=0.1))
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.param_groups[0]["gossip_step"] == 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], theirs.state[q]["exp_avg"])


def test_a_newcomer_must_have_the_same_inner_optimizer():
    """What is compared then; tests/faults has newcomers."""
    facts = [Gossip(inner(network().parameters(), lr=0.1))._facts() for inner in (torch.optim.SGD, torch.optim.AdamW)]
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == ["inner optimizer"]


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    model = network()
    optimizer = Gossip(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="meta device"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, device="meta"))]})
    optimizer.step()
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [RuntimeError, ExchangeError])
@pytest.mark.parametrize("where", ["agree", "start_equal"])
@pytest.mark.parametrize("build", [lambda p: Gossip(torch.optim.SGD(p, lr=0.1)), lambda p: GossipSGD(p, lr=0.1)])
def test_a_group_that_could_not_be_agreed_on_is_not_there(build, where, kind, monkeypatch):
    """Before and after the engine has it. A second attempt works."""
    model, late = network(), torch.nn.Parameter(torch.ones(2))
    optimizer = build(model.parameters())
    layout = optimizer._engine.layout

    def fails(*_):
        raise kind("a peer is gone")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer._engine if where == "start_equal" else Place, where, fails)
        with pytest.raises(kind, match="a peer is gone"):
            optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == 1 and optimizer._engine.layout == layout
    for groups in (1, 2):
        for p in (*model.parameters(), late):
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert len(optimizer.param_groups) == groups and torch.equal(late, torch.ones(2)) is (groups == 1)
        if groups == 1:
            optimizer.add_param_group({"params": [late]})


def test_scales_that_differ_inside_a_machine(runs):
    """Four ranks, four loss scales: a machine's ranks stay bit-equal, and all is as without a scaler, bit for bit."""
    (a, b, c, d), plain = runs[4]["scaled", True], runs[4]["scaled", False]
    assert torch.equal(a, b) and torch.equal(c, d) and torch.equal(a, plain[0]) and torch.equal(c, plain[2])
    assert not torch.equal(a, c)


def test_a_replaced_parameter_is_told():
    model = network()
    optimizer = Gossip(torch.optim.SGD(model.parameters(), lr=0.1))
    model[0].weight.data = torch.zeros(7, 6)
    with pytest.raises(RuntimeError, match="moved, converted or replaced"):
        optimizer.step()


def test_bad_input_is_refused():
    model = network()
    with pytest.raises(TypeError, match="wraps a torch.optim.Optimizer, not generator"):
        Gossip(model.parameters())
    with pytest.raises(TypeError, match="GossipSGD gossips already"):
        Gossip(GossipSGD(model.parameters()))
    inner = torch.optim.SGD(network().parameters(), lr=0.1)
    for options, message in [
        ({"schedule": "later"}, "Invalid schedule"),
        ({"bucket_mb": 0}, "Invalid bucket_mb"),
        ({"comm_dtype": torch.int8}, "Invalid comm_dtype"),
        ({"topology": "rign"}, "rign"),
        ({"topology": topology.ring(3)}, "3 workers"),
    ]:
        with pytest.raises(ValueError, match=message):
            Gossip(inner, **options)
