"""The protocol of torch.optim.Optimizer: steps, gradients and parameters (rows 4 to 6, 13, 14, and 20 to 26).

Each row of protocol_table.md works, or is refused by an error that says what to do; what it promises is said where it
is tested. One worker unless said otherwise; three gloo workers run protocol_workers.py.
"""

import gc
import weakref

import pytest
import torch
from protocol_network import backward, error_of, network
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_dlam import DecentLaM, GossipSGD
from fused_dlam.engine.layout import build
from fused_dlam.optim import mixed_precision as amp


def test_closures(table):
    calls = []
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1)

    def closure():
        calls.append(torch.is_grad_enabled())
        return backward(model)

    with torch.no_grad():
        assert optimizer.step(closure).requires_grad and calls == [True]
    table.works(4, "called once, with gradients enabled, before the exchange")


def test_step_hooks(table):
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


def test_zero_grad(table):
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


def test_no_gradient(table, ranks):
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


def test_grad_scaler(table):
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


def test_sparse_gradients(table):
    embedding = nn.Embedding(5, 3, sparse=True)
    GossipSGD(embedding.parameters(), lr=0.1)
    loss = embedding(torch.tensor([1, 2])).sum()
    table.refused(22, error_of(loss.backward, kind=RuntimeError))


def test_kinds_of_parameters(table):
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


def test_what_torch_refuses(table):
    p = nn.Parameter(torch.ones(2))
    table.refused(26, error_of(GossipSGD, [p * 2], kind=ValueError))
    table.refused(26, error_of(GossipSGD, [{"params": [p]}, {"params": [p]}], kind=ValueError))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = GossipSGD([p, p], lr=0.5)
    p.sum().backward()
    optimizer.step()
    assert (p == 0.5).all()
    table.works(26, "a duplicate within a group is torch's warning, and takes one step")
