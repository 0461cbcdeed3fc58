"""Promise: a checkpoint with values that the constructor would refuse is refused, naming the entry and the parameter.

Nothing is loaded then, and the optimizer steps on as if nothing had been.
"""

import copy

import pytest
import torch
from protocol_network import backward, network

from fused_dlam import Gossip, GossipSGD
from fused_dlam.layers import SlowMo


def group(**values):
    return lambda saved: saved["param_groups"][0].update(values)


def state(name, value):
    return lambda saved: saved["state"][0].update({name: value})


def first_whole_second_not(saved):
    saved["state"][0]["momentum_buffer"].fill_(7.0)
    saved["state"][1]["momentum_buffer"] = torch.zeros(1)


BAD = {
    "lr below zero": (group(lr=-1.0), ValueError, "group 0 of the checkpoint: Invalid learning rate: -1"),
    "lr nan": (group(lr=float("nan")), ValueError, "Invalid learning rate: nan"),
    "lr text": (group(lr="0.1"), TypeError, "lr must be a number, not '0.1'"),
    "momentum": (group(momentum=2), ValueError, "Invalid momentum value: 2"),
    "weight decay": (group(weight_decay=float("inf")), ValueError, "Invalid weight_decay value: inf"),
    "hyper": (group(correction_gain=-1.0), ValueError, "Invalid correction_gain: -1"),
    "step": (group(step=-3), ValueError, "Invalid step: -3"),
    "step not whole": (group(step=2.5), ValueError, "Invalid step: 2.5"),
    "memory of text": (group(memory="garbage"), TypeError, "memory must be numbers by name, not 'garbage'"),
    "memory of nan": (group(memory=[["lr_max", float("nan")]]), TypeError, "memory must be numbers"),
    "memory no pairs": (group(memory=3), TypeError, "memory must be numbers by name, not 3"),
    "a row": (state("momentum_buffer", torch.ones(5)), ValueError,
              "momentum_buffer of parameter 0 of group 0, of shape (7, 5), has shape (5,)"),
    "a number": (state("momentum_buffer", torch.ones(())), ValueError, "has shape ()"),
    "no tensor": (state("momentum_buffer", 0.5), TypeError, "is no tensor, but 0.5"),
    "whole numbers": (state("momentum_buffer", torch.ones(7, 5, dtype=torch.int64)), TypeError, "torch.int64"),
    "complex": (state("momentum_buffer", torch.ones(7, 5, dtype=torch.complex64)), TypeError, "torch.complex64"),
    "no dictionary": (lambda saved: saved["state"].update({0: 5}), TypeError, "is no dictionary, but 5"),
    "the second": (first_whole_second_not, ValueError, "momentum_buffer of parameter 1 of group 0"),
    "groups": (lambda saved: saved["param_groups"].append(dict(saved["param_groups"][0])), ValueError,
               "has 2 parameter groups"),
    "parameters": (lambda saved: saved["param_groups"][0]["params"].pop(), ValueError, "parameters, the optimizer's"),
}  # fmt: skip


def everything(model, optimizer):
    state = [v for s in optimizer.state.values() for _, v in sorted(s.items()) if isinstance(v, torch.Tensor)]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [p.detach().clone() for p in model.parameters()] + [v.clone() for v in state], copy.deepcopy(groups)


@pytest.mark.parametrize("name", BAD)
def test_refused_before_anything_is_loaded(name):
    spoil, kind, words = BAD[name]
    model, twin = network(), network()
    optimizer, other = (GossipSGD(m.parameters(), lr=0.1) for m in (model, twin))
    for m, o in ((model, optimizer), (twin, other)):
        backward(m)
        o.step()
    saved = optimizer.state_dict()
    spoil(saved)
    before, groups = everything(model, optimizer)
    with pytest.raises(kind) as error:
        optimizer.load_state_dict(saved)
    assert words in str(error.value), error.value
    after, groups_after = everything(model, optimizer)
    assert groups == groups_after and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for m, o in ((model, optimizer), (twin, other)):
        o.zero_grad()
        backward(m)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_layers_settings_and_buffers_are_checked():
    optimizer = GossipSGD(network().parameters(), lr=0.1, layers=[SlowMo(2)])
    name = next(iter(SlowMo(2).state))
    saved = optimizer.state_dict()
    saved["state"][0][name] = torch.ones(1)
    with pytest.raises(ValueError, match=f"{name} of parameter 0"):
        optimizer.load_state_dict(saved)


def test_gossip_checks_what_it_knows():
    """Its own entries, the learning rate, and shapes where the inner optimizer has state of that name."""
    model = network()
    optimizer = Gossip(torch.optim.AdamW(model.parameters(), lr=0.1))
    backward(model)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for spoil, kind, words in (
        (group(lr=-1.0), ValueError, "Invalid learning rate"),
        (group(gossip_step="two"), TypeError, "gossip_step must be a number"),
        (state("exp_avg", torch.ones(3)), ValueError, r"exp_avg of parameter 0 of group 0.* shape \(3,\)"),
    ):
        bad = copy.deepcopy(saved)
        spoil(bad)
        with pytest.raises(kind, match=words):
            optimizer.load_state_dict(bad)
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize("build", [lambda p: GossipSGD(p, lr=0.1), lambda p: Gossip(torch.optim.SGD(p, lr=0.1))])
def test_what_the_script_wrote_before_the_first_step_is_saved(build):
    """In 16 bits, where master values are beside the parameters. Into a new model: what was written, in all bits."""
    model = network(torch.bfloat16)
    optimizer = build(model.parameters())
    model.load_state_dict({k: torch.full_like(v, 3.0) for k, v in model.state_dict().items()})
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for values in saved[1]["state"].values():
        assert all((v == 3.0).all() for k, v in values.items() if "master" in k)
    again = network(torch.bfloat16)
    optimizer = build(again.parameters())
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert all((p == 3.0).all() for p in again.parameters())
