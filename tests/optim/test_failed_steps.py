"""Promises about steps that fail in their middle, and about what a step leaves behind:

- what fails before anything is sent leaves nothing behind: the next `step()` is that step, bit for bit;
- with one worker an interrupted step can be taken again; with several the next one says that an attempt has failed;
- `Gossip` with one worker is the inner optimizer, bit for bit, in 16 bits too;
- no flight outlives its step, without help of the garbage collector;
- settings and checkpoints of former releases do not lose their layer in silence.
"""

import gc
from unittest import mock

import failing_workers
import pytest
import torch

from fused_dlam import Gossip, GossipSGD, SlowMo
from fused_dlam.engine.flight import Flight
from fused_dlam.layers import Lars, Layer
from fused_dlam.tools.launch import run_workers


def parameter(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(5, dtype=dtype))


def steps(optimizer, p, count, start=0):
    for step in range(start, start + count):
        p.grad = torch.sin(p.detach() * (step + 1))
        optimizer.step()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_step_that_could_not_begin_is_taken_again(name):
    p, q = parameter(), parameter()
    failing, whole = GossipSGD([p], 0.1, weight_decay=0.1), GossipSGD([q], 0.1, weight_decay=0.1)
    steps(failing, p, 2)
    steps(whole, q, 2)
    group = failing.param_groups[0]
    kept, group[name] = group[name], None
    with pytest.raises(TypeError):
        steps(failing, p, 1, 2)
    group[name], group["lr"], whole.param_groups[0]["lr"] = kept, 0.01, 0.01
    steps(failing, p, 3, 2)
    steps(whole, q, 3, 2)
    assert torch.equal(p, q) and failing.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


def test_an_interrupted_step_of_one_worker_is_taken_again():
    """Also where a layer had changed the gradient already."""
    for layers in ([], [Lars(0.05)]):
        p, q = parameter(), parameter()
        failing, whole = GossipSGD([p], 0.1, layers=layers), GossipSGD([q], 0.1, layers=layers)
        steps(failing, p, 2)
        (passes,) = failing._engine.local.passes[0].values()
        with mock.patch.object(passes, "combine", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            steps(failing, p, 1, 2)
        failing.step()
        steps(failing, p, 2, 3)
        steps(whole, q, 5)
        assert torch.equal(p, q)


def test_a_step_of_one_worker_interrupted_in_clipping_is_taken_again():
    """With Adam, whose bias correction counts steps, and with the learning rate of the second attempt."""
    p, q = parameter(), parameter()
    failing, whole = (GossipSGD([x], 0.1, method="adam", max_grad_norm=0.5) for x in (p, q))
    steps(failing, p, 2)
    steps(whole, q, 2)
    clip = "fused_dlam.optim.opening.clip_coefficient"
    with mock.patch(clip, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        steps(failing, p, 1, 2)
    failing.param_groups[0]["lr"] = whole.param_groups[0]["lr"] = 0.02
    steps(failing, p, 2, 2)
    steps(whole, q, 2, 2)
    assert torch.equal(p, q) and failing.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


def test_an_interrupted_step_of_several_workers_is_not_taken_for_done():
    """Every later step, backward pass and load says that an attempt has failed, and nothing hangs."""
    for told in run_workers(failing_workers.interrupted, 2):
        assert len(told) == 3 and all("an earlier attempt at step 2 failed (MemoryError: none left)" in t for t in told)


def test_an_inner_step_that_raised_is_taken_again_or_given_up():
    """Gossip at midpoint: W (x + d/2) + d/2 of what the script has written since, also after a load in its place."""
    for again, instead in run_workers(failing_workers.inner_fails, 2):
        assert again == pytest.approx(6.0, abs=1e-6) and instead == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("schedule", ["atc", "midpoint", "awc"])
def test_the_wrapper_around_one_worker_is_the_inner_optimizer(schedule):
    """A bfloat16 parameter that moves from 1 to 1e-8, and one that becomes infinite, too."""
    inner, outer = parameter(torch.bfloat16), parameter(torch.bfloat16)
    plain = torch.optim.SGD([inner], 1.0)
    gossip = Gossip(torch.optim.SGD([outer], 1.0), schedule=schedule)
    for grad in (1 - 1e-8, 3e-3, float("inf"), 1.0):
        for p, optimizer in ((inner, plain), (outer, gossip)):
            p.grad = torch.full_like(p, grad)
            optimizer.step()
        assert torch.equal(inner, outer)


def test_flights_die_with_their_steps():
    gc.collect()
    gc.disable()
    try:
        for left in run_workers(failing_workers.flights_left, 2):
            assert left[0] == left[1], left
        p = parameter()
        steps(GossipSGD([p], 0.1), p, 5)
        assert not [thing for thing in gc.get_objects() if type(thing) is Flight]
    finally:
        gc.enable()


def test_layers_of_former_releases_are_not_lost_in_silence():
    with pytest.raises(ValueError, match="lars=0.01 in a parameter group needs the layer"):
        GossipSGD([{"params": [parameter()], "lars": 0.01}])
    GossipSGD([{"params": [parameter()], "lars": None}])
    old = GossipSGD([parameter()], 0.1, layers=[SlowMo(3)]).state_dict()
    for group in old["param_groups"]:
        group["slowmo"] = group.pop("layers")
    GossipSGD([parameter()], 0.1, layers=[SlowMo(3)]).load_state_dict(old)
    with pytest.raises(ValueError, match="of layers 'SlowMo"):
        GossipSGD([parameter()], 0.1).load_state_dict(old)
    old = GossipSGD([parameter()], 0.1, layers=[Lars(0.1)]).state_dict()
    with pytest.raises(ValueError, match=r"the checkpoint is of LARS: build with layers=\[Lars\(0.1\)\]"):
        GossipSGD([parameter()], 0.1).load_state_dict(old)


def test_a_layer_is_known_by_its_values():
    """Not by its address, which differs from rank to rank and from run to run."""

    class Mine(Layer):
        state = {"mine": "x"}

        def __init__(self, strength):
            self.strength = strength

    saved = GossipSGD([parameter()], 0.1, layers=[Mine(2)]).state_dict()
    assert saved["param_groups"][0]["layers"] == "Mine(strength=2)"
    GossipSGD([parameter()], 0.1, layers=[Mine(2)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="of layers"):
        GossipSGD([parameter()], 0.1, layers=[Mine(3)]).load_state_dict(saved)
