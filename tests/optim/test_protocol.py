"""The protocol of torch.optim.Optimizer, row by row: each works, or is refused by an error that says what to do.

What each row promises is said where it is tested; the outcomes make up protocol_table.md, which must not be stale. One
worker unless said otherwise; three gloo workers run protocol_workers.py.
"""

import copy
import gc
import io
import pickle
import re
import tempfile
import warnings
import weakref

import protocol_workers as workers
import pytest
import torch
from protocol_table import table  # noqa: F401 -- a fixture
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dlam import DecentLaM, GossipSGD, SlowMo, rules, topology
from fused_dlam.engine import guards
from fused_dlam.engine.buckets import build
from fused_dlam.optim import certificate
from fused_dlam.optim import mixed_precision as amp
from fused_dlam.rules import scalars
from fused_dlam.rules.scalars import Scalars
from fused_dlam.theory.stability import lyapunov
from fused_dlam.tools.launch import run_workers

N = 3


@pytest.fixture(scope="module")
def ranks():
    with tempfile.TemporaryDirectory() as folder:
        return run_workers(workers.everything, N, folder, deadline=120)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def backward(model, seed=0):
    x = torch.randn(13, 5, generator=torch.Generator().manual_seed(seed))
    loss = model(x.to(next(model.parameters()).dtype)).square().mean()
    loss.backward()
    return loss


def follow(change, steps=8, ours=None, tolerance=1e-6, **options):
    """`change(optimizer, step)` before every step: equal to torch.optim.SGD with momentum within 1e-6."""
    models = network(), network()
    a = GossipSGD(models[0].parameters(), lr=0.1, **(ours or {}), **options)
    b = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, **options)
    changes = change(a), change(b)
    for step in range(steps):
        for model, optimizer, then in ((models[0], a, changes[0]), (models[1], b, changes[1])):
            optimizer.zero_grad()
            backward(model, step)
            then(step, optimizer.step)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    return a


def error_of(call, *args, kind=Exception, **kwargs):
    with pytest.raises(kind) as raised:
        call(*args, **kwargs)
    return raised.value


def test_construction(table):  # noqa: F811
    model = network()
    for params in (model.parameters(), [{"params": model.parameters(), "lr": 1.0}], model.named_parameters()):
        optimizer = GossipSGD(params, lr=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    table.works(1, "equal to `torch.optim.SGD` step for step: test_optimizer.py")
    table.refused(1, error_of(GossipSGD, model.parameters(), lr=-1.0, kind=ValueError))
    table.refused(1, error_of(GossipSGD, model.parameters(), lr=torch.ones(2), kind=ValueError))


def test_late_groups(table, ranks):  # noqa: F811
    """Bit-equal to the run whose messages leave in step(); not once messages have left."""
    for rank in ranks:
        early, late, awc, awc_late, error = rank["late_group"]
        assert torch.equal(early, late) and torch.equal(awc, awc_late) and not torch.equal(early, awc)
    table.works(2, "with several workers on all ranks before the same step, whose parameters are then rank 0's")
    table.refused(2, error)
    optimizer = GossipSGD(network().parameters())
    for bad in (torch.ones(2, dtype=torch.int64), torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        table.refused(2, error_of(optimizer.add_param_group, {"params": [bad]}, kind=TypeError))
        assert len(optimizer.param_groups) == 1


def test_hyper_parameters_live_in_groups(table):  # noqa: F811
    def change(optimizer):
        def then(step, go):
            group = optimizer.param_groups[0]
            group.update(lr=0.1 / (step + 1), momentum=0.5 + step / 20, weight_decay=step / 100, maximize=step == 5)
            go()

        return then

    follow(change)
    table.works(3, "all four of `torch.optim.SGD`'s may change at every step, before the backward pass")


def test_closures(table):  # noqa: F811
    calls = []
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1)

    def closure():
        calls.append(torch.is_grad_enabled())
        return backward(model)

    with torch.no_grad():
        assert optimizer.step(closure).requires_grad and calls == [True]
    table.works(4, "called once, with gradients enabled, before the exchange")


def test_step_hooks(table):  # noqa: F811
    calls = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    optimizer = DecentLaM(network().parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    handle.remove()
    assert calls == ["pre", "post", "global"]
    table.works(5, "`DecentLaM.step` fires each hook once")
    table.works(6, "all of torch's own tests of them: test_torch_optim.py")


def test_state_dict_hooks(table):  # noqa: F811
    """A hook's entry in state outlives saving and loading; a hook's other checkpoint is the one that is loaded."""
    optimizer = GossipSGD(network().parameters(), lr=0.1)
    optimizer.state["mine"] = "text"
    saved = optimizer.state_dict()
    assert saved["state"]["mine"] == "text"

    def replace(_, state_dict):
        other = copy.deepcopy(state_dict)
        other["state"][0]["momentum_buffer"].fill_(3.0)
        return other

    seen = []
    optimizer.register_load_state_dict_pre_hook(replace)
    first = optimizer.param_groups[0]["params"][0]
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[first]["momentum_buffer"].clone()))
    optimizer.load_state_dict(saved)
    assert (seen[0] == 3.0).all() and optimizer.state["mine"] == "text"
    table.works(7, "load hooks may replace the checkpoint, and see it in place after it was loaded")


def test_loading_keeps_float32_state(table):  # noqa: F811
    """Bit-equal: 1 + 2^-10 is no bfloat16."""
    optimizer = GossipSGD(network(torch.bfloat16).parameters(), lr=0.1)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        for value in state.values():
            value.fill_(1.0009765625)
    optimizer.load_state_dict(saved)
    for p in optimizer.param_groups[0]["params"]:
        for value in optimizer.state[p].values():
            assert value.dtype == torch.float32 and (value == 1.0009765625).all()
    table.works(8, "momentum, correction and float32 master values, bit for bit")


def test_loaded_state_is_a_view(table):  # noqa: F811
    optimizer = GossipSGD(network().parameters(), lr=0.1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (bucket,) = optimizer._engine.buckets
    flat = {t.untyped_storage().data_ptr() for t in bucket.state}
    held = (v for state in optimizer.state.values() for v in state.values())
    assert {v.untyped_storage().data_ptr() for v in held} == flat
    table.works(9, "values are copied into the buffers, and `state` holds views of them again")


def test_older_checkpoints(table):  # noqa: F811
    models = network(), network()
    older = torch.optim.SGD(models[0].parameters(), lr=0.3, momentum=0.9)
    backward(models[0])
    older.step()
    optimizer = GossipSGD(models[1].parameters(), lr=0.1)
    optimizer.load_state_dict(older.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.param_groups[0]["correction_rate"] == "auto"
    optimizer.step()
    table.works(10, "what one lacks keeps its value; those of `torch.optim.SGD` load too")
    other = GossipSGD(network().parameters(), method="dmsgd").state_dict()
    table.refused(10, error_of(optimizer.load_state_dict, other, kind=ValueError))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("options", [{}, {"method": "decentlam", "max_grad_norm": 0.1}, {"schedule": "awc"}], ids=str)
def test_copies_go_on(options, how):
    """Bit-equal to the original, of which they share nothing; copied twice; bfloat16 with its float32 values."""
    for dtype in (torch.float32, torch.bfloat16):
        model = network(dtype)
        optimizer = GossipSGD(model.parameters(), lr=0.1, **options)
        backward(model)
        optimizer.step()
        before = [p.clone() for p in model.parameters()]
        twin, copied = how(how((model, optimizer)))
        for m, o in ((twin, copied), (model, optimizer)):
            for step in range(3):
                o.zero_grad()
                backward(m, step)
                o.step()
            if m is twin:
                assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        one, other = (
            torch.cat([v.reshape(-1) for s in o.state.values() for v in s.values()]) for o in (optimizer, copied)
        )
        assert torch.equal(one, other)


def test_copies(table, ranks):  # noqa: F811
    table.works(11, "with one worker a copy goes on, bit-equal to the original")
    table.refused(11, ranks[0]["copies"])
    assert all("build a new one" in str(rank["copies"]) for rank in ranks)


def test_checkpoints_are_plain(table):  # noqa: F811
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=torch.tensor(0.1))
    backward(model)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for state in loaded["state"].values():
        assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in state.values())
    table.works(12, "plain tensors and numbers, one tensor per parameter, none of them a view of a flat buffer")


def test_zero_grad(table):  # noqa: F811
    """Fresh gradients are views again when the backward pass ends."""
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        backward(model)
        for slot in optimizer._engine.buckets[0].slots:
            assert slot.p.grad is slot.grad
    table.works(13, "a new gradient moves into its flat buffer where autograd makes it")


def test_a_new_optimizer_takes_the_parameters_over():
    """The old one hears no more of gradients, and its buffers are freed though the parameters live."""
    model = network()
    old = GossipSGD(model.parameters(), lr=0.1)
    backward(model)
    gone, before = weakref.ref(old._engine.buckets[0]), old._engine.buckets[0].g.clone()
    new = GossipSGD(model.parameters(), lr=0.1)
    backward(model, 1)
    for slot in new._engine.buckets[0].slots:
        assert slot.p.grad is slot.grad
    assert torch.equal(old._engine.buckets[0].g, before)
    del old
    gc.collect()
    assert gone() is None


def test_no_gradient(table, ranks):  # noqa: F811
    """The ring's average of 0, 1 and 2 within 1e-6; momentum untouched, bit for bit."""
    for rank in ranks:
        value, momentum = rank["no_gradient"]
        torch.testing.assert_close(value, torch.ones(3), rtol=1e-6, atol=1e-6)
        assert not momentum.any()
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1, weight_decay=0.5)
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    table.works(14, "no local step, and its state stays; with several workers it is averaged all the same")


def test_schedulers(table):  # noqa: F811
    """Within 1e-6 of torch.optim.SGD, without torch's warning that the scheduler came first."""
    for make in (
        lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10, cycle_momentum=False),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
        ),
    ):

        def change(optimizer, make=make):
            scheduler = make(optimizer)

            def then(step, go):
                go()
                scheduler.step()

            return then

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            follow(change)
    table.works(15, "`step` is an ordinary method; a change between backward pass and step() counts for the next step")


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: tensors read as numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{"method": name} for name in sorted(rules.ALL)]
    + [{"max_grad_norm": 0.05}, {"lars": 0.01, "max_grad_norm": 0.05}, {"slowmo": SlowMo(every=3)}],
    ids=str,
)
def test_a_learning_rate_on_a_device_is_not_read(options, monkeypatch):
    """CPU tensors that count as a device's: one read per step, by passes that need numbers, and the same values."""

    def run(tensor):
        model = network(torch.float64)
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
        optimizer = GossipSGD(model.parameters(), lr=lr, weight_decay=0.01, **options)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
        reads = 0
        for step in range(8):
            optimizer.zero_grad()
            backward(model, step)
            with HostReads() as mode:
                optimizer.step()
            reads += mode.count
            scheduler.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), reads

    plain, _ = run(tensor=False)
    assert run(tensor=True)[1] > 0  # on the host it is read, for nothing waits: the count counts
    asked = []

    def numbers(self, original=Scalars.numbers):
        asked.append(sum(isinstance(v, torch.Tensor) for v in (self.grad_scale, *self.h)))
        return original(self)

    monkeypatch.setattr(scalars, "on_host", lambda value: False)
    monkeypatch.setattr(Scalars, "numbers", numbers)
    on_device, reads = run(tensor=True)
    assert reads == 0 and len(asked) == 8 and min(asked) >= 1
    torch.testing.assert_close(
        on_device, plain, rtol=1e-12 if options.keys() & {"max_grad_norm", "slowmo"} else 0, atol=0
    )


def test_tensor_learning_rate(table):  # noqa: F811
    """Every rule derives its scalars of a learning rate on a (simulated) GPU there: a read would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        lr = torch.tensor(0.1, device="cuda")
        error_of(float, lr)
        for rule in rules.ALL.values():
            memory = {}
            for _ in range(2):
                h = rule.scalars(scalars.scalar(lr), 0.9, 0.0, 0.5, {}, memory)
            assert h.lr.device.type == "cuda"
            assert all(v.device.type == "cuda" for name, v in memory.items() if name.startswith("lr"))
    table.works(16, "rules derive their scalars on the device, and the Triton kernels read them there; other passes on"
                    " a GPU take numbers and wait for it once per step")  # fmt: skip


def test_cyclic_momentum(table, ranks):  # noqa: F811
    """Within 1e-6 of torch.optim.SGD; a momentum at which disagreement grows is refused on all ranks at one step."""

    def cyclic(optimizer):
        scheduler = lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.9)
        return lambda step, go: (go(), scheduler.step())

    def one_cycle(optimizer):
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9)
        return lambda step, go: (go(), scheduler.step())

    follow(cyclic)
    follow(one_cycle)
    taken, left, message = ranks[0]["cycle"]
    assert (
        all(rank["cycle"] == ranks[0]["cycle"] for rank in ranks) and taken == 2 and left == 0
    )  # it grows from 0.5 on
    table.works(17, "`momentum` is read at every step, and certified again where it is new")
    table.refused(17, message)


def test_a_cycle_of_momenta_costs_a_few_certificates(monkeypatch, caplog):
    """1,000 momenta from 0.85 to 0.95: 20 beside the constructor's 0.9. Random graphs, which take seconds: none."""
    group = {"momentum": 0.9, "correction_rate": "auto", "correction_gain": 10.0}
    asked = []
    monkeypatch.setattr(
        certificate, "lyapunov", lambda *args, **hyper: asked.append(args[2]) or lyapunov(*args, **hyper)
    )
    for graph, cost in ((topology.one_peer_exponential(8), 20), (topology.get("random-match", 8), 0)):
        asked.clear()
        one = certificate.Certificate(rules.pc_dmsgd, graph, allow_unstable=False)
        one.check({**group})
        for k in range(1000):
            one.recheck({**group, "momentum": 0.85 + 0.1 * k / 999})
        assert len(asked) == cost + 1
    assert caplog.text.count("takes too long to certify") == 1


def test_maximize(table):  # noqa: F811
    follow(lambda optimizer: lambda step, go: go(), maximize=True)
    table.works(18, "per group")


def test_flags(table):  # noqa: F811
    for name in ("foreach", "differentiable", "capturable"):
        error = error_of(GossipSGD, network().parameters(), **{name: True}, kind=TypeError)
    GossipSGD(network().parameters(), fused=False)
    table.works(19, "`fused` alone: None takes the best passes available")
    table.refused(19, error)


def test_grad_scaler(table):  # noqa: F811
    assert GossipSGD._step_supports_amp_scaling and amp.GradScaler.__mro__[1] is torch.amp.GradScaler
    table.works(20, "all ranks exchange in every step; an overflow on one rank is nobody's local step:"
                    " test_mixed_precision.py")  # fmt: skip
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1)
    before = [p.clone() for p in model.parameters()]
    backward(model)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    table.works(21, "gradients are unscaled in the passes; with `found_inf` nothing is stepped and no state changes")


def test_sparse_gradients(table):  # noqa: F811
    embedding = nn.Embedding(5, 3, sparse=True)
    GossipSGD(embedding.parameters(), lr=0.1)
    loss = embedding(torch.tensor([1, 2])).sum()
    table.refused(22, error_of(loss.backward, kind=RuntimeError))


def test_kinds_of_parameters(table):  # noqa: F811
    """Each is bit-equal to being alone in the optimizer; complex ones follow torch.optim.SGD within 1e-6."""
    kinds = {
        23: [torch.randn(3, 2, dtype=torch.complex64), torch.randn(4, dtype=torch.complex128)],
        24: [torch.randn(4), torch.randn(4).double(), torch.randn(4).bfloat16(), torch.randn(4).half()],
        25: [torch.randn(()), torch.empty(0, 3), torch.randn(8, 3).T, torch.randn(4, 6)[:, ::2]],
    }

    def train(params, optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            sum((p.abs() ** 2).sum().double() * (i + 1) for i, p in enumerate(params)).backward()
            optimizer.step()

    for tensors in kinds.values():
        together = [nn.Parameter(t.clone()) for t in tensors]
        train(together, GossipSGD(together, lr=0.01))
        for i, t in enumerate(tensors):
            alone = [nn.Parameter(torch.zeros(())) for _ in range(i)] + [nn.Parameter(t.clone())]
            train(alone, GossipSGD(alone, lr=0.01))
            assert torch.equal(alone[i], together[i])
            if t.dtype.itemsize > 2:
                theirs = [nn.Parameter(torch.zeros(())) for _ in range(i)] + [nn.Parameter(t.clone())]
                train(theirs, torch.optim.SGD(theirs, lr=0.01, momentum=0.9))
                torch.testing.assert_close(together[i], theirs[i], rtol=1e-6, atol=1e-6)
    # No second device here: storage without one tells that they are kept apart.
    apart = build([torch.ones(2), torch.ones(3, device="meta"), torch.ones(4)], lambda total: total + 1)
    assert [[slot.p.shape[0] for slot in b.slots] for b in apart] == [[4, 2], [3]]
    table.works(23, "as pairs of real numbers")
    table.works(24, "a bucket for each type and device; 16-bit parameters have float32 master values")
    table.works(25, "dense layouts keep their strides, holes are closed")


def test_what_torch_refuses(table):  # noqa: F811
    p = nn.Parameter(torch.ones(2))
    table.refused(26, error_of(GossipSGD, [p * 2], kind=ValueError))
    table.refused(26, error_of(GossipSGD, [{"params": [p]}, {"params": [p]}], kind=ValueError))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = GossipSGD([p, p], lr=0.5)
    p.sum().backward()
    optimizer.step()
    assert (p == 0.5).all()
    table.works(26, "a duplicate within a group is torch's warning, and takes one step")


def test_distributed_checkpoints(table):  # noqa: F811
    """Parameters bit-equal, no step taken, the state by names and back."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1)
    before, steps = [p.clone() for p in model.parameters()], []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    saved = get_optimizer_state_dict(model, optimizer)
    assert not steps and all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    backward(model)
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    again = network()
    other = GossipSGD(again.parameters(), lr=0.3)
    set_optimizer_state_dict(again, other, saved)
    p = next(again.parameters())
    assert torch.equal(other.state[p]["momentum_buffer"], saved["state"]["0.weight"]["momentum_buffer"])
    assert other.param_groups[0]["lr"] == 0.1 and other.param_groups[0]["step"] == 1
    table.works(27, "state exists from construction on, so fetching it takes no step")


def test_sharded_parameters(table, ranks):  # noqa: F811
    """Here over the ranks that would gossip; sharded inside machines, test_inside.py trains them."""
    assert all("would exchange their different shards" in str(rank["sharded"]) for rank in ranks)
    table.works(28, "FSDP2's inside a machine gossip with the same shards of other machines: test_inside.py")
    table.refused(28, ranks[0]["sharded"])


def test_compiled(table, ranks):  # noqa: F811
    """Bit-equal to no compilation, overlapped and awc; messages leave in compiled backward passes as in others."""
    for rank in ranks:
        (plain, early), (compiled, early_too), (awc, _), (awc_compiled, _) = rank["compiled"]
        assert torch.equal(plain, compiled) and early == early_too > 0 and torch.equal(awc, awc_compiled)
    table.works(29, "the graph breaks at `step`; messages leave in compiled backward passes")


def test_optimizers_within_the_backward_pass(table, ranks):  # noqa: F811
    table.refused(30, ranks[0]["per_parameter"])
    assert all("one optimizer over all parameters" in str(rank["per_parameter"]) for rank in ranks)


def test_wrappers(table, ranks):  # noqa: F811
    assert all("agree" in str(rank["zero_redundancy"]) and "moved" in str(rank["post_local"]) for rank in ranks)
    text = re.sub(r"(rank \d has) .*?(?=, rank|\. Build)", r"\1 ...", str(ranks[0]["zero_redundancy"]))
    table.refused(31, ValueError(text))
    table.refused(31, ranks[0]["post_local"])


def test_profile(table, ranks):  # noqa: F811
    """In a real trace of every rank: a message is on its way before the backward pass ends, or (awc) through all of it;
    the parts of each exchange lie in order."""
    for rank in ranks:
        spans = {}
        for name, begin, end in rank["trace"]["atc"]:
            spans.setdefault(name, []).append((begin, end))
        buckets, steps = rank["trace"]["atc buckets"], spans["Optimizer.step#GossipSGD.step"]
        passes = [s for name, all_ in spans.items() if name.startswith("autograd::engine") for s in all_]
        hidden = 0
        for k, step in enumerate(range(2, 5)):
            for b in range(buckets):
                parts = ("pack", "send", "exchange", "wait", "combine")
                found = {part: spans[f"fused_dlam::{part} bucket {b} step {step}"] for part in parts}
                assert all(len(s) == 1 for s in found.values())
                pack, send, exchange, wait, combine = (s[0] for s in found.values())
                assert pack[1] <= exchange[0] <= send[0] <= send[1] <= wait[0] <= exchange[1] <= wait[1] <= combine[0]
                assert steps[k][0] <= wait[0] and combine[1] <= steps[k][1]
                hidden += any(begin < exchange[0] < end for begin, end in passes)
        assert hidden >= 3 and buckets >= 2  # at least one bucket's in every step
        awc = {name: (begin, end) for name, begin, end in rank["trace"]["awc"] if name.startswith("fused_dlam")}
        backward_of_4 = [s for s in rank["trace"]["awc"] if s[0].startswith("autograd::engine")][-1]
        begin, end = awc["fused_dlam::exchange bucket 0 step 4"]
        assert begin < backward_of_4[1] and backward_of_4[2] < end
    table.works(32, "`fused_dlam::pack bucket 3 step 7`, and so on; `exchange` lasts from sent to received, so hidden"
                    " communication lies beside the backward pass")  # fmt: skip


def test_repr(table):  # noqa: F811
    text = repr(GossipSGD(network().parameters(), lr=torch.tensor(0.5)))
    assert "momentum: 0.9" in text and "method: pc-dmsgd" in text
    table.works(33, "keys are text, values numbers, text and tensors")


def test_capture(table, monkeypatch):  # noqa: F811
    """No GPU needed: the engine is told that it has parameters on one, and torch that a capture is under way."""
    optimizer = GossipSGD(network().parameters())
    guards.check_place(optimizer._engine)
    optimizer._engine.lanes[torch.device("cuda")] = None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    guards.check_place(optimizer._engine)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table.refused(34, error_of(optimizer.step, kind=RuntimeError))


def test_the_table_is_not_stale(table):  # noqa: F811
    table.check()
