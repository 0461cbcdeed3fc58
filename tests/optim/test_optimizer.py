"""Promises about `GossipSGD` on one worker without a process group:

- equal to `torch.optim.SGD` within one rounding per step, under weight decay and a schedule through zero;
- parameters and gradients stay views of flat buffers, whatever a training script does;
- a resumed run is the uninterrupted one, bit for bit.

What is refused is in test_optimizer_refusals.py, LARS and SlowMo are in test_optimizer_layers.py.
"""

import copy

import pytest
import torch
from small_network import loss_of, network, schedule
from torch import nn

import fused_dlam
from fused_dlam import DecentLaM, GossipSGD

SINGLE = ["pmsgd", "dmsgd", "decentlam", "pc-dmsgd"]


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_worker_is_torch_sgd(method, dtype):
    """From equal states, every step is within one rounding (of the parameter's and the step's size) of torch's."""
    ours, theirs = network(dtype), network(dtype)
    a = GossipSGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, method=method)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    eps = torch.finfo(dtype).eps
    for step in range(40):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.param_groups[0]["lr"] = schedule(step)
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            m, n = a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"]
            assert (abs(p - q) <= 2 * eps * (abs(q) + schedule(step) * abs(n)).clamp_min(eps)).all()
            assert (abs(m - n) <= 4 * eps * abs(n).max()).all()
            with torch.no_grad():  # errors of one step must not add up
                q.copy_(p)
                n.copy_(m)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_and_parameters_are_views(set_to_none):
    """After backward, accumulation and clipping all gradients lie in one flat buffer, and parameters always do."""
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1)
    (bucket,) = optimizer._engine.buckets
    for _ in range(3):
        optimizer.zero_grad(set_to_none)
        assert not set_to_none or all(p.grad is None for p in model.parameters())
        loss_of(model).backward()
        loss_of(model, 1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for slot in bucket.slots:
            assert slot.p.grad is slot.grad
            assert 0 <= slot.p.data_ptr() - bucket.x.data_ptr() < bucket.x.untyped_storage().nbytes()
            assert slot.p.untyped_storage().nbytes() == slot.p.numel() * 4  # of its own: torch.save writes storages
            assert slot.grad.untyped_storage().data_ptr() == bucket.g.untyped_storage().data_ptr()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("how", ["model.zero_grad", "set_to_none", "create_graph", "assigned"])
def test_gradients_that_are_no_views_are_collected(how):
    """Fresh gradients, however they came about, give bit-equal parameters to views."""
    a, b = network(), network()
    first, second = GossipSGD(a.parameters(), lr=0.1), GossipSGD(b.parameters(), lr=0.1)
    for step in range(4):
        first.zero_grad()
        loss_of(a, step).backward()
        first.step()
        if how == "set_to_none":
            for p in b.parameters():
                p.grad = None
        else:
            b.zero_grad()
        if how == "assigned":
            for p, g in zip(b.parameters(), torch.autograd.grad(loss_of(b, step), list(b.parameters())), strict=True):
                p.grad = g
        else:
            loss_of(b, step).backward(create_graph=how == "create_graph")
        second.step()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_parameter_without_gradient_is_skipped_as_in_torch():
    """No weight decay, no momentum step; its neighbors in the flat buffer are updated. Bit-equal to leaving it out."""
    model, twin = network(), network()
    optimizer = GossipSGD(model.parameters(), lr=0.1, weight_decay=0.1)
    reference = torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    for step in range(6):
        for m, o in ((model, optimizer), (twin, reference)):
            o.zero_grad()
            m[2].weight.requires_grad_(step < 2)  # frozen while momentum is left
            loss_of(m, step).backward()
            o.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_no_gradients_at_all_is_no_step():
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_whose_norm_is_not_finite_counts_as_zero(value, on_device, monkeypatch):
    """As torch's clip_grad_norm_ has it for infinity; and where the norm stays on a device, so does this."""
    if on_device:
        monkeypatch.setattr("fused_dlam.engine.clip.scalar", lambda value: torch.as_tensor(value))
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GossipSGD([p], lr=0.1, max_grad_norm=1.0)
    for k in range(2):
        p.grad = torch.tensor([value if k else 1.0, 1.0, 1.0])
        optimizer.step()
    step = 0.1 / 3**0.5
    torch.testing.assert_close(p.detach()[1:], torch.full((2,), 1 - step - 0.9 * step))


def test_layouts():
    """Channels-last, 0-d, empty, transposed, expanded-and-cloned and complex parameters follow torch.optim.SGD."""

    def parameters():
        torch.manual_seed(1)
        return [
            nn.Parameter(torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(())),
            nn.Parameter(torch.empty(0, 3)),
            nn.Parameter(torch.randn(3, 8).T),
            nn.Parameter(torch.randn(4, 6)[:, ::2]),
            nn.Parameter(torch.randn(3, 2, dtype=torch.complex64)),
            nn.Parameter(torch.randn(5, dtype=torch.float64)),
        ]

    ours, theirs = parameters(), parameters()
    a, b = GossipSGD(ours, lr=0.1), torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for _ in range(5):
        for params, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            sum((p.abs() ** 2).sum() * (i + 1) for i, p in enumerate(params)).backward()
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert p.shape == q.shape
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_bfloat16_parameters_have_float32_masters():
    """The parameters are the rounded float32 run, not a run in bfloat16: bit-equal after 30 small steps."""
    model, twin = network(torch.bfloat16), network(torch.bfloat16).float()
    optimizer = GossipSGD(model.parameters(), lr=1e-3)
    reference = GossipSGD(twin.parameters(), lr=1e-3)
    for step in range(30):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        reference.zero_grad()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16()) and torch.equal(optimizer.state[p]["master"], q)


def test_closures_schedulers_groups_and_late_groups():
    """A closure's loss is returned; torch's schedulers drive every group; a group added late takes part."""
    model, twin = network(), network()
    late, late_twin = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def build(cls, model, **more):
        first, second = list(model[0].parameters()), list(model[2].parameters())
        groups = [{"params": first}, {"params": second, "lr": 0.01, "momentum": 0.5, "weight_decay": 0.1}]
        optimizer = cls(groups, lr=0.1, momentum=0.9, **more)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1)

    (a, sa), (b, sb) = build(GossipSGD, model), build(torch.optim.SGD, twin)
    for step in range(8):
        if step == 4:
            a.add_param_group({"params": [late], "lr": 0.2})
            b.add_param_group({"params": [late_twin], "lr": 0.2})
        losses = []
        for m, extra, optimizer, scheduler in ((model, late, a, sa), (twin, late_twin, b, sb)):

            def closure(m=m, extra=extra, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(m) + (extra**2).sum()
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            scheduler.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for p, q in zip([*model.parameters(), late], [*twin.parameters(), late_twin], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["pc-dmsgd", "decentlam", "dsgd", "qg-dmsgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_equal(method, dtype, tmp_path):
    """Through torch.save and weights_only loading, mid-schedule; small checkpoints hold no whole flat buffers."""
    model = network(dtype)
    optimizer = GossipSGD(model.parameters(), lr=0.1, method=method)
    for step in range(12):
        if step == 6:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
        optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    for entry in saved["optimizer"]["state"].values():
        assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in entry.values())
    again = network(dtype)
    resumed = GossipSGD(again.parameters(), lr=0.5, method=method)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["step"] == 6
    for step in range(6, 12):
        resumed.param_groups[0]["lr"] = schedule(step)
        resumed.zero_grad()
        loss_of(again, step).backward()
        resumed.step()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoints_of_torch_sgd_load_and_others_are_refused():
    model, twin = network(), network()
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    loss_of(twin).backward()
    theirs.step()
    ours = GossipSGD(model.parameters(), lr=0.3)
    ours.load_state_dict(theirs.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])
        assert not ours.state[p]["correction_buffer"].any()
    assert ours.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match="of method 'dmsgd'.*of 'mi-dmsgd'"):
        ours.load_state_dict(GossipSGD(network().parameters(), method="dmsgd").state_dict())
    adam = torch.optim.Adam(twin.parameters()).state_dict()
    with pytest.raises(ValueError, match="of one of torch's Adams.*fused_dlam.Gossip"):
        GossipSGD(model.parameters(), method="adam").load_state_dict(adam)


def test_consensus_without_neighbors():
    model = network()
    optimizer = DecentLaM(model.parameters(), lr=0.1)
    with optimizer.averaged(model):
        assert optimizer.consensus_distance() == 0.0
    t = torch.randn(3)
    assert torch.equal(fused_dlam.neighbor_allreduce(t, "ring"), t)
