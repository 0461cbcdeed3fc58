"""Ranks with unlike histories of process groups, and groups under every name; run by worker processes."""

import os
import socket
import threading

import torch
import torch.distributed as dist
import workers

import fused_dlam
from fused_dlam import neighbor_allreduce
from fused_dlam.comm import roll_call


def train(rank, steps=6, **options):
    """The trained parameters after a few steps."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.05, timeout=30.0, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    return workers.trained(model).clone()


def histories(rank):
    """What training gives before, and after each thing that leaves ranks with other groups than their neighbors."""
    n = dist.get_world_size()
    paths = {"none": train(rank, topology="ring")}
    dist.new_group([0, 1])  # all ranks call it, as torch wants; only two are in it
    paths["a group of some"] = train(rank, topology="ring")
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    paths["a group that one rank knows of"] = train(rank, topology="ring")
    other = dist.new_group(list(range(n)))
    paths["a further group"] = train(rank, topology="ring")
    dist.destroy_process_group(other)
    paths["a destroyed group"] = train(rank, topology="ring")
    return paths


def some_of_the_ranks(rank):
    """Three ranks of four train in a group of theirs; the ranks know of different numbers of groups."""
    dist.new_group([0, 1])
    if rank == 2:
        dist.new_group([2], use_local_synchronization=True)
    members = dist.new_group([0, 2, 3])
    return None if rank == 1 else train(rank, group=members)


def machines(rank):
    """Three machines of two ranks, before there is a group that only three ranks are in and after it."""
    options = {"hierarchical": True, "method": "dmsgd"}
    with workers.machines_of(2):
        without = train(rank, **options)
        dist.new_group([0, 1, 2])
        return train(rank, **options), without


def named(rank, backend, folder):
    """A step in a group that torch calls by another name than its backend's; None: `init_process_group()`."""
    n = dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=dist.FileStore(f"{folder}/{backend}", n), rank=rank, world_size=n)
    optimizer = fused_dlam.GossipSGD([torch.nn.Parameter(torch.ones(4))], lr=0.1, timeout=30.0)
    out = dist.get_backend(), optimizer._engine.place.workers.backend, train(rank)
    dist.barrier()
    return out


def again(rank, folder):
    """The job starts anew in processes of which one is fresh: what it trains, and what the first job did."""
    first, n = train(rank), dist.get_world_size()
    dist.destroy_process_group()
    if rank == 1:
        roll_call._completed.clear()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", n), rank=rank, world_size=n)
    out = first, train(rank)
    dist.barrier()
    return out


def mesh(rank, folder):
    """The recipe for machines with FSDP2: `init_device_mesh` makes the process group itself."""
    n = dist.get_world_size()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=_port(folder, rank))
    grid = dist.init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("replicate", "shard"))
    return dist.get_backend(), train(rank, hierarchical=grid, method="dmsgd")


def _port(folder, rank):
    """One free port for all ranks, told by a file."""
    store = dist.FileStore(f"{folder}/port", -1)
    if rank == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            store.set("port", str(s.getsockname()[1]))
    return store.get("port").decode()


def means(rank):
    """The mean of 30000, in float16 everywhere, by every way that averages exactly; and what a step makes of it."""
    out = [neighbor_allreduce(torch.full((3,), 30000.0, dtype=torch.float16), "full")]
    model = torch.nn.Linear(2, 2)
    model.register_buffer("running", torch.full((3,), 30000.0, dtype=torch.float16))
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    with optimizer.averaged(model):
        out.append(model.running.clone())
    for options in ({"method": "pmsgd"}, {"hierarchical": True}):
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
        with workers.machines_of(dist.get_world_size()):
            optimizer = fused_dlam.GossipSGD([p], lr=1e-4, momentum=0.0, **options)
        (p * 30000.0).sum().backward()
        optimizer.step()
        out.append(p.detach() * -10000)
    return out


def two_threads(rank):
    """Gradients that arrive on two threads at once, as of a model on two devices: how often each bucket was sent."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(50)) for _ in range(40)]
    optimizer = fused_dlam.GossipSGD(params, lr=0.01, overlap=True, bucket_mb=1e-5, timeout=30.0)
    engine, sent, errors = optimizer._engine, [], []
    send_next = engine.send_next

    def noted(*args, **kwargs):
        sent.append(engine.sent)
        send_next(*args, **kwargs)

    engine.send_next = noted
    for _ in range(20):
        halves = [sum((p * rank).sum() for p in params[k::2]) for k in range(2)]
        ready = threading.Barrier(2)

        def backward(loss, ready=ready):
            ready.wait()
            try:
                loss.backward()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=backward, args=(half,)) for half in halves]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        optimizer.step()
        optimizer.zero_grad()
    count = len(engine.buckets)
    assert count > 20 and not errors, errors
    return [sent[k : k + count] == list(range(count)) for k in range(0, len(sent), count)]
