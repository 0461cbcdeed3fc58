"""Promises about what constructors are given, on one worker, where nothing could be sent either:

- text, truth values and numbers out of range are refused by a TypeError or ValueError that names the setting, also in a
  parameter group, and the optimizer is then as before;
- a name that is almost right is answered by the right one;
- entries of a group that set nothing are kept, as in torch; one that is almost a setting is warned of at the user's
  line;
- places and waits are checked although one worker needs none;
- two parameters on one memory are refused, and what only lies near each other is not.
"""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from fused_dlam import Gossip, GossipSGD
from fused_dlam.layers import Lars, Layer
from fused_dlam.optim import options
from fused_dlam.optim.overlaps import offsets, overlapping, overlaps_itself
from fused_dlam.rules import rule as rule_module


def parameters(*shape):
    return [torch.nn.Parameter(torch.zeros(shape or 3))]


TEXT = {
    "lr": {"lr": "0.1"},
    "momentum": {"momentum": "0.1"},
    "weight_decay": {"weight_decay": "1e-4"},
    "lars": {"layers": [Lars("0.1")]},
    "bucket_mb": {"bucket_mb": "1"},
    "max_grad_norm": {"max_grad_norm": "1"},
}


@pytest.mark.parametrize("name", TEXT)
def test_text_is_no_number(name):
    with pytest.raises(TypeError, match=f"^{name} must be a number, not"):
        GossipSGD(parameters(), **TEXT[name])


def test_truth_values_are_no_numbers():
    for name in ("lr", "momentum", "weight_decay", "bucket_mb", "max_grad_norm"):
        for value in (True, np.True_):
            with pytest.raises(TypeError, match=f"^{name} must be a number, not"):
                GossipSGD(parameters(), **{name: value})
    with pytest.raises(TypeError, match="lars must be a number, not True"):
        GossipSGD(parameters(), layers=[Lars(True)])
    with pytest.raises(TypeError, match="maximize must be True or False, not 'no'"):
        GossipSGD(parameters(), maximize="no")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bucket_mb": math.inf}, "Invalid bucket_mb: inf, must be MiB above 0 and finite"),
        ({"bucket_mb": math.nan}, "Invalid bucket_mb: nan"),
        ({"bucket_mb": -1}, "Invalid bucket_mb: -1"),
        ({"bucket_mb": 1e300}, r"Invalid bucket_mb: 1e\+300"),
        ({"bucket_mb": 10**5000}, "Invalid bucket_mb: an integer of 16610 bits"),
        ({"max_grad_norm": math.nan}, "Invalid max_grad_norm: nan"),
        ({"lr": 10**5000}, "Invalid learning rate: an integer of"),
        ({"momentum": math.nan}, "Invalid momentum value: nan"),
        ({"weight_decay": math.inf}, "Invalid weight_decay value: inf"),
        ({"fused": "yes"}, "Invalid fused: 'yes', must be None, True or False"),
        ({"comm_dtype": torch.complex64}, "Invalid comm_dtype: torch.complex64, must be a floating type, one of"),
        ({"comm_dtype": torch.float8_e5m2}, "Invalid comm_dtype: torch.float8_e5m2"),
        ({"method": "qg-dmsgd", "mu": "0.1"}, "Invalid mu: '0.1', must be"),
        ({"method": "adam", "eps": "1e-8"}, "Invalid eps: '1e-8', must be"),
        ({"method": "pc_dmsgd"}, "unknown method 'pc_dmsgd'.*Did you mean 'pc-dmsgd'?"),
        ({"topology": "one_peer_exponential"}, "unknown topology.*Did you mean 'one-peer-exponential'?"),
    ],
)
def test_values_out_of_range(wrong, said):
    with pytest.raises(ValueError, match=said):
        GossipSGD(parameters(), **wrong)


def test_numbers_of_other_kinds_are_taken():
    for lr in (1, np.float32(0.1), Fraction(1, 10), torch.tensor(0.1)):
        x = parameters()
        optimizer = GossipSGD(x, lr=lr, momentum=np.float64(0.5), weight_decay=0, bucket_mb=np.int64(1))
        x[0].sum().backward()
        optimizer.step()
        assert x[0][0].item() == pytest.approx(-float(lr))


@pytest.mark.parametrize(
    ("method", "entry"),
    [("dmsgd", {"lr": "0.1"}), ("dmsgd", {"momentum": True}), ("adam", {"beta2": "0.9"}), ("dmsgd", {"lars": "0.1"})],
)
def test_groups_are_checked_too(method, entry):
    """A refused group leaves nothing behind."""
    (name,) = entry
    layers = [Lars(0.1)] if name == "lars" else []
    with pytest.raises((TypeError, ValueError), match=name):
        GossipSGD([{"params": parameters(), **entry}], method=method, layers=layers)
    optimizer = GossipSGD(parameters(), method=method, layers=layers)
    with pytest.raises((TypeError, ValueError), match=name):
        optimizer.add_param_group({"params": parameters(), **entry})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


class Named(Layer):
    """A user's layer with a setting that is text."""

    settings = {"mode": "fast"}


def test_a_layers_setting_may_be_text():
    assert GossipSGD(parameters(), layers=[Named()]).param_groups[0]["mode"] == "fast"
    with pytest.raises(TypeError, match="mode must be a number, not the text '1'"):
        GossipSGD([{"params": parameters(), "mode": "1"}], layers=[Named()])


def test_unknown_entries_of_groups():
    entries = {"weight_decy": 0.1, "LR": 2, "name": "head", "layer": 3, "initial_lr": 1.0, "max_momentum": 0.9}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = GossipSGD([{"params": parameters(), **entries}, {"params": parameters()}])
    told = [w for w in caught if "sets nothing" in str(w.message)]
    assert [str(w.message).partition(", which ")[0] for w in told] == [
        f"a parameter group has an entry {name!r}" for name in ("weight_decy", "LR")
    ]
    assert "Did you mean 'weight_decay'?" in str(told[0].message) and told[0].filename == __file__
    assert {k: optimizer.param_groups[0][k] for k in entries} == entries


def test_every_argument_of_the_constructors_may_be_meant():
    taken = set(GossipSGD.__init__.__annotations__) - {"params", "return", "hyper"}
    assert taken - set(rule_module.COMMON) <= set(options.ARGUMENTS)


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        (("x", None, None), TypeError, "timeout must be a number, not 'x'"),
        ((True, None, None), TypeError, "timeout must be a number"),
        ((0, None, None), ValueError, "Invalid timeout: 0, must be seconds, above 0"),
        ((-1, None, None), ValueError, "Invalid timeout: -1"),
        ((math.inf, None, None), ValueError, "Invalid timeout: inf"),
        ((math.nan, None, None), ValueError, "Invalid timeout: nan"),
        ((1e300, None, None), ValueError, "Invalid timeout"),
        ((10, "x", None), TypeError, "group must be a torch.distributed.ProcessGroup .* or None, not str"),
        ((10, [0, 1], None), TypeError, "group must be .* not list"),
        ((10, torch.distributed.GroupMember.NON_GROUP_MEMBER, None), ValueError, "this rank is not in the given"),
        ((10, None, "x"), ValueError, "hierarchical must be True, False or a DeviceMesh of two dimensions, not 'x'"),
        ((10, None, 2), ValueError, "hierarchical must be"),
    ],
)
def test_places(place, error, said):
    with pytest.raises(error, match=said):
        options.check_place(*place)


def test_places_that_make_sense():
    for hierarchical in (None, True, False):
        options.check_place(0.5, None, hierarchical)


def test_parameters_that_torch_refuses_too():
    used = iter(parameters())
    list(used)
    for empty in ([], used, iter(())):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            GossipSGD(empty)
    with pytest.raises(TypeError, match="should be an iterable"):
        GossipSGD(parameters()[0])


# -- memory that is shared -------------------------------------------------------------------------------------------


def two(a, b):
    return [torch.nn.Parameter(a), torch.nn.Parameter(b)]


def shared():
    t, m = torch.ones(12), torch.ones(4, 4)
    yield two(t, t)
    yield two(t[:7], t[6:])
    yield two(t.view(3, 4), t[4:6])
    yield two(m[:, 0], m[1])  # they cross
    yield two(m[::2], m[2])
    yield two(torch.view_as_complex(t.view(6, 2)), t[11:])


def apart():
    t, m = torch.ones(12), torch.ones(4, 4)
    yield two(t[:6], t[6:])
    yield two(m[:, 0], m[:, 1])
    yield two(m[::2], m[1::2])
    yield two(t[:0], t)
    yield two(torch.ones(3), torch.ones(3))
    p = torch.nn.Parameter(t)
    yield [p, p]  # one parameter, twice


def test_two_parameters_on_one_memory():
    for params in shared():
        assert overlapping(params) is not None and overlapping(params[::-1]) is not None
        with pytest.raises(ValueError, match=r"share memory.*decoder.weight = encoder.weight"):
            GossipSGD(params)
        with pytest.raises(ValueError, match="share memory"):
            Gossip(torch.optim.SGD(params, lr=0.1))
        with pytest.raises(ValueError, match="share memory"):
            options.check_parameters(params[1:], others=params[:1])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_what_lies_near_each_other_is_not_shared():
    for params in apart():
        assert overlapping(params) is None
        GossipSGD(params)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    GossipSGD(model.parameters())
    GossipSGD(model.parameters())  # which lie in the flat buffer of the first


def test_elements_that_lie_on_each_other():
    t = torch.arange(6.0)
    for once in (t, t[::2], t.view(2, 3).T, t[:0], t[0], torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        assert not overlaps_itself(once)
        assert len(offsets(once)) == once.numel()
    for again, places in (
        (t[:1].expand(4), [0]),
        (t.unfold(0, 3, 1), [*range(6)]),
        (t[::2, None].expand(3, 2), [0, 2, 4]),
    ):
        assert overlaps_itself(again) and offsets(again).tolist() == places
