"""What worker processes run in the tests of `averaged`: four workers, or two machines of two."""

import copy
import logging
from unittest import mock

import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel
from workers import machines_of

import fused_dlam
from fused_dlam.optim.averaged import Averaged

HALF = (torch.float16, torch.bfloat16)


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def logged(fn):
    """What `fn` returns, and the lines that the package logs meanwhile."""
    handler, logger = Lines(), logging.getLogger("fused_dlam")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return fn(), handler.lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def buffers(k):
    """A model with buffers of every layout and type; k times something, whose mean over k = 1 to 4 is 2.5 of it."""
    base = torch.arange(1.0, 25.0).reshape(2, 3, 2, 2)
    model = torch.nn.Linear(3, 2)
    twice = k * torch.ones(3)
    memory = k * torch.arange(1.0, 7.0)
    for name, buffer in {
        "plain": k * base,
        "transposed": (k * base).transpose(0, 3),
        "strided": (k * torch.arange(1.0, 13.0))[::3],
        "channels_last": (k * base).to(memory_format=torch.channels_last),
        "expanded": (k * torch.arange(1.0, 4.0))[:, None].expand(3, 5),
        "expanded_scalar": torch.tensor(float(k)).expand(4),
        "windows": memory.unfold(0, 3, 1),  # each element up to three times
        "float16": torch.full((3,), 28672.0 + 32 * k, dtype=torch.float16),  # a sum of four overflows
        "brain16": torch.full((3,), float(k), dtype=torch.bfloat16),
        "float64": k * base.double(),
        "complex": k * torch.complex(base, -base),
        "conjugated": (k * torch.complex(base, base)).conj(),
        "empty": torch.zeros(0, 3),
        "zero_dim": torch.tensor(float(k)),
        "counter": torch.tensor(7),
        "once": twice,
        "again": twice,
        "same_memory": twice.view(3),
        "float8": torch.full((4,), float(k)).to(torch.float8_e4m3fn),
        "sparse": torch.sparse_coo_tensor([[0, 2]], [float(k), 1.0], (3,)),
    }.items():
        model.register_buffer(name, buffer)
    return model


def dense(t):
    """A plain copy; of float8, which cannot be sent to another process, in float32."""
    if t.is_sparse:
        return t.to_dense().clone()
    return torch.empty(t.shape, dtype=torch.float32 if t.dtype == torch.float8_e4m3fn else t.dtype).copy_(t)


def everything(model):
    """Copies of all parameters and buffers, by name."""
    return {name: dense(t.detach()) for name, t in (*model.named_parameters(), *model.named_buffers())}


def layouts(rank):
    """(before, inside, after, layouts unchanged, log) of the model above."""
    model = buffers(rank + 1)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank + 1.0)
    before, strides = everything(model), [t.stride() for t in model.buffers() if not t.is_sparse]

    def twice():
        for _ in range(2):
            with optimizer.averaged(model):
                inside = everything(model)
        return inside

    inside, log = logged(twice)
    return before, inside, everything(model), strides == [t.stride() for t in model.buffers() if not t.is_sparse], log


def equal(rank):
    """Frozen parameters and buffers before and within it, on three of the ranks."""
    group = dist.new_group([0, 1, 2])
    if rank == 3:
        return None
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(31, 33), torch.nn.BatchNorm1d(33), torch.nn.Linear(33, 3))
    model[0].requires_grad_(False)
    model[1].running_var.copy_(torch.rand(33) * 1e-30)
    model.register_buffer("short", torch.randn(999).bfloat16())
    model.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))
    model.register_buffer("waves", torch.randn(99, dtype=torch.complex64))
    optimizer = fused_dlam.GossipSGD([*model[1].parameters(), *model[2].parameters()], lr=0.1, group=group)
    beside = [name for name in everything(model) if name not in ("1.weight", "1.bias", "2.weight", "2.bias")]
    own = everything(model)
    with optimizer.averaged(model):
        inside = everything(model)
    return [{name: values[name] for name in beside} for values in (own, inside)]


def sick(rank):
    """(parameters within it, log): rank 1's have a NaN, and all have an infinity of their own; a layer is nobody's."""
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    optimizer = fused_dlam.GossipSGD(model[0].parameters(), lr=0.1)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([float("nan") if rank == 1 else float(rank), float("inf")]))

    def inside():
        with optimizer.averaged(model):
            return model[0].bias.tolist()

    return logged(inside)


def same(a, b):
    """Bit for bit, NaN included."""
    return all(
        torch.equal(a[k].contiguous().reshape(-1).view(torch.uint8), b[k].contiguous().reshape(-1).view(torch.uint8))
        for k in a
    )


def failures(rank, dtype):
    """Averaging breaks at the k-th mean, on all ranks, for every k: (everything back bit for bit, trained on) each."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2)).to(dtype)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1, bucket_mb=1e-6)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.add_(rank)
        model[1].running_var[0] = float("nan")
    before, workers, found = everything(model), optimizer._engine.place.workers, []
    for k in range(len(optimizer._engine.buckets) + 2):
        calls = iter(range(k))

        def mean(tensor, step=None, calls=calls):
            tensor.fill_(99.0)  # what a transport leaves behind that fails half-way
            if next(calls, None) is None:
                raise fused_dlam.ExchangeError("the line is cut")

        raised = False
        with mock.patch.object(workers, "mean", mean):
            try:
                with optimizer.averaged(model):
                    pass
            except fused_dlam.ExchangeError:
                raised = True
        found.append(raised and same(before, everything(model)) and not optimizer._averaging)
    return found


def body(rank):
    """Bodies that raise, and one after which a buffer cannot be written back: the error comes, all else is back."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.add_(rank)
    before, found = everything(model), []

    write = Averaged.write
    calls = iter([RuntimeError("one buffer cannot be written back")])

    def failing(self, values):
        for error in calls:
            raise error
        write(self, values)

    def harm():
        Averaged.write = failing

    def overwrite():
        with torch.no_grad():
            for t in model.state_dict().values():
                t.fill_(-1)
        raise ZeroDivisionError

    def interrupt():
        raise KeyboardInterrupt

    for fn, error in ((overwrite, ZeroDivisionError), (interrupt, KeyboardInterrupt), (harm, RuntimeError)):
        try:
            with optimizer.averaged(model):
                fn()
        except error:
            now = everything(model)
            lost = ("tracked", "running_var") if fn is harm else ("tracked",)
            found.append(same({k: v for k, v in before.items() if not k.endswith(lost)}, now))
        finally:
            Averaged.write = write
    return found


def ema(rank):
    """(inside, after, log) of an EMA that was updated on every worker, and what it was; parameters inside."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    average = AveragedModel(model, use_buffers=True)
    with torch.no_grad():
        for t in average.module.state_dict().values():
            t.fill_(rank)
        for p in model.parameters():
            p.fill_(10.0 * rank)
    before = everything(average)

    def evaluate():
        with optimizer.averaged(average):
            return everything(average), everything(model)

    (inside, trained), log = logged(evaluate)
    _, again = logged(evaluate)
    return before, inside, everything(average), trained, log, again


def not_exchanged(rank):
    """Inside: a frozen layer, a layer that replaced the optimizer's, and one that the optimizer never had."""
    model = torch.nn.ModuleDict({k: torch.nn.Linear(2, 2) for k in ("frozen", "trained", "replaced", "apart")})
    model["frozen"].requires_grad_(False)
    optimizer = fused_dlam.GossipSGD([p for k in ("frozen", "trained", "replaced") for p in model[k].parameters()])
    model["replaced"] = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank)
    with optimizer.averaged(model):
        inside = everything(model)
    return inside, everything(model)


def different(rank):
    """What every rank is told where rank 2 averages something else, and whether its own values are back."""
    model = torch.nn.BatchNorm1d(3)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    other, narrow, more = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    other.running_mean = torch.zeros(4)
    narrow.running_var = torch.ones(3, dtype=torch.float64)
    more.register_buffer("extra", torch.zeros(1))
    before, told = everything(model), []
    for odd in (other, narrow, more, None):
        try:
            with optimizer.averaged(odd if rank == 2 else torch.nn.BatchNorm1d(3)):
                told.append("nothing")
        except ValueError as error:
            told.append(str(error))
    return told, same(before, everything(model)), optimizer._averaging


def within(rank):
    """The flag, nested calls, step(), and the distance within `averaged`."""
    model = torch.nn.Linear(3, 2)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank)
    flags, error = [optimizer._averaging], ""
    with optimizer.averaged(model):
        flags.append(optimizer._averaging)
        distance = optimizer.consensus_distance()
        try:
            with optimizer.averaged(model):
                pass
        except RuntimeError as raised:
            error = str(raised)
        flags.append(optimizer._averaging)
    return [*flags, optimizer._averaging], error, distance, optimizer.consensus_distance()


def distances(rank):
    """The distance after writes into weights, by type and schedule, with rubbish behind the last parameter."""
    found = {}
    for dtype in (torch.float32, *HALF):
        for schedule in ("atc", "awc"):
            model = torch.nn.Linear(3, 2).to(dtype)
            optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.0, schedule=schedule, overlap=False)
            for _ in range(2):
                model(torch.ones(2, 3, dtype=dtype)).sum().backward()
                optimizer.step()
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(rank)
            for b in optimizer._engine.buckets:
                b.x[b.flags.start :] = 1000.0 * rank
            found[f"{dtype} {schedule}"] = optimizer.consensus_distance()
            for b in optimizer._engine.buckets:
                b.x[b.flags.start :] = 0.0
            optimizer.synchronize()
    return found


def machines(rank):
    """Two machines of two ranks, each with running statistics of its own: the mean inside, and after."""
    model = torch.nn.BatchNorm1d(3)
    with machines_of(2):
        optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1, method="dmsgd", topology="ring", hierarchical=True)
    with torch.no_grad():
        model.running_mean.fill_(rank)
    before = copy.deepcopy(model.state_dict())
    with optimizer.averaged(model):
        inside = model.running_mean.clone()
    return inside, same({"": before["running_mean"]}, {"": model.running_mean})


def means(rank):
    """`optimizer.mean`: of a number, of a tensor on two machines, and what is refused."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = fused_dlam.GossipSGD([param], lr=0.1)
    number, own = optimizer.mean(float(rank)), torch.full((2,), float(rank))
    vector = optimizer.mean(own)
    refused = []
    for value in (rank, torch.zeros(2 + rank % 2)):
        try:
            optimizer.mean(value)
        except (TypeError, ValueError) as error:
            refused.append(f"{type(error).__name__}: {error}")
    with machines_of(2):
        machines = fused_dlam.GossipSGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1, hierarchical=True)
    return number, vector, own, refused, machines.mean(float(rank))
