"""What the fuzzers of the public API found, a plain case each (checkpoints: tests/optim/test_checkpoint_safety.py)."""

import warnings
from fractions import Fraction

import networkx as nx
import numpy as np
import pytest
import torch

from fused_dlam import Gossip, GossipSGD, Simulation, SlowMo, Topology, consensus_growth, simulate, topology
from fused_dlam.layers import Lars


def parameters():
    return [torch.nn.Parameter(torch.ones(3, 2))]


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("name", ["d-equistatic", "base-k", "exponential"])
def test_too_many_workers(name):
    with pytest.raises(ValueError, match="the number of workers must be at most 10,000,000, not one of 100 bits"):
        topology.get(name, 10**30)


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ("", TypeError, "matrices of real numbers, not of str"),
        ([[1.0], [0.5, 0.5]], TypeError, "weights must be matrices of numbers"),
        ([[None]], TypeError, "not of object"),
        ([[1j]], TypeError, "not of complex128"),
        (topology.Circulant(1, ()), ValueError, "every row must sum to one; there are no weights"),
    ],
)
def test_what_is_no_matrix(weights, error, words):
    with pytest.raises(error, match=words):
        Topology(weights)


def test_graphs_of_networkx():
    """Parallel edges count once where there are no weights, and Metropolis-Hastings needs one degree per node."""
    for kind in (nx.MultiGraph, nx.MultiDiGraph):
        graph = kind([(0, 1), (0, 1), (1, 0), (1, 2), (2, 0)])
        simple = nx.Graph(graph) if kind is nx.MultiGraph else nx.DiGraph(graph)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # not doubly stochastic
            assert np.array_equal(*(topology.from_networkx(g).weights() for g in (graph, simple)))
    with pytest.raises(ValueError, match="those of an undirected graph: pass graph.to_undirected"):
        topology.metropolis_hastings(nx.DiGraph([(0, 1), (2, 1)]))
    with pytest.raises(TypeError, match="an edge's weight must be a number, not '0.5'"):
        topology.from_networkx(nx.Graph([(0, 1, {"weight": "0.5"})]))


def test_what_a_function_draws():
    with pytest.raises(TypeError, match="draw must return a Circulant, Sparse or Dense, not ndarray"):
        topology.RandomTopology(lambda step: np.eye(1), 1, 1)


def test_parameters_of_graphs():
    with pytest.raises(ValueError, match="eta must be in"):
        topology.od_equidyn(4, eta=None)
    with pytest.raises(ValueError, match="machine_size must be a divisor"):
        topology.inner_outer_exponential(4, machine_size=np.array([4]))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"momentum": float("nan")}, ValueError, "Invalid momentum value: nan"),
        ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        ({"lr": float("inf")}, ValueError, "Invalid learning rate: inf"),
        ({"grad": None}, TypeError, "grad must be a function"),
        ({"grad": lambda k, x: None}, TypeError, "what grad returns must be an array of real numbers"),
        ({"grad": lambda k, x: 1j * x}, TypeError, "what grad returns must be .* not of complex128"),
        ({"x0": [[1], [1, 2]]}, TypeError, "x0 must be an array of real numbers"),
        ({"steps": 10**30}, ValueError, "steps must be at most"),
        ({"schedule": np.ones(2)}, ValueError, "Invalid schedule"),
        ({"clip": np.ones(2)}, ValueError, "Invalid clip"),
        ({"method": "qg-dmsgd", "mu": 10**400}, ValueError, "Invalid mu"),
        ({"layers": [Lars({})]}, TypeError, "lars must be a number"),
        ({"layers": 3, "lars": 0.1}, TypeError, "layers must be a list"),
    ],
)
def test_simulations(options, error, words):
    sound = dict(method="dmsgd", topology="ring", grad=lambda k, x: x, x0=np.ones((3, 2)), steps=2, lr=0.1)
    with pytest.raises(error, match=words):
        simulate(**{**sound, **options})


def test_simulations_by_hand():
    with pytest.raises(ValueError, match=r"x must be real numbers \[n, d\], not float64 of shape \(3,\)"):
        Simulation("dmsgd", "ring", np.ones(3))
    with pytest.raises(TypeError, match="g must be of the kind of x"):
        Simulation("dmsgd", "ring", np.ones((3, 2))).step(None, 0.1)


def test_a_whole_number_beyond_all_floats():
    with pytest.raises(ValueError, match="Invalid correction_gain"):
        consensus_growth("mi-dmsgd", topology.ring(4), correction_gain=10**400)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("momentum", None, TypeError), ("momentum", 2, ValueError), ("correction_gain", "x", ValueError),
     ("lars", "auto", TypeError), ("maximize", "no", TypeError), ("lr", torch.ones(2), ValueError)],
)  # fmt: skip
def test_settings_between_steps(name, value, error):
    """Refused before the step, and with a sound value the next step works."""
    params = parameters()
    optimizer = GossipSGD(params, lr=0.1, layers=[Lars(0.1)])
    stepped(optimizer)
    sound, before = optimizer.param_groups[0][name], params[0].detach().clone()
    optimizer.param_groups[0][name] = value
    with pytest.raises(error, match={"lr": "Tensor lr must be"}.get(name, name)):
        stepped(optimizer)
    assert torch.equal(before, params[0])
    optimizer.param_groups[0][name] = sound
    stepped(optimizer)
    assert not torch.equal(before, params[0])


@pytest.mark.parametrize("name", ["overlap", "nonfinite", "fused", "schedule", "clip", "maximize"])
def test_an_array_is_no_choice(name):
    for value in (np.ones(2), torch.ones(2)):
        with pytest.raises((TypeError, ValueError), match=name):
            GossipSGD(parameters(), **{name: value})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["nesterov", "communicate_every"])
def test_an_array_is_no_old_option(name):
    with pytest.raises((TypeError, ValueError), match="nesterov must be|communicate every k"):
        GossipSGD(parameters(), **{name: torch.ones(2)})


def test_a_hyper_parameter_that_is_a_fraction():
    params, others = parameters(), parameters()
    stepped(GossipSGD(params, method="adam", beta2=Fraction(1, 2)))
    stepped(GossipSGD(others, method="adam", beta2=0.5))
    assert torch.equal(params[0], others[0])


def test_a_norm_that_is_a_tensor():
    params = parameters()
    optimizer = GossipSGD(params, lr=1.0, momentum=0.0, max_grad_norm=torch.tensor([0.5]))
    stepped(optimizer)
    assert float((1 - params[0].detach()).norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_frozen_parameter_that_was_expanded():
    frozen = torch.nn.Parameter(torch.ones(1).expand(4), requires_grad=False)
    GossipSGD([*parameters(), frozen])
    assert torch.equal(frozen, torch.ones(4))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({}, "a dictionary with 'state' and 'param_groups'"),
        ({"state": 3, "param_groups": []}, "state is no dictionary, but 3"),
        ({"state": {}, "param_groups": 3}, "param_groups are no list of dictionaries, but 3"),
        ({"state": {}, "param_groups": [{}]}, "group 0 of the checkpoint has no list of parameters, but None"),
        ({"state": {}, "param_groups": [{"params": [[]]}]}, r"has a parameter \[\], which is no number and no name"),
    ],
)
def test_states_that_are_none(saved, words):
    for optimizer in (GossipSGD(parameters()), Gossip(torch.optim.SGD(parameters(), lr=0.1))):
        with pytest.raises((TypeError, ValueError), match=words):
            optimizer.load_state_dict(saved)


def test_a_state_of_the_other_kind():
    params = parameters()
    optimizer = Gossip(torch.optim.AdamW(params, lr=0.1))
    stepped(optimizer)
    other = GossipSGD(parameters())
    stepped(other)
    with pytest.raises(ValueError, match="the checkpoint is of GossipSGD with method 'mi-dmsgd', and this is a Gossip"):
        optimizer.load_state_dict(other.state_dict())
    stepped(optimizer)


def test_a_state_of_another_inner_optimizer():
    """torch's AdamW would take a part of it before it misses its step."""
    params, others = parameters(), parameters()
    optimizer, other = Gossip(torch.optim.AdamW(params, lr=0.1)), Gossip(torch.optim.SGD(others, lr=0.1, momentum=0.9))
    stepped(optimizer)
    stepped(other)
    before = optimizer.state[params[0]]["exp_avg"].clone()
    with pytest.raises(ValueError, match="lacks 'step': it is of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert torch.equal(before, optimizer.state[params[0]]["exp_avg"])


@pytest.mark.parametrize("name", ["dampening", "nesterov", "slowmo"])
def test_options_of_torch_that_are_arrays(name):
    optimizer = GossipSGD(parameters())
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = torch.ones(3, 2)
    if name != "slowmo":
        with pytest.raises(ValueError, match=name):
            optimizer.load_state_dict(saved)
    else:
        optimizer.load_state_dict(saved)  # an entry that sets nothing


def test_a_norm_before_a_layer_is_this_steps():
    """With a layer that sees gradients they are copied for it after the norm is taken: it was the last step's."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    GossipSGD([p], lr=1.0, momentum=0.0, max_grad_norm=0.5, layers=[SlowMo(2)]).step()
    assert abs(float((1 - p.detach()).norm()) - 0.5) < 1e-5


def test_a_groups_memory_is_numbers_by_name():
    optimizer = GossipSGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(TypeError, match="memory must be numbers by name"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "memory": -1})
    assert len(optimizer.param_groups) == 1
