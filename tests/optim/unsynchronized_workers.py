"""What worker processes run in test_unsynchronized.py."""

import time
from unittest import mock

import torch
import torch.distributed as dist
import workers

from fused_dlam import ExchangeError, PairGossip, PushSum
from fused_dlam.comm.store import default_store
from fused_dlam.optim.push_sum import LEAST

KINDS = {"PushSum": PushSum, "PairGossip": PairGossip}


def settled(optimizer):
    """Returns when no neighbor is known to be within drained() any more, where it would be full."""
    end = time.monotonic() + 30
    while any(optimizer._box._post.held(line) for line in optimizer._box._post.lines.values()):
        assert time.monotonic() < end
        time.sleep(0.001)


def gradient(z, rank, step):
    """Of a cubic of this worker's own."""
    return z * (1 + 0.1 * rank) - (rank + 1) + 0.01 * z**2 + 0.001 * step


def lockstep(rank, kind, options, steps):
    """Steps one after the other, with nothing in flight between them: (z, mass) after each. No two runs differ."""
    n = dist.get_world_size()
    z = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    optimizer = KINDS[kind](torch.optim.SGD([z], lr=0.05, momentum=0.9), timeout=60.0, **options)
    path, partners = [], []
    for step in range(steps):
        if kind == "PushSum" or step % n == rank:
            z.grad = gradient(z.detach(), rank, step)
            settled(optimizer)
            if kind == "PushSum":  # what a faster rank has sent of this step belongs to the next one
                with mock.patch.object(optimizer, "_collect", lambda: None):
                    optimizer.step()
            else:
                with mock.patch.object(optimizer._box, "ask", wraps=optimizer._box.ask) as asked:
                    optimizer.step()
                partners.append(asked.call_args.args[0])
        with optimizer.drained():
            path.append((z.detach().clone(), getattr(optimizer, "mass", 1.0)))
    optimizer.close()
    return path, partners


def train(rank, kind, steps=60, slower=3):
    """A network with frozen, tied and unused parameters, one worker slower: what there is in the end."""
    model, x = workers.Tied(), workers.data(rank)
    if rank:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)  # rank 0's values count
    optimizer = KINDS[kind](torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), timeout=60.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 40 else 0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.unused.add_(float(rank))  # what a script writes is averaged, without a gradient too
    first = float(model.loss(x))
    for _ in range(steps // (slower if rank == 1 else 1)):
        time.sleep(0.002 * (slower if rank == 1 else 1))
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        scheduler.step()
    rate = optimizer.param_groups[0]["lr"]
    with optimizer.drained():
        mass = torch.tensor([getattr(optimizer, "mass", 1.0)], dtype=torch.float64)
        dist.all_reduce(mass)
    distance = optimizer.consensus_distance()
    own = [p.detach().clone() for p in model.parameters()]
    with optimizer.averaged(model):
        mean = [p.detach().clone() for p in model.parameters()]
        last = float(model.loss(x))
        try:
            optimizer.step()
            told = "nothing"
        except RuntimeError as error:
            told = str(error)
    back = all(torch.equal(a, b) for a, b in zip(own, model.parameters(), strict=True))
    optimizer.close()
    return {"start": start, "first": first, "last": last, "rate": rate, "mass": float(mass), "distance": distance,
            "mean": mean, "frozen": model.frozen.detach(), "told": told, "back": back, "own": own}  # fmt: skip


def only_mixing(rank, kind, dtype, steps=80):
    """Workers start apart and take no steps of their own: how far the mean of all has moved, and they are apart."""
    p = torch.nn.Parameter(torch.ones(33, dtype=dtype))
    optimizer = KINDS[kind](torch.optim.SGD([p], lr=0.1), timeout=60.0)
    with torch.no_grad():
        p.mul_(rank + 1)
    store, step = default_store(f"mixing {kind} {dtype}"), 0
    while store.add("through", int(step == steps)) < dist.get_world_size():  # until all have taken their steps
        step += 1
        time.sleep(0.001)
        optimizer.step()
    with optimizer.averaged():
        mean = p.detach().double()
    distance = optimizer.consensus_distance()
    optimizer.close()
    return mean, distance


def saved_and_loaded(rank, kind):
    """Half of a training, saved within drained(); what a new optimizer has that was loaded, and that it trains on."""
    model, x = workers.Tied(), workers.data(rank)

    def build():
        return KINDS[kind](torch.optim.Adam(model.parameters(), lr=0.01), timeout=60.0)

    def run(optimizer, steps):
        for _ in range(steps):
            time.sleep(0.001 * (1 + rank))
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()

    first = build()
    run(first, 20 + 5 * rank)
    with first.drained():
        saved = first.state_dict()
        there = workers.trained(model).clone()
    saved = torch.load(_file(saved), weights_only=True)  # as a checkpoint's reader sees it
    run(first, 5)
    first.close()
    second = build()
    second.load_state_dict(saved)
    restored, again = workers.trained(model).clone(), second.state_dict()
    steps = again[second.key]["step"], again["state"][0]["step"].item()  # Adam's own, which counts on
    run(second, 5 + rank)
    with second.drained():
        mass = torch.tensor([getattr(second, "mass", 1.0)], dtype=torch.float64)
        dist.all_reduce(mass)
    key = second.key
    same = torch.equal(again[key]["x"], saved[key]["x"]) and again[key]["mass"] == saved[key]["mass"]
    try:
        second.load_state_dict({**saved, key: {"x": torch.zeros(3), "mass": 1.0, "step": 0}})
        told = "nothing"
    except ValueError as error:
        told = str(error)
    second.close()
    return float((there - restored).abs().max()), same, steps, float(mass), told


def _file(thing):
    import io

    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def not_finite(rank, kind):
    """Rank 1 has NaN gradients in two steps: whether anybody's parameters ever are."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer, fine = KINDS[kind](torch.optim.SGD([p], lr=0.1), timeout=60.0), True
    for step in range(20):
        time.sleep(0.001)
        p.grad = torch.full((4,), float("nan") if rank == 1 and step in (3, 7) else 0.01)
        optimizer.step()
        fine &= bool(p.isfinite().all())
    optimizer.close()
    return fine and bool(p.isfinite().all())


def starved(rank):
    """Rank 0 takes steps while the others take none: its mass, whether its parameters are right, and all masses."""
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = PushSum(torch.optim.SGD([p], lr=0.1), timeout=60.0)
    end = time.monotonic() + 30
    while rank == 0 and optimizer.mass > LEAST and time.monotonic() < end:
        optimizer.step()
    for _ in range(200 if rank == 0 else 0):
        time.sleep(0.0005)  # slots are free
        optimizer.step()
    mass, right = optimizer.mass, bool((p == 1).all())
    with optimizer.drained():
        total = torch.tensor([optimizer.mass], dtype=torch.float64)
        dist.all_reduce(total)
    optimizer.close()
    return mass, right, float(total)


def refusals(rank):
    """(kind, text) of each."""
    told = []

    def note(call):
        try:
            call()
            told.append(("nothing", ""))
        except Exception as error:
            told.append((type(error).__name__, str(error)))

    def sgd(*shapes):
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(*shape)) for shape in shapes], lr=0.1)

    note(lambda: PushSum(sgd((2,)).param_groups))
    note(lambda: PushSum(PushSum(sgd((2,)), timeout=60.0), timeout=60.0))
    note(lambda: PushSum(sgd((2 + rank,)), timeout=60.0))
    note(lambda: PushSum(sgd((2,)), weigh="time"))
    optimizer = PairGossip(sgd((2,), (3,)), timeout=60.0)
    note(lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}))
    optimizer.inner.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    note(optimizer.step)
    optimizer.close()
    optimizer.close()
    note(optimizer.step)
    return told


def left_alone(rank):
    """The last rank lets go of its optimizer: the others go on, and are told that the mean of all cannot be had."""
    n, p = dist.get_world_size(), torch.nn.Parameter(torch.ones(4))
    optimizer = PushSum(torch.optim.SGD([p], lr=0.1), "full", timeout=60.0)
    if rank == n - 1:
        return None
    end = time.monotonic() + 30
    while not optimizer.lost and time.monotonic() < end:
        time.sleep(0.001)
        p.grad = torch.full((4,), float(rank))
        optimizer.step()
    try:
        with optimizer.averaged():
            told = "nothing"
    except ExchangeError as error:
        told = str(error)
    optimizer.step()
    optimizer.close()
    return optimizer.lost, told, bool(p.isfinite().all())
