"""Promise: bad input, and what breaks the flat buffers, is refused with a sentence. On one worker."""

from functools import partial

import pytest
import torch
from layers_of_users import spaced
from small_network import loss_of, network
from torch import nn

import fused_dlam
from fused_dlam import DecentLaM, GossipSGD, topology
from fused_dlam.layers import Lars


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": [Lars(0.0)]}, "Invalid lars: 0.0"),
        ({"layers": [Lars(-1.0)]}, "Invalid lars: -1.0"),
        ({"method": "adam", "beta2": 1.0}, "Invalid beta2: 1.0"),
        ({"method": "adamw", "eps": 0.0}, "Invalid eps: 0.0"),
    ],
)
def test_settings_of_layers_and_adam_are_checked(wrong, said):
    with pytest.raises(ValueError, match=said):
        GossipSGD([torch.nn.Parameter(torch.zeros(2))], **wrong)


def test_moved_parameters_are_refused():
    model = network()
    optimizer = GossipSGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    model.double()
    with pytest.raises(RuntimeError, match="Move the model first"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = GossipSGD(embedding.parameters(), lr=0.1)
    embedding.weight.grad = None
    with pytest.raises(RuntimeError, match="sparse"):
        embedding(torch.tensor([1, 2])).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"lr": -1.0}, "Invalid learning rate: -1"),
        ({"lr": float("nan")}, "Invalid learning rate"),
        ({"momentum": 1.0}, "Invalid momentum"),
        ({"weight_decay": -0.1}, "Invalid weight_decay"),
        ({"method": "sgd"}, "unknown method 'sgd'; known: psgd"),
        ({"topology": "moebius"}, "unknown topology 'moebius'; known: full"),
        ({"topology": topology.ring(4)}, "is for 4 workers, but there are 1"),
        ({"schedule": "late"}, "Invalid schedule"),
        ({"method": "da-dmsgd", "schedule": "awc"}, "one message"),
        ({"correction_rate": 2.0}, "Invalid correction_rate"),
        ({"correction_gain": 0.5}, "Invalid correction_gain"),
        ({"method": "qg-dmsgd", "mu": 1.5}, "Invalid mu"),
        ({"topology": partial(spaced, every=0)}, "every k >= 1"),
        ({"comm_dtype": torch.int8}, "Invalid comm_dtype"),
        ({"bucket_mb": 0}, "Invalid bucket_mb"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(options, match):
    with pytest.raises(ValueError, match=match):
        GossipSGD(network().parameters(), **{"lr": 0.1, **options})


def test_unknown_options_and_types_are_refused():
    with pytest.raises(TypeError, match="has no hyper-parameter 'dampening'"):
        GossipSGD(network().parameters(), lr=0.1, dampening=0.5)
    with pytest.raises(TypeError, match="method must be a name or a Rule"):
        GossipSGD(network().parameters(), lr=0.1, method=3)
    with pytest.raises(TypeError, match="pass method= to GossipSGD"):
        DecentLaM(network().parameters(), lr=0.1, method="dmsgd")
    with pytest.raises(TypeError, match="floating-point"):
        fused_dlam.neighbor_allreduce(torch.arange(3), "ring")
