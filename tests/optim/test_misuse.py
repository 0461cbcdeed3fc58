"""Promises about scripts that mean well, with one worker, for what they do is the same on every one:

- the inner optimizer's own step() is refused while a `Gossip` is around it, also by a GradScaler, and free again after;
- options of other packages, and of the other class, are answered by what they are called here;
- optimizers that send parameters themselves are refused;
- `no_sync` of a `Gossip` leaves gradients alone; parameters that never get one are worth a line, once.
"""

import logging

import pytest
import torch

from fused_dlam import Gossip, GossipSGD


def made(**options):
    x = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.SGD([x], lr=0.5)
    return x, inner, Gossip(inner, **options)


@pytest.mark.parametrize("options", [{}, {"outer": "mi-dmsgd", "every": 2}])
def test_the_inner_optimizers_step_is_the_gossips(options):
    x, inner, optimizer = made(**options)
    x.grad = torch.ones(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(x.sum())
    for step in (inner.step, lambda: scaler.step(inner)):
        with pytest.raises(RuntimeError, match="inside a Gossip, which would train this worker alone: call step"):
            step()
    optimizer.step()
    assert x.tolist() == [0.5] * 3
    again = Gossip(inner, **options)  # around the same one: the new one's steps are right
    again.step()
    with pytest.raises(RuntimeError, match="another optimizer built over it"):
        optimizer.step()
    again.close()
    inner.step()


def test_a_compiled_inner_step_stays_whole():
    x, inner, optimizer = made()
    inner.step = torch.compile(inner.step, backend="eager")
    x.grad = torch.ones(3)
    optimizer.step()
    assert x.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weight_decay": 0.1}, "no weight_decay=: it is the inner optimizer's"),
        ({"outer_lr": 0.1}, "no outer_lr=: it is lr= here"),
        ({"sync_every": 4}, "no sync_every=: the number of inner steps is every="),
        ({"nesterov": True}, "no nesterov=: it is the inner optimizer's"),
        ({"nonfinite": "raise"}, "no nonfinite=, which is GossipSGD's"),
    ],
)
def test_options_by_other_names(options, words):
    with pytest.raises(TypeError, match=words):
        made(outer="dsgd", **options)


@pytest.mark.parametrize("name", ["outer", "every"])
def test_options_of_the_other_class(name):
    with pytest.raises(TypeError, match=f"GossipSGD has no {name}=, which is Gossip's"):
        GossipSGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, **{name: 3})


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"])
def test_optimizers_that_send_themselves(name):
    kind = type(name, (torch.optim.SGD,), {})
    with pytest.raises(TypeError, match=f"{name} sends parameters to other ranks in its own step"):
        Gossip(kind([torch.nn.Parameter(torch.ones(3))], lr=0.1))


def test_no_sync_of_a_gossip_leaves_gradients_alone():
    x, _, optimizer = made()
    with optimizer.no_sync():
        x.sum().backward()
    x.sum().backward()
    optimizer.step()
    assert x.tolist() == [0.0] * 3


@pytest.mark.parametrize("around", [True, False])
def test_parameters_without_gradients_are_worth_a_line(caplog, around):
    model = torch.nn.Linear(2, 2)
    optimizer = GossipSGD(model.parameters(), lr=0.1)
    if around:
        optimizer = Gossip(torch.optim.SGD(model.parameters(), lr=0.1), outer="dsgd", every=2)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with caplog.at_level(logging.WARNING, "fused_dlam"):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    lines = [record.message for record in caplog.records if "had a gradient" in record.message]
    assert len(lines) == 1 and "assign=True" in lines[0]
