"""Promises about a checkpoint's files on one worker, found by tests/trust/test_api_checkpoints.py:

- no code is run from them: what would is refused by a ValueError, in `.metadata` and in entries that are no tensors;
- one flipped bit is a ValueError, in either file, and earlier releases' `.metadata`, without a CRC, load;
- a model that has other parameters is refused before any of them is loaded;
- what has a `state_dict` gets its dictionaries back, with whole numbers as keys and empty ones too.
"""

import os
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from small_network import loss_of, network

from fused_dlam import GossipSGD, load_checkpoint, save_checkpoint
from fused_dlam.optim.safe_reading import LENGTH


class Thing:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Calls:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.system, (f"mkdir {self.folder}",)


def trained(steps, lr=0.1):
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model, optimizer


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def refused(path, words, **stateful):
    """Nothing is loaded, and the error has these words."""
    model, optimizer = trained(1)
    before = weights(model).clone()
    with pytest.raises(ValueError) as error:
        load_checkpoint(path, model, optimizer, **stateful)
    assert words in str(error.value) and torch.equal(before, weights(model))


def test_metadata_that_would_call_something(tmp_path):
    """Also where the next save looks which files are an older save's."""
    save_checkpoint(tmp_path / "x", *trained(2))
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(Calls(tmp_path / "made")))
    refused(tmp_path / "x", "it names posix.system, which no checkpoint needs: nothing of it was run")
    save_checkpoint(tmp_path / "x", *trained(2))
    assert not (tmp_path / "made").exists()
    assert load_checkpoint(tmp_path / "x", *trained(1)) == 1


def test_an_entry_that_would_call_something(tmp_path):
    save_checkpoint(tmp_path / "x", *trained(2), thing=Thing({"a": Calls(tmp_path / "made")}))
    refused(tmp_path / "x", "worker0.thing.a is made by posix.system. Nothing but numbers", thing=Thing({}))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("lr", [np.float32(0.1), Fraction(1, 10), torch.tensor(0.1)])
def test_settings_of_every_kind(tmp_path, lr):
    save_checkpoint(tmp_path / "x", *trained(2, lr), random=Thing({"state": np.random.RandomState(0).get_state()}))
    model, optimizer = trained(1)
    random = Thing(None)
    load_checkpoint(tmp_path / "x", model, optimizer, random=random)
    assert optimizer.param_groups[0]["lr"] == lr and type(optimizer.param_groups[0]["lr"]) is type(lr)
    assert np.array_equal(random.state["state"][1], np.random.RandomState(0).get_state()[1])


def test_flipped_bits(tmp_path):
    model, optimizer = trained(2)
    save_checkpoint(tmp_path / "x", model, optimizer)
    (data,) = tmp_path.rglob("*.distcp")
    metadata = tmp_path / "x" / ".metadata"
    number = next(iter(model.parameters())).detach().flatten()[3].numpy().tobytes()
    whole, where = data.read_bytes(), data.read_bytes().index(number)
    for file, at in ((data, where), (metadata, 200), (metadata, len(metadata.read_bytes()) - 3)):
        good = file.read_bytes()
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        refused(tmp_path / "x", "was changed since it was written")
        file.write_bytes(good)
    data.write_bytes(whole[: where + 2])
    refused(tmp_path / "x", "is torn")
    data.write_bytes(whole)
    metadata.write_bytes(metadata.read_bytes()[:-LENGTH])  # as earlier releases wrote it
    other, optimizer = trained(1)
    assert load_checkpoint(tmp_path / "x", other, optimizer) == 1 and torch.equal(weights(model), weights(other))


def test_another_model(tmp_path):
    save_checkpoint(tmp_path / "x", *trained(2))
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.PReLU())
    optimizer = GossipSGD(model[:3].parameters())
    before = weights(model).clone()
    with pytest.raises(ValueError, match="the checkpoint lacks 3.weight, which the model has"):
        load_checkpoint(tmp_path / "x", model, optimizer)
    assert torch.equal(before, weights(model))
    with pytest.raises(ValueError, match="the model lacks 2.bias, 2.weight, which the checkpoint has"):
        load_checkpoint(tmp_path / "x", model[:1], GossipSGD(model[:1].parameters()))


def test_a_scheduler_that_counts(tmp_path):
    """Its milestones are keys of a dictionary, and whole numbers."""
    model, optimizer = trained(1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    save_checkpoint(tmp_path / "x", model, optimizer, scheduler=scheduler)
    model, optimizer = trained(1)
    again = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9])
    load_checkpoint(tmp_path / "x", model, optimizer, scheduler=again)
    assert again.milestones == Counter([2, 3])
    for rate in (0.1, 0.01, 0.001):
        optimizer.step()
        again.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize("state", [{}, {"a": {}}, {1: 2}, {1: {"x": torch.ones(2)}}, {"a": [{}, {2: torch.ones(1)}]}])
def test_dictionaries_come_back(tmp_path, state):
    save_checkpoint(tmp_path / "x", *trained(1), thing=Thing(state))
    found = Thing(None)
    load_checkpoint(tmp_path / "x", *trained(1), thing=found)
    assert repr(found.state) == repr(state)


def test_what_has_no_state(tmp_path):
    model, optimizer = trained(1)
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(TypeError, match="optimizer must be a GossipSGD or a Gossip, not SGD"):
            call(tmp_path, model, torch.optim.SGD(model.parameters()))
        with pytest.raises(TypeError, match="model must have state_dict"):
            call(tmp_path, None, optimizer)
        with pytest.raises(TypeError, match="epoch must have state_dict"):
            call(tmp_path, model, optimizer, epoch=3)
