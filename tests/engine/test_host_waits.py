"""Promise: from the third step on nothing in a step makes the host wait for a GPU, whatever the options.

A host that waits cannot launch the next layer's kernels, and the GPU runs dry: 60 us or more each time, and in the
backward pass the overlap is gone. Counted on fake GPUs (`fake_cuda`), with the line that waits: numbers and shapes that
come from a device, copies that are not from or to pinned memory with non_blocking=True, synchronizations. What waits by
design is listed with its reason.
"""

from functools import partial
from unittest import mock

import pytest
import torch
from everyday import everyday
from fake_cuda import Machine
from fake_training import BUCKET_MB, training
from fake_where import ours
from layers_of_users import spaced

import fused_dlam
from fused_dlam.comm.place import Layout
from fused_dlam.layers import Lars, SlowMo

BF16 = torch.bfloat16
MACHINES = dict(ranks=4, machine_ranks=2)


def gossip_sgd(**options):
    options = {"lr": 0.05, "bucket_mb": BUCKET_MB, "hierarchical": False} | options
    return lambda params: fused_dlam.GossipSGD(params, **options)


def gossip(**options):
    options = {"bucket_mb": BUCKET_MB, "hierarchical": False} | options
    return lambda params: fused_dlam.Gossip(torch.optim.SGD(params, lr=0.05, momentum=0.9), **options)


def lr_on_device(**options):
    def make(params):
        return gossip_sgd(lr=torch.tensor(0.05, device=params[0].device), **options)(params)

    return make


def two_groups(**options):
    def make(params):
        groups = [
            dict(params=[p for p in params if p.dim() > 1], weight_decay=0.1),
            dict(params=[p for p in params if p.dim() == 1], weight_decay=0.0),
        ]
        return gossip_sgd(**options)(groups)

    return make


def waits_of(make, *, steps=5, first=2, each=None, **options) -> list[str]:
    """What made the host wait in the package, from step `first` on."""
    with training(make, **options) as run:
        for k in range(steps):
            if k == first:
                run.machine.waits.clear()
            if each is not None:
                each(run, k)
            run.training.step()
        assert not run.machine.faults, run.machine.faults
        return [f"{wait.where}: {wait.what}" for wait in run.machine.waits if wait.thread != "fused_dlam-courier"]


def schedule(run, k):
    for group in run.optimizer.param_groups:
        group["lr"] = 0.05 / (k + 1)


def other_gradients_missing(run, k):
    run.training.absent = (k % 3, 5)


def with_lookout(**options):
    """As on_failure="continue" has it over NCCL."""

    def make(params):
        connect = Layout.connect

        def watched(where, everything, timeout, warn, what, name, lookout):
            return connect(where, everything, timeout, warn, what, name, lambda: "")

        with mock.patch.object(Layout, "connect", watched):
            return gossip_sgd(**options)(params)

    return make


BOTH = dict(config="cpu:gloo,cuda:nccl")
MODES = {
    "atc": (gossip_sgd(), {}),
    "atc, overlap=False": (gossip_sgd(overlap=False), {}),
    "atc, overlap=True": (gossip_sgd(overlap=True), {}),
    "atc, torch passes": (gossip_sgd(fused=False), {}),
    "atc, zero_grad(set_to_none=False)": (gossip_sgd(), dict(to_none=False)),
    "atc, bf16 messages": (gossip_sgd(comm_dtype=BF16), {}),
    "atc, 8-bit messages": (gossip_sgd(compress="int8"), {}),
    "awc, 4-bit messages": (gossip_sgd(schedule="awc", compress="int4"), {}),
    "atc, bf16 parameters": (gossip_sgd(), dict(dtype=BF16)),
    "atc, missing gradients": (gossip_sgd(), dict(absent=(2, 5))),
    "atc, other gradients missing in every step": (gossip_sgd(), dict(each=other_gradients_missing)),
    "midpoint": (gossip_sgd(method="mi-dmsgd"), {}),
    "spikes": (gossip_sgd(clip="spikes"), {}),
    "spikes, missing gradients": (gossip_sgd(method="mi-dmsgd", clip="spikes"), dict(absent=(2, 5))),
    "spikes, machines": (gossip_sgd(clip="spikes", hierarchical=True), MACHINES),
    "awc, spikes": (gossip_sgd(schedule="awc", clip="spikes"), {}),
    "awc": (gossip_sgd(schedule="awc"), {}),
    "awc, zero_grad(set_to_none=False)": (gossip_sgd(schedule="awc"), dict(to_none=False)),
    "awc, bf16 messages": (gossip_sgd(schedule="awc", comm_dtype=BF16), {}),
    "awc, bf16 parameters": (gossip_sgd(schedule="awc"), dict(dtype=BF16)),
    "awc, missing gradients": (gossip_sgd(schedule="awc"), dict(absent=(2, 5))),
    "a learning rate schedule": (gossip_sgd(), dict(each=schedule)),
    "lr on the device": (lr_on_device(), {}),
    "lr on the device, mi-dmsgd": (lr_on_device(method="mi-dmsgd", clip="spikes"), {}),
    "lr on the device, lars": (lr_on_device(layers=[Lars(0.01)]), {}),
    "lr on the device, slowmo": (lr_on_device(layers=[SlowMo(2)]), {}),
    "nesterov": (gossip_sgd(method="nesterov-pc-dmsgd"), {}),
    "groups of weight decay": (two_groups(), {}),
    "max_grad_norm": (gossip_sgd(max_grad_norm=1.0), {}),
    "max_grad_norm, missing gradients": (gossip_sgd(max_grad_norm=1.0), dict(absent=(2, 5))),
    "max_grad_norm, machines": (gossip_sgd(max_grad_norm=1.0, hierarchical=True), MACHINES),
    "lars": (gossip_sgd(layers=[Lars(0.01)], weight_decay=1e-4), {}),
    "lars, bf16 parameters": (gossip_sgd(layers=[Lars(0.01)], weight_decay=1e-4), dict(dtype=BF16)),
    "lars, missing gradients": (gossip_sgd(layers=[Lars(0.01)]), dict(absent=(2, 5))),
    "lars, max_grad_norm": (gossip_sgd(layers=[Lars(0.01)], max_grad_norm=1.0), {}),
    "slowmo": (gossip_sgd(layers=[SlowMo(2)]), {}),
    "pmsgd": (gossip_sgd(method="pmsgd"), {}),
    "global averages": (gossip_sgd(topology=partial(spaced, exact=2)), dict(ranks=4)),
    "machines": (gossip_sgd(hierarchical=True), MACHINES),
    "machines, awc": (gossip_sgd(hierarchical=True, schedule="awc"), MACHINES),
    "two devices": (gossip_sgd(), dict(devices=("cuda:0", "cuda:1"), threads=True)),
    "Gossip": (gossip(), {}),
    "Gossip, midpoint": (gossip(schedule="midpoint"), {}),
    "Gossip, awc": (gossip(schedule="awc"), {}),
    "Gossip, machines": (gossip(hierarchical=True), MACHINES),
    "one worker": (gossip_sgd(), dict(ranks=1)),
    "one worker, lars, max_grad_norm": (gossip_sgd(layers=[Lars(0.01)], max_grad_norm=1.0), dict(ranks=1)),
    "one worker, missing gradients": (gossip_sgd(), dict(ranks=1, absent=(2, 5))),
    # Messages pass through the host, but it is the courier that waits for the device, not who trains.
    "messages through the host": (gossip_sgd(), dict(config="cpu:gloo,cuda:gloo", name="gloo")),
    "messages through the host, awc": (gossip_sgd(schedule="awc"), dict(config="cpu:gloo,cuda:gloo", name="gloo")),
}
LOST = "over NCCL, what a lost worker never sent must not be combined: the host waits for each of four messages"
# Lines that wait by design, how often in three steps, and why.
BY_DESIGN = {
    "on_failure='continue'": (with_lookout(), BOTH, ("streams.py", 12), LOST),
    "on_failure='continue', awc": (with_lookout(schedule="awc"), BOTH, ("streams.py", 12), LOST),
    "on_failure='continue', machines": (
        with_lookout(hierarchical=True),
        BOTH | MACHINES,
        ("streams.py", 36),
        LOST + ", and for what a machine's ranks average before it and gather after it",
    ),
    "several workers and a scaler": (
        gossip_sgd(),
        dict(scaler=True),
        ("mixed_precision.py", 3),
        "whether a step is skipped decides on the host what is packed; torch's scaler waits here, too",
    ),
    "a number on the device and passes of torch": (
        lr_on_device(fused=False),
        {},
        ("scalars.py", 3),
        "their scalars are arguments of torch's operations: numbers on the host, read back once per step",
    ),
    "max_grad_norm and passes of torch": (
        gossip_sgd(max_grad_norm=1.0, fused=False),
        {},
        ("scalars.py", 3),
        "the same, for the clipping coefficient",
    ),
    "pmsgd where this rank misses a gradient": (
        gossip_sgd(method="pmsgd"),
        dict(absent=(2,)),
        ("buckets.py", 3),
        "which parameters step is what any rank has a gradient for, and decides what is launched; one bucket has one",
    ),
}


KINDS = ("atc", "atc, torch passes", "atc, bf16 parameters", "atc, other gradients missing in every step",
         "awc, bf16 messages", "awc, missing gradients", "lr on the device, slowmo", "groups of weight decay",
         "midpoint", "spikes, missing gradients", "lr on the device, mi-dmsgd", "Gossip, midpoint",
         "max_grad_norm, machines", "lars, bf16 parameters", "pmsgd", "global averages", "machines, awc", "two devices",
         "Gossip, awc", "one worker", "messages through the host")  # fmt: skip


@pytest.mark.parametrize("mode", everyday(MODES, KINDS))
def test_no_step_waits_for_the_device(mode):
    make, options = MODES[mode]
    assert waits_of(make, **options) == []


@pytest.mark.parametrize("mode", BY_DESIGN)
def test_what_waits_by_design_waits_once_a_step_and_nowhere_else(mode):
    make, options, (file, count), reason = BY_DESIGN[mode]
    waits = waits_of(make, **options)
    assert [wait.split(":")[0] for wait in waits] == [file] * count, (reason, waits)


@pytest.mark.parametrize(
    "options", [{}, dict(layers=[Lars(0.01)]), dict(max_grad_norm=1.0), dict(method="adam")], ids=str
)
def test_one_worker_reads_found_inf_on_the_device(options):
    """The first step alone may wait: what a rule remembers of its scalars has no earlier value to go back to."""
    assert waits_of(gossip_sgd(**options), ranks=1, scaler=True, first=1) == []
    assert waits_of(gossip_sgd(**options), ranks=1, scaler=True, first=1, each=schedule) == []


# -- the measure itself ----------------------------------------------------------------------------------------------


CONTROLS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0]),
    "float": lambda x: float(x[0]),
    "cpu": lambda x: x.cpu(),
    "to the host without a wait, but pageable": lambda x: torch.empty(8).copy_(x, non_blocking=True),
    "to pinned memory, with a wait": lambda x: torch.empty(8, pin_memory=True).copy_(x),
    "a list": lambda x: torch.tensor([1.0, 2.0], device="cuda:0"),
    "a list into a slice": lambda x: x.__setitem__(slice(2, 4), torch.tensor([True, False])),
    "pinned memory, with a wait": lambda x: torch.ones(8).pin_memory().to("cuda:0"),
    "a number on the host": lambda x: x[0].copy_(torch.tensor(1.0)),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "writing through a mask": lambda x: x.__setitem__(x > 0, torch.zeros(3, device="cuda:0")),
    "equal": lambda x: torch.equal(x, x),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
    "device": lambda x: torch.cuda.synchronize(),
}
FREE = {
    "pinned memory": lambda x: x.copy_(torch.ones(8).pin_memory(), non_blocking=True),
    "to pinned memory": lambda x: torch.empty(8, pin_memory=True).copy_(x, non_blocking=True),
    "a Python number": lambda x: x.__setitem__(slice(2, 4), 1.0),
    "a number of the host as an operand": lambda x: x.mul_(torch.tensor(2.0)),
    "shapes": lambda x: x.numel() + len(x) + x.data_ptr(),
    "device to device": lambda x: x.to("cuda:1"),
    "events": lambda x: torch.cuda.Stream().wait_event(torch.cuda.current_stream().record_event()),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_what_waits_is_found_with_its_line(control):
    with Machine() as machine:
        x = torch.zeros(8, device="cuda:0")
        machine.waits.clear()
        try:
            CONTROLS[control](x)
        except AssertionError as error:
            assert "shape depends on values" in str(error)
        assert machine.waits
        assert machine.waits[0].where.startswith("test_host_waits.py:") and not ours(machine.waits[0].where)


@pytest.mark.parametrize("control", FREE)
def test_what_does_not_wait_is_let_through(control):
    with Machine() as machine:
        x = torch.zeros(8, device="cuda:0")
        machine.waits.clear()
        FREE[control](x)
        assert not machine.waits
