"""Promises of torch's world between a loss and the next step: a script has the rank and size of before, and every
collective raises ExchangeError that says what to do, at once."""

import sys
import warnings

import pytest
import torch
import torch.distributed as dist

from fused_dlam import ExchangeError
from fused_dlam.comm import between


@pytest.fixture
def world():
    assert not dist.is_initialized()
    between.enter(2, 5)
    yield
    between.leave()
    assert not dist.is_initialized() and not between.stands()


ONE, FIVE = torch.ones(1), torch.ones(5)
CALLS = {
    "all_reduce": lambda: dist.all_reduce(torch.ones(2)),
    "barrier": dist.barrier,
    "broadcast": lambda: dist.broadcast(ONE, 0),
    "broadcast_object_list": lambda: dist.broadcast_object_list([1], 0),
    "all_gather": lambda: dist.all_gather([torch.ones(1)] * 5, ONE),
    "all_gather_object": lambda: dist.all_gather_object([None] * 5, 3),
    "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(FIVE, ONE),
    "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(ONE, FIVE),
    "all_to_all_single": lambda: dist.all_to_all_single(FIVE, FIVE.clone()),
    "send": lambda: dist.send(ONE, 1),
    "irecv": lambda: dist.irecv(ONE, 1),
    "new_group": lambda: dist.new_group([0, 2]),
    "new_group over gloo": lambda: dist.new_group([0, 2], backend="gloo"),
}


def test_a_script_has_the_rank_of_before(world):
    assert (dist.get_rank(), dist.get_world_size(), between.stands()) == (2, 5, True)


@pytest.mark.parametrize("call", CALLS)
def test_it_carries_nothing(world, call):
    with warnings.catch_warnings(), pytest.raises(ExchangeError, match="workers were lost.*next step.*optimizer.mean"):
        warnings.simplefilter("ignore")  # newer names of torch's
        CALLS[call]()


def test_a_real_world_is_not_touched_and_excepthook_stays():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    hook = sys.excepthook
    try:
        assert not between.stands()
        between.leave()
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()
    between.enter(0, 2)
    assert sys.excepthook is hook
    dist.destroy_process_group()  # a script may
    assert not between.stands()
