"""Promise: a backward pass captured in a CUDA graph counts, on fake GPUs (`fake_cuda`), where nothing is replayed.

While it is captured its gradients move into the flat buffers as part of the graph and nothing is sent; afterwards
step() sends and takes every local step, though no hook fires and no version counter moves.
"""

import pytest
import torch
from fake_cuda import Machine
from fake_training import Training, parameters
from fake_transport import Network

import fused_dlam

BUCKETS = 4


@pytest.mark.parametrize("overlap", ["auto", True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_captured_backward_pass(monkeypatch, overlap, ranks):
    machine = Machine()
    with machine, Network(machine, ranks, "cuda:nccl"):
        params = parameters()
        optimizer = fused_dlam.GossipSGD(params, lr=0.1, overlap=overlap, bucket_mb=1e-3, hierarchical=False)
        engine = optimizer._engine
        training = Training(machine, params, optimizer)
        training.step()  # before a capture, as torch advises
        optimizer.zero_grad()
        before = optimizer.messages_sent
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            training.backward()
        assert optimizer.messages_sent == before
        assert engine.step is None, "nothing has begun"
        slots = [slot for b in engine.buckets for slot in b.slots]
        assert all(slot.p.grad is slot.installed for slot in slots)
        optimizer.zero_grad(set_to_none=False)
        assert all(all(b.active()) for b in engine.buckets), "a replay moves no version counter"
        optimizer.step()
        if ranks > 1:
            assert optimizer.messages_sent == before + len(engine.buckets)
        training.step()  # a pass that is not captured, as for a last batch of another size, and replays again
        optimizer.zero_grad(set_to_none=False)
        assert all(all(b.active()) for b in engine.buckets)
    assert not machine.races
