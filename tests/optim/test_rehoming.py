"""Promises about parameters whose memory is replaced after the optimizer was built:

- `model.to("cpu:0")`, which copies, at any place of a script changes no bit of what is trained, averaged and saved:
  16-bit parameters, complex, tied and frozen ones, schedule "awc", `Gossip`, accumulated gradients;
- a new memory's values count, as for torch's optimizers; while x is being sent ("awc") they are refused as any write;
- `p.grad.data = t` counts too;
- what cannot come home is refused, with what has changed, and nothing else is changed: another type, device or shape,
  another optimizer's parameter, a part of a larger storage, shared memory, one memory under two parameters;
- `averaged(model)` refuses a model of which it knows that its parameters are other objects now, by their names; where
  it cannot know and gradients go elsewhere, the log warns.
"""

import pytest
import rehoming_workers as workers
import torch
from small_network import loss_of, network
from torch import nn
from workers import run_together

from fused_dlam import Gossip, GossipSGD

EVERYWHERE = ("built", "before", "zeroed", "forward", "backward", "stepped", "averaged", "end")
PLACES = [("built",), ("backward",), ("stepped",), ("averaged",), EVERYWHERE]
REPLACED = ("seen", "named", "unseen", "new layer", "added")
WRITES = [
    (kind, how)
    for kind in ("GossipSGD", "awc", "bfloat16", "bfloat16 awc", "AdamW", "AdamW bfloat16")
    for how in ("before the step", "after the step", "synchronized")
]


@pytest.fixture(scope="module")
def runs():
    calls = {}
    for kind in workers.KINDS:
        calls[kind, ()] = (workers.train, kind, ())
        for when in PLACES if kind in ("GossipSGD", "AdamW") else PLACES[-1:]:
            calls[kind, when] = (workers.train, kind, when)
    for name, more in (("kept", (True,)), ("thawed", (False, 3))):
        for when in ((), EVERYWHERE):
            calls[name, when] = (workers.train, "GossipSGD", when, *more)
    for kind, how in WRITES:
        calls[kind, how] = (workers.written, kind, how)
    for how in REPLACED:
        calls["replaced", how] = (workers.replaced, how)
    return run_together(2, calls, deadline=120)


@pytest.mark.parametrize("kind", [*workers.KINDS, "kept", "thawed"])
def test_a_copied_model_trains_as_one_that_was_not(runs, kind):
    wholes = runs[kind, ()]
    moved = [when for name, when in runs if name == kind and when and when in PLACES]
    assert moved and (wholes[0]["distance"] > 0) is (
        kind not in ("AdamW", "AdamW bfloat16")
    )  # two workers' mean is exact
    for when in moved:
        for rank, (a, b) in enumerate(zip(wholes, runs[kind, when], strict=True)):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m: f"{kind}, {when}, rank {rank}: {m}")  # noqa: B023


@pytest.mark.parametrize("kind,how", WRITES)
def test_values_of_new_memory_count(runs, kind, how):
    for rank, found in enumerate(runs[kind, how]):
        if kind in ("awc", "bfloat16 awc") and how == "before the step" or (kind.endswith("awc") and "after" in how):
            assert "while it was being sent" in found
        else:
            assert abs(found - 1.5) < 0.02, rank  # the mean of 1 and 2, but for AdamW's decay


@pytest.mark.parametrize("build", [GossipSGD, lambda p, lr: Gossip(torch.optim.SGD(p, lr=lr, momentum=0.9))])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_new_memory_of_a_gradient_counts(build, set_to_none):
    """Clipping by `p.grad.data = ...`, against torch.optim.SGD."""
    models = [network(), network()]
    optimizers = [build(models[0].parameters(), lr=0.1), torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9)]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad(set_to_none)
            loss_of(model, step).backward()
            for p in model.parameters() if step != 2 else ():
                p.grad.data = p.grad.data.clamp(-0.1, 0.1)
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_what_cannot_come_home_is_refused():
    def built():
        model = network()
        return model, GossipSGD(model.parameters(), lr=0.1)

    def refused(optimizer, *texts):
        with pytest.raises(RuntimeError, match="was moved, converted or replaced") as error:
            optimizer.step()
        assert all(text in str(error.value) for text in texts), error.value

    model, optimizer = built()
    refused((model.double(), optimizer)[1], "its type was torch.float32 and is torch.float64")
    model, optimizer = built()
    model, optimizer = built()
    model[0].weight.data = torch.zeros(7, 6)
    refused(optimizer, "its shape was (7, 5) and is (7, 6)")
    model, optimizer = built()
    second = GossipSGD(model.parameters(), lr=0.1)
    refused(optimizer, "another optimizer built over it")
    second.step()
    del second
    refused(optimizer, "another optimizer built over it")
    model, optimizer = built()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    refused(optimizer)
    model, optimizer = built()
    model.share_memory()
    refused(optimizer, "shared with other processes")
    model, optimizer = built()
    one = torch.zeros(7)
    model[0].bias.data, model[2].bias.data = one, one
    model, optimizer = built()
    model[0].bias.data = model[0].bias.data.clone()
    model[0].weight.data = torch.zeros(7, 6)
    refused(optimizer)
    model[0].weight.data = torch.zeros(7, 5)
    optimizer.step()  # works again


def test_one_memory_under_two_parameters_is_refused():
    a, b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    optimizer = GossipSGD([a, b], lr=0.1)
    b.data = a.data
    with pytest.raises(RuntimeError, match="moved, converted or replaced"):
        optimizer.step()
    a.data = b.data = torch.ones(5)
    with pytest.raises(RuntimeError, match="moved, converted or replaced"):
        optimizer.step()


def test_another_memory_layout_is_told_and_does_not_count(caplog):
    model = nn.Conv2d(3, 4, 3)
    optimizer = GossipSGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()
    model.to(memory_format=torch.channels_last)
    optimizer.step()
    assert torch.equal(model.weight, before) and model.weight.is_contiguous()
    assert "another memory layout" in caplog.text


@pytest.mark.parametrize("how", REPLACED)
def test_replaced_objects_are_told_by_name(runs, how):
    for error, lines in runs["replaced", how]:
        if how == "seen":
            assert "0.weight, 0.bias, 1.weight, 1.bias were replaced" in error
        elif how == "named":
            assert "the model's 1.weight, 1.bias were replaced" in error
        else:
            assert error == ""
        warned = [level for level, line in lines if "it trains nothing" in line]
        assert warned == (["WARNING"] if how in ("seen", "unseen") else [])
