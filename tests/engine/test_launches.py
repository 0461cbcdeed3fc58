"""Promise: how many kernels a step launches, for each launch costs the host 5 to 30 us and a small one costs the GPU 2.

    ATC             two per bucket (pack, combine), AWC one, also with messages or parameters of another type
    8-bit messages  two more per bucket
    one worker      one per bucket, and one bucket per group, type and device, on no stream of its own
    gradients       one more per bucket where autograd made them anew, none after zero_grad(set_to_none=False)
    transport       one operation of NCCL per bucket
    header          one small copy to the device, and one to the host per neighbor (header.py)
    averaged        gradients, or those that LARS scales, are copied beside: one more per bucket
    scalars         nothing while they stay, one copy per group and device when they change
    LARS, clipping  a fixed number per bucket, however many parameters are in it

Counted on fake GPUs (`fake_cuda`) in the sixth step, in which nothing is allocated either: a Triton kernel or an
operation of torch is one launch, an operation on a list of tensors as many as torch makes of it.
"""

import functools
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from everyday import everyday
from fake_training import RESNET_50, training
from fake_where import ours
from test_host_waits import MACHINES, gossip, gossip_sgd, schedule, two_groups

from fused_dlam.layers import Lars

BF16 = torch.bfloat16
BUCKETS = 4


class Count(NamedTuple):
    buckets: int
    triton: int
    other: int  # operations of torch that the package calls
    names: Counter  # of those
    collected: int  # gradients' copies among them
    nccl: int
    copies: int  # between host and device

    @property
    def kernels(self) -> int:
        return self.triton + self.other


def counted(run) -> Count:
    kinds, names = Counter(), Counter()
    for launch in run.machine.launches:
        if ours(launch.where):
            kinds[launch.kind] += launch.count
            if launch.kind == "kernel":
                names[f"{launch.what} {launch.where}"] += launch.count
    collected = sum(n for name, n in names.items() if name.startswith("_foreach_copy_ gathering.py"))
    buckets = len(run.optimizer._engine.buckets)
    return Count(buckets, kinds["triton"], kinds["kernel"], names, collected, kinds["nccl"], kinds["copy"])


def count(make, *, each=None, warm=5, **options) -> Count:
    """What the package launches in the step after `warm` others, `zero_grad` and hooks included."""
    with training(make, **options) as run:
        for k in range(warm + 1):
            run.machine.launches.clear()
            if each is not None:
                each(run, k)
            run.training.step()
        return counted(run)


MODES = {
    # name: (optimizer, options, Triton kernels per bucket)
    "atc": (gossip_sgd(), {}, 2),
    "atc, overlap=False": (gossip_sgd(overlap=False), {}, 2),
    "atc, overlap=True": (gossip_sgd(overlap=True), {}, 2),
    "atc, bf16 messages": (gossip_sgd(comm_dtype=BF16), {}, 2),
    "atc, 8-bit messages": (gossip_sgd(compress="int8"), {}, 4),
    "awc, 8-bit messages, bf16 parameters": (gossip_sgd(schedule="awc", compress="int8"), dict(dtype=BF16), 3),
    "atc, bf16 parameters": (gossip_sgd(), dict(dtype=BF16), 2),
    "atc, bf16 parameters and messages": (gossip_sgd(comm_dtype=BF16), dict(dtype=BF16), 2),
    "atc, nesterov, weight decay": (gossip_sgd(method="nesterov-dmsgd", weight_decay=0.1), {}, 2),
    "atc, two messages": (gossip_sgd(method="da-dmsgd"), {}, 2),
    "atc, exponential graph": (gossip_sgd(method="dmsgd", topology="exponential"), dict(ranks=8), 2),
    "midpoint": (gossip_sgd(method="mi-dmsgd"), {}, 2),
    "midpoint, bf16 parameters": (gossip_sgd(method="mi-dmsgd"), dict(dtype=BF16), 2),
    "awc": (gossip_sgd(schedule="awc"), {}, 1),
    "awc, bf16 messages": (gossip_sgd(schedule="awc", comm_dtype=BF16), {}, 1),
    "awc, bf16 parameters": (gossip_sgd(schedule="awc"), dict(dtype=BF16), 1),
    "awc, bf16 parameters and messages": (gossip_sgd(schedule="awc", comm_dtype=BF16), dict(dtype=BF16), 1),
}


KINDS = ("atc", "atc, bf16 parameters and messages", "atc, two messages", "atc, exponential graph", "midpoint", "awc",
         "awc, bf16 messages", "atc, 8-bit messages")  # fmt: skip


@pytest.mark.parametrize("mode", everyday(MODES, KINDS))
def test_kernels_of_a_bucket(mode):
    kernels, (n, _) = MODES[mode][2], watched(mode)[5]
    assert n.buckets == BUCKETS
    assert n.triton == kernels * BUCKETS
    assert n.other == n.collected == BUCKETS, n.names
    assert n.nccl == BUCKETS
    assert n.copies == (4 if "exponential" in mode else 2), "its own header, and its neighbors'"


@pytest.mark.parametrize("mode", everyday(MODES, KINDS))
def test_gradients_that_stay_in_their_views_are_collected_by_nothing(mode):
    make, options, kernels = MODES[mode]
    n = count(make, to_none=False, **options)
    assert n.triton == kernels * BUCKETS
    assert set(name.split()[0] for name in n.names) == {"zero_"}, n.names  # zero_grad's one write per bucket
    assert n.other == BUCKETS


@functools.cache
def watched(mode):
    """(what is launched, what memory the package makes) in each of twelve steps."""
    make, options, _ = MODES[mode]
    out = []
    with training(make, **options) as run:
        for _ in range(12):
            run.machine.launches.clear()
            before = len(run.machine.memories)
            run.training.step()
            out.append((counted(run), [memory for memory in run.machine.memories[before:] if ours(memory.label)]))
    return out


@pytest.mark.parametrize("mode", everyday(MODES, KINDS))
def test_the_device_allocates_nothing_in_a_step(mode):
    """Gradients apart, which are the script's. What the host pins for headers it gives back."""
    _, made = watched(mode)[5]
    assert {memory.label.split(":")[0] for memory in made} <= {"header.py", "hearing.py"}, made
    assert all(memory.pinned for memory in made if memory.label.startswith("hearing"))
    assert not any(memory.device.type == "cuda" for memory in made)


@pytest.mark.parametrize("mode", everyday(MODES, KINDS))
def test_steps_that_watch_values_cost_launches_and_are_rare(mode):
    """Steps 0 to 2, 4, 8, 16, ...: gradients are checked and, where messages may leave early, fingerprints compared."""
    launched = [n.other for n, _ in watched(mode)]
    assert [k for k, n in enumerate(launched) if n > launched[5]] == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_one_worker_launches_one_kernel_and_makes_one_bucket_and_no_stream(dtype):
    with training(gossip_sgd(bucket_mb=None), ranks=1, dtype=dtype) as run:
        run.training.step()
        assert run.machine.streams.extra == []
    n = count(gossip_sgd(bucket_mb=None), ranks=1, dtype=dtype)
    assert (n.buckets, n.triton, n.other, n.collected, n.nccl, n.copies) == (1, 1, 1, 1, 0, 0)


def test_one_worker_makes_one_bucket_per_group_type_and_device():
    def make(params):
        return two_groups(bucket_mb=None)([*params, *(torch.nn.Parameter(p.detach().bfloat16()) for p in params)])

    with training(make, ranks=1, devices=("cuda:0", "cuda:1")) as run:
        kinds = {(b.group, b.x.device, str(b.g.dtype)) for b in run.optimizer._engine.buckets}
        assert len(run.optimizer._engine.buckets) == len(kinds) == 2 * 2 * 2
        assert run.machine.streams.extra == []


def test_a_lane_per_device_of_high_priority_and_so_is_what_nccl_sends_on():
    with training(gossip_sgd(), devices=("cuda:0", "cuda:1")) as run:
        assert [s.device.index for s in run.machine.streams.extra] in ([0, 1], [1, 0])
        assert all(s.priority < 0 for s in run.machine.streams.extra)
        assert run.network.options and all(o.is_high_priority_stream for o in run.network.options)


def test_scalars_that_change_are_one_copy_per_group_and_device():
    headers = 2
    assert count(gossip_sgd(), each=schedule).copies - headers == 1
    assert count(gossip_sgd(method="decentlam", topology="ring"), each=schedule).copies - headers == 1
    assert count(two_groups(), each=schedule).copies - headers == 2
    assert count(gossip_sgd(), each=schedule, devices=("cuda:0", "cuda:1")).copies - headers == 2


def test_a_parameter_without_a_gradient_costs_what_its_runs_cost():
    """Two runs of a bucket that take a step, one between them that is only averaged, by operations of torch."""
    n = count(gossip_sgd(bucket_mb=1.0), absent=(4,))
    assert n.buckets == 1
    assert n.triton <= 6
    assert n.other <= 1 + 40, n.names


LAYERS = {
    # name: (optimizer, options, kernels of a step with one bucket at most)
    "lars": (gossip_sgd(layers=[Lars(0.01)], weight_decay=1e-4, bucket_mb=1.0), {}, 36),
    "lars, bf16 parameters": (gossip_sgd(layers=[Lars(0.01)], weight_decay=1e-4, bucket_mb=1.0), dict(dtype=BF16), 38),
    "lars, missing gradients": (gossip_sgd(layers=[Lars(0.01)], bucket_mb=1.0), dict(absent=(3, 7)), 115),
    "lars, one worker": (gossip_sgd(layers=[Lars(0.01)], weight_decay=1e-4, bucket_mb=None), dict(ranks=1), 36),
    "max_grad_norm": (gossip_sgd(max_grad_norm=1.0, bucket_mb=1.0), {}, 20),
    "lars, max_grad_norm": (gossip_sgd(layers=[Lars(0.01)], max_grad_norm=1.0, bucket_mb=1.0), {}, 46),
}


@pytest.mark.parametrize("layer", everyday(LAYERS, ("lars, bf16 parameters",)))
def test_launches_do_not_grow_with_the_number_of_parameters(layer):
    """ResNet-50's 161 parameters against 20 of them. Lists of more than 64 or 110 tensors take torch a launch more."""
    make, options, most = LAYERS[layer]
    few, many = (count(make, shapes=shapes, warm=3, **options) for shapes in (RESNET_50[:20], RESNET_50))
    assert few.buckets == many.buckets == 1
    longer = sum(n - few.names[name] for name, n in many.names.items() if name.startswith("_foreach"))
    assert longer <= 6
    assert many.kernels - longer == few.kernels, many.names - few.names
    assert few.kernels <= most, few.names


def test_clipping_costs_a_few_launches_per_bucket():
    plain, clipped = count(gossip_sgd()), count(gossip_sgd(max_grad_norm=1.0))
    assert clipped.triton == plain.triton
    assert clipped.other - plain.other <= 4 * BUCKETS + 12, clipped.names
    assert clipped.copies - plain.copies <= 1  # the coefficient is on the device, beside the other scalars


def test_averaged_gradients_cost_an_all_reduce_and_their_flags():
    n = count(gossip_sgd(method="pmsgd"))
    assert (n.triton, n.nccl, n.copies) == (BUCKETS, BUCKETS, 0)
    assert n.other <= 4 * BUCKETS, n.names  # collected, copied beside, flags raised, flags lowered


def test_machines_average_gather_and_gossip():
    n = count(gossip_sgd(hierarchical=True), **MACHINES)
    assert (n.triton, n.nccl, n.copies) == (2 * BUCKETS, 3 * BUCKETS, 1)  # nobody reads headers that are in parts
    assert n.other <= 5 * BUCKETS, n.names  # those, and the shard that is gathered is copied


@pytest.mark.parametrize("schedule", ["atc", "awc"])
def test_gossip_adds_two_kernels_per_bucket_to_the_inner_optimizer(schedule):
    """What is sent is a copy of x (awc), or packed (atc); the inner optimizer's own launches are left out."""
    n = count(gossip(schedule=schedule))
    added = {name: times for name, times in n.names.items() if " of_inner.py" not in name}
    assert n.triton + sum(added.values()) <= 2 * BUCKETS, added
    assert n.nccl == BUCKETS


def test_the_count_sees_what_is_launched():
    """The torch passes launch one kernel per operation, and the inner optimizer's launches are not the package's."""
    n = count(gossip_sgd(fused=False))
    assert n.triton == 0 and n.other > 6 * BUCKETS
    with training(gossip_sgd()) as run:
        run.training.step()
        assert any(not ours(launch.where) for launch in run.machine.launches)
