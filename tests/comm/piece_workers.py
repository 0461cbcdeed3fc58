"""What worker processes run in test_pieces.py, and what it shares with test_piece_calls.py."""

import os
from unittest import mock

import numpy as np
import random_exchanges
import torch
import torch.distributed as dist
from random_exchanges import TOLERANCE, wide

from fused_dlam import (
    ExchangeError,
    Topology,
    neighbor_allreduce,
    neighbor_exchange,
    neighbor_gather,
    pair_average,
    push_sum,
)  # fmt: skip
from fused_dlam.comm import lines


def directed(n, axis):
    """A random directed matrix with zeros, whose rows (1) or columns (0) sum to one."""
    rng = np.random.default_rng(n)
    A = rng.uniform(0.1, 1, (n, n)) * (rng.random((n, n)) < 0.5) + np.eye(n) + np.roll(np.eye(n), 1, 0)
    return A / A.sum(axis, keepdims=True)


def assert_near(got, expected, size, dtype):
    """size: the sum of the absolute values of what is added."""
    assert got.dtype == dtype and got.shape == expected.shape
    assert bool(((wide(got) - expected).abs() <= TOLERANCE[dtype] * size + 1e-7 * (dtype == torch.float16)).all())


def told(call):
    try:
        call()
    except (ExchangeError, ValueError, TypeError, RuntimeError) as error:
        return type(error).__name__ + ": " + str(error)
    return "none"


def own(rank, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + rank)
    kind = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=kind).to(dtype)


def mixed_list(rank):
    """Of five types, one not contiguous, one empty, one a number, one a conjugate that is a view."""
    return [
        own(rank, 4, 3, dtype=torch.float32).T,
        own(rank, dtype=torch.float64),
        own(rank, 0, 4, dtype=torch.bfloat16),
        own(rank, 7, dtype=torch.bfloat16),
        own(rank, 2, 2, dtype=torch.complex64).conj(),
        own(rank, 5, dtype=torch.float16),
        own(rank, 2, dtype=torch.float32),
    ]


def lists(rank, graphs, steps):
    """(what was passed, what came back for each graph and step), and how many messages went for a list."""
    tensors, out = mixed_list(rank), []
    before = [t.clone() for t in tensors]
    for graph in graphs:
        for step in range(steps):
            out.append(neighbor_allreduce(tensors, graph, step))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    group = workers_of()
    sent = group.messages_sent
    neighbor_allreduce(tensors, "one-peer-exponential")
    sent = group.messages_sent - sent
    kinds = [type(neighbor_allreduce(form(tensors), "ring")) for form in (list, tuple)]
    return tensors, out, kinds == [list, tuple], sent


def workers_of():
    (line,) = lines._lines[dist.group.WORLD].values()
    return line.workers


def equal_ranks(rank, n):
    """Whether equal ranks stay bit-equal under rows that sum to one, 16-bit and wide."""
    out = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = own(7, 50, dtype=dtype)
        y = x.clone()
        for step in range(10):
            y = neighbor_allreduce(y, "one-peer-exponential", step)
            y = neighbor_allreduce(y, "ring", step)
            y = neighbor_exchange(y, [(rank + 1) % n], [(rank - 1) % n], check=step == 0)
        out.append(torch.equal(x, y))
    return out


def columns(rank, A):
    """A x, exactly once for each way to ask for it."""
    graph, x = random_exchanges.columns(A), own(rank, 6)
    n = len(A)
    sources = {j: A[rank, j] for j in range(n) if j != rank and A[rank, j]}
    destinations = [i for i in range(n) if i != rank and A[i, rank]]
    asked = neighbor_exchange(x, sources, destinations, self_weight=A[rank, rank])
    return x, neighbor_allreduce(x, graph), asked, push_sum(x, 1.0, graph)


def pushed(rank, A, calls):
    """x / mass after many calls, in float64 and with float32 and bfloat16 values beside a float64 mass."""
    graph, out = random_exchanges.columns(A), {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, mass = own(rank, 5, dtype=dtype), torch.ones((), dtype=torch.float64)
        for step in range(calls):
            x, mass = push_sum(x, mass, graph, step)
        out[dtype] = x, mass.item()
    return own(rank, 5), out


def sixteen(rank, name, dtype, calls):
    """A thousand averages in 16 bits: what it began with, what it has."""
    x = own(rank, 2000, dtype=dtype) * 100
    y = x
    for step in range(calls):
        y = neighbor_allreduce(y, name, step)
    return x, y


def gathers(rank):
    """One-way ring, full and one-peer: what comes, of every type."""
    out = []
    for dtype in (torch.float32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.int16):
        x = torch.arange(3.0 * rank).reshape(rank, 3).to(dtype)
        out.append((x, [neighbor_gather(x, graph, 1) for graph in ("one-way-ring", "full", "one-peer-exponential")]))
    return out, neighbor_gather(torch.tensor(rank), "full")


def pairs(rank, n):
    """Every pair in turn, bits and values; then one rank sits out while two talk more often than the others."""
    out = []
    for shift in range(n):
        partner = (shift - rank) % n
        x = own(rank, 9, dtype=torch.float32)
        out.append((x, partner, pair_average(x, None if partner == rank else partner)))
    for _ in range(3 if rank < 2 else 0):
        out.append((x, 1 - rank, pair_average([x, x[:0]], 1 - rank)[0]))
    return out


def machines(rank, size, use_mesh, W):
    """hierarchical=: what was passed, what came of a list of three types, and the bytes this rank sent to machines."""
    hierarchical, n = True, dist.get_world_size()
    if use_mesh:
        hierarchical = dist.DeviceMesh("cpu", torch.arange(n).reshape(size, n // size).T.contiguous())
    x = [own(rank, 5, 3), own(rank, 4, dtype=torch.float32), own(rank, 7, dtype=torch.bfloat16), own(rank, 0)]
    graph = Topology(W)
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(size)):
        out = neighbor_allreduce(x, graph, hierarchical=hierarchical)
        line = next(line for key, line in lines._lines[dist.group.WORLD].items() if len(key) > 1)
        sent = line.workers.bytes_sent
        neighbor_allreduce(x, graph, hierarchical=hierarchical)
        sent = line.workers.bytes_sent - sent
        leaf = own(rank, 3).requires_grad_()
        neighbor_allreduce(leaf, graph, hierarchical=hierarchical).backward(own(rank + 50, 3))
        try:
            neighbor_allreduce(x, graph, hierarchical=hierarchical, async_op=True)
        except ValueError as error:
            refused = str(error)
        one = neighbor_allreduce(x[0], "full", hierarchical=hierarchical)
    return x, out, sent, leaf.grad, refused, one


def some_of_the_ranks(rank):
    """Ranks are numbers inside the group; those outside it go on."""
    members = dist.new_group([0, 2, 3])
    if rank == 1:
        return told(lambda: neighbor_exchange(torch.ones(1), (), group=members))
    me = dist.get_rank(members)
    x = torch.full((2,), float(rank))
    ring = neighbor_exchange(x, {(me - 1) % 3: 1.0}, [(me + 1) % 3], 0.0, group=members)
    gathered = neighbor_gather(x, "full", group=members)
    pair = pair_average(x, 1 - me if me < 2 else None, group=members)
    wrong = told(lambda: neighbor_exchange(x, {(me - 1) % 3: 1.0}, [(me + 1) % 3] if me else [], group=members))
    return ring[0].item(), {j: t[0].item() for j, t in gathered.items()}, pair[0].item(), wrong
