"""The protocol of torch.optim.Optimizer: state and checkpoints (rows 7 to 12, and 27).

Each row of protocol_table.md works, or is refused by an error that says what to do; what it promises is said where it
is tested. One worker unless said otherwise; three gloo workers run protocol_workers.py.
"""

import copy
import io
import pickle

import pytest
import torch
from protocol_network import backward, error_of, network

from fused_dlam import GossipSGD


def test_state_dict_hooks(table):
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


def test_loading_keeps_float32_state(table):
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


def test_loaded_state_is_a_view(table):
    optimizer = GossipSGD(network().parameters(), lr=0.1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (bucket,) = optimizer._engine.buckets
    flat = {t.untyped_storage().data_ptr() for t in bucket.state}
    held = (v for state in optimizer.state.values() for v in state.values())
    assert {v.untyped_storage().data_ptr() for v in held} == flat
    table.works(9, "values are copied into the buffers, and `state` holds views of them again")


def test_older_checkpoints(table):
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


def test_copies(table, ranks):
    table.works(11, "with one worker a copy goes on, bit-equal to the original")
    table.refused(11, ranks[0]["copies"])
    assert all("build a new one" in str(rank["copies"]) for rank in ranks)


def test_checkpoints_are_plain(table):
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


def test_distributed_checkpoints(table):
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
