"""Problems and configurations for torch's own tests of optimizers. Without expecttest they are skipped."""

import copy
import inspect

import pytest
import torch
from torch import nn

from fused_dlam import GossipSGD

pytest.importorskip("expecttest")
common = pytest.importorskip("torch.testing._internal.common_optimizers")

METHODS = ("dmsgd", "decentlam", "pmsgd", "qg-dmsgd", "dsgd", "da-dmsgd")


def inputs(device, dtype=None):
    """torch's configurations of SGD that `GossipSGD` has arguments for, and one for each method."""
    has, ours = inspect.signature(GossipSGD.__init__).parameters, []
    for given in common.optim_inputs_func_sgd(device, dtype):
        if given.kwargs.pop("nesterov", False):
            given.kwargs["method"] = "nesterov-pc-dmsgd"
        if all(name in has for name in given.kwargs):
            ours.append(given)
    return ours + [common.OptimizerInput(params=None, kwargs={"method": m}, desc=m) for m in METHODS]


db = [
    common.OptimizerInfo(
        GossipSGD,
        optim_inputs_func=inputs,
        optim_error_inputs_func=common.optim_error_inputs_func_sgd,
        supported_impls=("fused",),
        supports_fused_on=("cpu", "cuda"),
    )
]
in_float32 = common.optims(db, dtypes=[torch.float32])


def configurations(device, dtype, info):
    for one in common._get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info):
        yield copy.deepcopy(one.kwargs)


class Problem:
    """|W v + b|^2 over two parameters, contiguous or not, named or not."""

    def __init__(self, device, dtype, contiguous=True, named=False):
        shapes = ((10, 5), (10,)) if contiguous else ((10, 5, 2), (10, 2))
        whole = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        self.params = [nn.Parameter(w if contiguous else w[..., 0]) for w in whole]
        self.v = torch.randn(5, device=device, dtype=dtype)
        self.named = [(f"name{i}", p) for i, p in enumerate(self.params)] if named else self.params

    def loss(self):
        weight, bias = self.params
        return (weight.mv(self.v) + bias).square().sum()

    def closure(self, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    def twin(self, named=False):
        other = copy.copy(self)
        other.params = [nn.Parameter(p.detach().clone()) for p in self.params]
        other.named = [(f"name{i}", p) for i, p in enumerate(other.params)] if named else other.params
        return other


def run(problem, optimizer, schedulers=(), steps=20):
    """Steps, by a closure and by hand in turn; returns whether the loss fell."""
    first = problem.loss().item()
    for step in range(steps):
        loss = optimizer.step(problem.closure(optimizer)) if step % 2 else problem.closure(optimizer)()
        if not step % 2:
            optimizer.step()
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([loss.detach()] if plateau else []))
    return problem.loss().item() < first


def add_entry(optimizer):
    optimizer.state["test"] = 1


def take_entry(optimizer, state_dict):
    state_dict["found"] = state_dict["state"].pop("test", None)
    return state_dict


def names_of(tests):
    """The names of a class's tests, as torch's test_optim.py has them."""
    return {name.removeprefix("test_") for name in vars(tests) if name.startswith("test_")}
