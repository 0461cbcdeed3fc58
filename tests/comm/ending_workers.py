"""What worker processes run in test_endings.py."""

import gc
import os
import threading
import time
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from fused_dlam import ExchangeError, GossipSGD, neighbor_allreduce
from fused_dlam.comm import leaving
from fused_dlam.comm.errors import calling
from fused_dlam.comm.group import Group
from fused_dlam.comm.transfer import Transfer
from fused_dlam.topology.topology import Peers


def taken():
    """Python's threads, the system's, and open files of this process."""
    gc.collect()
    for _ in range(100):  # a closing thread, or gloo's, may be on its way out
        if not any(t.name == "fused_dlam-closing" for t in threading.enumerate()):
            break
        time.sleep(0.02)
    return threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def in_a_row(rank, closes):
    """What is taken after 3 optimizers, and after 9: deleted, or their groups closed."""
    model, counts = torch.nn.Linear(4, 4), []
    for k in range(9):
        optimizer = GossipSGD(model.parameters(), lr=0.1, timeout=30.0)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        optimizer.synchronize()
        if closes:
            optimizer._engine.place.close()
        del optimizer
        gc.collect()
        dist.barrier()
        if k in (2, 8):
            counts.append(taken())
    return counts


def closed(rank):
    """What a group says after it was closed, twice; how many threads of this package are left."""
    group = Group(timeout=30.0)
    group.courier.run(lambda: None).wait(10.0)
    x = torch.full((2,), float(rank))
    group.mean(x)
    group.close()
    group.close()
    told = []
    for use in (
        lambda: group.mean(x),
        lambda: group.broadcast(x),
        lambda: Transfer(group, [x], Peers((0,), (1.0,), ()), 0),
    ):
        try:
            use()
        except RuntimeError as error:
            told.append((type(error).__name__, str(error)))
    end = time.monotonic() + 10.0
    while any(t.name.startswith("fused_dlam") for t in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.05)
    return told, [t.name for t in threading.enumerate() if t.name.startswith("fused_dlam")]


def left_behind(rank):
    """Rank 0 sends a message and lets its group go before rank 1 has posted the receive: what rank 1 gets."""
    group, x = Group(timeout=30.0), torch.arange(100000.0)
    other = 1 - rank
    if rank == 0:
        Transfer(group, [], Peers((), (), (other,)), 0).send(x)
        del group
        gc.collect()
        dist.barrier()
        return None
    time.sleep(0.5)
    row = torch.zeros_like(x)
    Transfer(group, [row], Peers((other,), (1.0,), ()), 0).wait_received()
    dist.barrier()
    return torch.equal(row, x)


def collected_at_the_end(rank):
    """Rank 0's process ends, and its group is collected meanwhile: what of its threads is left once the end was waited
    for. Rank 1 takes its message soon, rank 2 late; what they got."""
    group, another, x = Group(timeout=30.0), Group(timeout=30.0), torch.arange(100000.0)
    if rank == 0:
        for receiver in (2, 1):
            Transfer(group, [], Peers((), (), (receiver,)), 0).send(x)
        held = [group, another]
        del group, another
        collecting = threading.Timer(0.3, held.clear)
        collecting.start()
        leaving._at_exit()
        leaving._ended = 0
        collecting.join()
        left = [t.name for t in threading.enumerate() if t.name == "fused_dlam-closing"]
        dist.barrier()
        return left
    time.sleep(0.8 if rank == 1 else 1.6)
    row = torch.zeros_like(x)
    Transfer(group, [row], Peers((0,), (1.0,), ()), 0).wait_received()
    dist.barrier()
    return torch.equal(row, x)


def place_lost(rank):
    """Rank 0 drops a receive that is posted and ends; then its message to rank 1 is taken: what is left of it."""
    group, x = Group(timeout=30.0), torch.arange(100000.0)
    row, other = torch.zeros_like(x), 1 - rank
    if rank == 0:
        Transfer(group, [row], Peers((other,), (1.0,), (other,)), 0).send(x)
        gc.collect()
        dist.barrier()
        group.holdings.finish()
    else:
        Transfer(group, [], Peers((), (), (other,)), 0).send(x)
        dist.barrier()
        time.sleep(0.2)  # rank 0's transport has met the message
        Transfer(group, [row], Peers((other,), (1.0,), ()), 0).wait_received()
    dist.barrier()
    return rank == 0 or torch.equal(row, x)


def copied(rank):
    """What rank 1 has of a tensor of rank 0's that is not contiguous, and whether it stayed laid out so."""
    group = Group(timeout=30.0)
    x = torch.full((2, 3, 4, 5), float(rank)).to(memory_format=torch.channels_last)
    if rank == 0:
        x.copy_(torch.arange(120.0).view(2, 3, 4, 5))
    group.copy(x, 0, 1)
    return x, x.is_contiguous(memory_format=torch.channels_last)


def anew(rank):
    """After a wait that ran out of time: a new group, and neighbor_allreduce, over the same ranks and processes."""
    out = []
    group = Group(timeout=1.0)
    x = torch.full((3,), float(rank))
    try:
        if rank != 2:
            group.mean(x.clone())
    except ExchangeError as error:
        out.append(str(error))
    dist.barrier()
    del group
    fresh, mean = Group(timeout=30.0), x.clone()
    fresh.mean(mean)
    out.append(mean[0].item())
    out.append(neighbor_allreduce(x, "ring", timeout=1.0)[0].item())
    try:
        if rank != 2:
            neighbor_allreduce(x, "ring")
        else:  # it misses one, and so meets the broken group in the next
            time.sleep(3.0)
            neighbor_allreduce(x, "ring")
    except ExchangeError as error:
        out.append(str(error))
    dist.barrier()
    out.append(neighbor_allreduce(x, "ring", timeout=30.0)[0].item())
    return out


def again(rank, staged):
    """Messages of three ranks on a one-way ring that are sent, and received, more than once."""
    n = dist.get_world_size()
    group, left, right = Group(timeout=30.0), (rank - 1) % n, (rank + 1) % n
    rows, out = [torch.zeros(5), torch.zeros(5)], []
    with mock.patch.object(Transfer, "on_device", staticmethod(lambda tensors: staged)):
        transfer = Transfer(group, rows, Peers((left, right), (0.3, 0.3), (left, right)), 3, tag=2)
        transfer.send(torch.full((5,), float(rank)))
        transfer.wait_delivered()
        out.append([row[0].item() for row in transfer.readable])
        transfer.wait_sent()
        transfer.receive_again([right, left])  # before a copy to the device
        transfer.send(torch.full((5,), 10.0 + rank))
        transfer.wait_delivered()
        out.append([row[0].item() for row in transfer.readable])
        transfer.wait_received()
        out.append([row[0].item() for row in rows])
        transfer.wait_sent()
        transfer.receive_again([left])  # after it, and from one of them alone
        dist.barrier()
        for destination in (right,):
            Transfer(group, [], Peers((), (), (destination,)), 3, tag=2).send(torch.full((5,), 20.0 + rank))
        transfer.wait_received()
        out.append([row[0].item() for row in rows])
    return out, group.messages_sent, group.bytes_sent, [left, right]


def deaths(rank, how):
    """Rank 1 is gone in step 2; what the others are told, who wait for it on a one-way ring, and the times."""
    model = torch.nn.Linear(4, 3)
    from fused_dlam import topology

    W = 0.5 * torch.eye(4) + 0.5 * torch.eye(4).roll(1, 0)
    optimizer = GossipSGD(
        model.parameters(), lr=0.1, timeout=3.0, method="dmsgd", topology=topology.Topology(W.numpy())
    )
    start = time.monotonic()
    try:
        for step in range(4):
            if rank == 1 and step == 2:
                if how == "stops":
                    time.sleep(15.0)
                elif how == "raises":
                    optimizer._engine.place.close()
                return None
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            start = time.monotonic()
            with calling("trainer.fit()") if how == "called" else mock.MagicMock():
                optimizer.step()
    except ExchangeError as error:
        seconds = time.monotonic() - start
        optimizer._engine.place.close()  # as its process would, when it ends
        return str(error), seconds, (error.rank, error.peer, error.step, error.call)
    return "no error"


def collective(rank):
    """Rank 2 alone does not average."""
    group = Group(timeout=2.0)
    try:
        with calling("optimizer.averaged()"):
            if rank != 2:
                group.mean(torch.ones(3))
    except ExchangeError as error:
        return str(error)
    finally:
        dist.barrier()


def means(rank):
    """float16, float8, values that are not finite, and what may not be passed."""
    half = torch.float16
    out = {"full": neighbor_allreduce(torch.full((2,), 30000.0, dtype=half), "full")[0].item()}
    apart = torch.full((2,), 60000.0 if rank == 0 else -60000.0, dtype=half)
    out["apart"] = neighbor_allreduce(apart, "one-peer-exponential")[0].item()
    group = Group(timeout=30.0)
    x = torch.full((4,), float(rank))
    x[1] = float("nan") if rank == 0 else 5.0
    x[2] = float("inf") if rank == 2 else 5.0
    group.finite_mean(x)
    out["finite"] = x.tolist()
    sent = group.bytes_sent
    for name, call in {
        "float8": lambda: group.mean(torch.zeros(3).to(torch.float8_e4m3fn)),
        "integers": lambda: group.start_mean(torch.zeros(3, dtype=torch.int64), 0),
        "list": lambda: neighbor_allreduce([1.0], "ring"),
        "float8 of a neighbor": lambda: neighbor_allreduce(torch.zeros(3).to(torch.float8_e5m2), "ring"),
        "shape": lambda: neighbor_allreduce(torch.zeros(4 if rank == 1 else 3), "ring"),
        "type": lambda: neighbor_allreduce(torch.zeros(8, dtype=torch.float64 if rank == 2 else torch.float32), "ring"),
        "topology": lambda: neighbor_allreduce(torch.zeros(3), "ring" if rank else "full"),
    }.items():
        try:
            call()
            out[name] = "none"
        except (TypeError, ValueError) as error:
            out[name] = type(error).__name__ + ": " + str(error)
    assert group.bytes_sent == sent
    out["after"] = neighbor_allreduce(torch.full((3,), float(rank)), "full")[0].item()
    return out


def formed_anew(rank):
    """What is said where the groups of another generation cannot be built."""
    optimizer = GossipSGD([torch.nn.Parameter(torch.ones(3))], 0.1, timeout=20.0)
    closed = RuntimeError("Connection closed by peer [127.0.0.1]:4444")
    with mock.patch("fused_dlam.comm.process_group.build", side_effect=closed):
        try:
            optimizer._connect(SimpleNamespace(view=SimpleNamespace(generation=3), gone=lambda: ""))
        except ExchangeError as error:
            return str(error), error.lost
    return "no error", False
