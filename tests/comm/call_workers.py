"""What worker processes run in test_piece_calls.py."""

import gc
import time

import numpy as np
import random_exchanges
import torch
import torch.distributed as dist
from piece_workers import own, told, workers_of

from fused_dlam import (
    Topology,
    neighbor_allreduce,
    neighbor_exchange,
    neighbor_gather,
    pair_average,
    push_sum,
    topology,
)

# -- handles -----------------------------------------------------------------------------------------------------------


def handles(rank, n):
    """Handles in any order, asked and let go, beside calls that wait; each result as a number."""
    x, left, right = torch.full((3,), float(rank)), (rank - 1) % n, (rank + 1) % n

    def start(value):
        return neighbor_exchange(x + value, {left: 1.0}, [right], 0.0, async_op=True, check=False)

    out, first, second = [], start(100), start(200)
    text = repr(first)
    out.append(neighbor_allreduce(x, "full")[0].item())
    out += [second.wait()[0].item() - left, first.wait()[0].item() - left]
    start(300)  # nobody will wait for it, and its place is taken by none of the next
    kept = start(400)
    gc.collect()
    out.append(neighbor_exchange(x + 500, {left: 1.0}, [right], 0.0)[0].item() - left)
    end = time.monotonic() + 60
    while not kept.done and time.monotonic() < end:
        time.sleep(0.01)
    out += [kept.done, kept.wait()[0].item() - left, kept.wait() is kept.wait()]
    changed = x.clone()
    handle = neighbor_allreduce([changed, changed.to(torch.bfloat16)], "one-peer-exponential", async_op=True)
    changed.fill_(float("nan"))
    out.append([t[0].item() for t in handle.wait()])
    mean = neighbor_allreduce(x, "full", async_op=True)
    while not mean.done and time.monotonic() < end:
        time.sleep(0.01)
    out += [mean.done, mean.wait()[0].item()]
    del handle, mean
    neighbor_allreduce(x, "full", async_op=True)
    out.append(neighbor_allreduce(x, "full")[0].item())
    alone = neighbor_exchange(x, (), async_op=True)
    out += [alone.done, alone.wait()[0].item() == rank, text, repr(first)]
    return out


def let_go(rank, n):
    """What is still held of exchanges whose handles were let go, once they are over."""
    x, left, right = torch.zeros(1000), (rank - 1) % n, (rank + 1) % n
    for _ in range(50):
        neighbor_exchange(x, [left], [right], async_op=True, check=False)
    gc.collect()
    neighbor_allreduce(x, "full")
    holdings, end = workers_of().holdings, time.monotonic() + 60
    while (holdings.posted or holdings.expected) and time.monotonic() < end:
        time.sleep(0.01)
    return len(holdings.posted), len(holdings.expected)


def not_waited_for_at_the_end(rank, n):
    """The process ends with handles under way, some of which nobody asked for: its neighbors get what is theirs."""
    x, left, right = torch.full((100_000,), float(rank)), (rank - 1) % n, (rank + 1) % n
    started = [neighbor_exchange(x, {left: 1.0}, [right], 0.0, async_op=True, check=False) for _ in range(3)]
    if rank == 0:
        return None
    assert started[0].done in (True, False)
    time.sleep(0.1 * rank)
    return [handle.wait()[0].item() for handle in started]


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusals(rank, n):
    """The error of every mistake of rank 1's, or of all; after each the same function works."""
    x, odd = torch.zeros(3), rank == 1
    left, right = (rank - 1) % n, (rank + 1) % n
    graph = topology.ring(n)
    doubly, wrong = torch.zeros(3, dtype=torch.float64), torch.zeros(4)
    partner = {0: 1, 1: 0}.get(rank)
    skewed, other = Topology(_skewed(n)), Topology(graph.weights(), "lazy ring")

    def exchange(x=x, sources=(left,), destinations=(right,), **more):
        return neighbor_exchange(x, sources, destinations, **more)

    calls = {
        "allreduce shape": lambda: neighbor_allreduce([x, wrong if odd else x], graph),
        "allreduce type": lambda: neighbor_allreduce([x, doubly if odd else x], graph),
        "allreduce length": lambda: neighbor_allreduce([x[:2], x] if odd else [x[:2]], graph),
        "allreduce gradient": lambda: neighbor_allreduce(torch.zeros(6, requires_grad=odd), graph),
        "allreduce weights": lambda: neighbor_allreduce(x, graph.lazy() if odd else other),
        "two functions": lambda: push_sum(x[:1], 1.0, graph) if odd else neighbor_allreduce(x[:1], graph),
        "a gathering": lambda: neighbor_gather(x[:1], graph) if odd else neighbor_allreduce(x[:1], other),
        "exchange and gathering": lambda: exchange() if odd else neighbor_gather(x[:1], graph),
        "exchange source": lambda: exchange(sources=() if odd else (left,)),
        "exchange destination": lambda: exchange(destinations=() if odd else (right,)),
        "exchange shape": lambda: exchange(wrong if odd else x),
        "exchange type": lambda: exchange(doubly if odd else x),
        "exchange gradient": lambda: exchange(x.clone().requires_grad_(odd)),
        "exchange itself": lambda: exchange(sources={rank: 0.5} if odd else (left,)),
        "exchange no rank": lambda: exchange(destinations=[n] if odd else (right,)),
        "exchange twice": lambda: exchange(sources=[left, left] if odd else (left,)),
        "exchange a word": lambda: exchange(sources=["left"] if odd else (left,)),
        "exchange a number": lambda: exchange(sources=left if odd else (left,)),
        "exchange weight": lambda: exchange(sources={left: float("nan") if odd else 1.0}),
        "exchange own weight": lambda: exchange(self_weight="half" if odd else None),
        "exchange many": lambda: neighbor_exchange(x, [j for j in range(n) if j != rank]),
        "gather type": lambda: neighbor_gather(doubly if odd else x, graph),
        "gather trailing": lambda: neighbor_gather(torch.zeros(2, 4 if odd else 3), graph),
        "gather a number": lambda: neighbor_gather(torch.zeros(()) if odd else torch.zeros(1), graph),
        "gather topology": lambda: neighbor_gather(x, "full" if odd else "ring"),
        "pair shape": lambda: pair_average(wrong if odd else x, partner),
        "pair type": lambda: pair_average(doubly if odd else x, partner),
        "pair gradient": lambda: pair_average(x.clone().requires_grad_(odd), partner),
        "push shape": lambda: push_sum(wrong if odd else x, 1.0, graph),
        "push rows": lambda: push_sum(x, 1.0, skewed),
        "push mass": lambda: push_sum(x, torch.ones(()), graph),
        "push no mass": lambda: push_sum(x, "one", graph),
        "pair itself": lambda: pair_average(x, rank),
        "pair no rank": lambda: pair_average(x, -1),
        "pair a word": lambda: pair_average(x, "left"),
        "allreduce integers": lambda: neighbor_allreduce([x, torch.zeros(3, dtype=torch.int64)], graph),
        "exchange float8": lambda: exchange(x.to(torch.float8_e5m2)),
        "gather a list": lambda: neighbor_gather([x], graph),
        "push sparse": lambda: push_sum(x.to_sparse(), 1.0, graph),
        "pair a list of floats": lambda: pair_average([1.0], partner),
        "async gradient": lambda: exchange(x.clone().requires_grad_(), async_op=True),
        "async gradient of all": lambda: neighbor_allreduce(x.clone().requires_grad_(), graph, async_op=True),
        "timeout": lambda: exchange(timeout=0.0),
        "two devices": lambda: neighbor_allreduce([x, torch.zeros(3, device="meta")], graph),
        "another device": lambda: neighbor_allreduce(torch.zeros(3, device="meta"), graph),
    }  # fmt: skip
    out = {}
    for name, call in calls.items():
        neighbor_allreduce(x, graph)
        sent = workers_of().bytes_sent
        out[name] = told(call)
        assert name.startswith("pair") or workers_of().bytes_sent == sent, name  # a pair tells each other in a message
    works = (
        torch.equal(neighbor_allreduce(x, graph), x),
        torch.equal(exchange(), x),
        list(neighbor_gather(x, graph)) == sorted({left, right}),
        torch.equal(pair_average(x, partner), x),
        push_sum(x, 1.0, graph)[1] == 1.0,
    )
    return out, works


def _skewed(n):
    """Rows that sum to one, columns that do not."""
    W = 0.5 * np.eye(n) + 0.5 / n
    W[0] = 0.0
    W[0, :2] = 0.3, 0.7
    return W


def spans(rank, n):
    """The names of a profiler's spans, with how often each came."""
    x, graph, left, right = torch.ones(3), topology.exponential(n), (rank - 1) % n, (rank + 1) % n
    leaf = x.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        neighbor_allreduce(x, graph, step=3)
        neighbor_exchange(x, [left], [right], async_op=True).wait()
        neighbor_gather(x, graph)
        pair_average(x, {0: 1, 1: 0}.get(rank))
        push_sum(x, 1.0, graph, step=2)
        neighbor_allreduce(leaf, graph, step=1).sum().backward()
    return {e.key: e.count for e in profile.key_averages() if e.key.startswith("fused_dlam::")}


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(rank, n, A, W):
    """By function: (x, c, y, the gradient of <c, y> by x, which is not of the mass)."""
    left, right, out = (rank - 1) % n, (rank + 1) % n, {}
    rows, pushing, partner = Topology(W), random_exchanges.columns(A), {0: 1, 1: 0, 2: 3, 3: 2}.get(rank)
    calls = {
        "rows": lambda x: neighbor_allreduce(x, rows),
        "full": lambda x: neighbor_allreduce(x, "full"),
        "columns": lambda x: neighbor_allreduce(x, pushing),
        "exchange": lambda x: neighbor_exchange(x, {left: 0.7}, {right: -1.5}, 0.25),
        "unchecked": lambda x: neighbor_exchange(x, [left], [right], check=False),
        "pair": lambda x: pair_average(x, partner),
        "push": lambda x: push_sum(x, 0.5 + rank, pushing)[0],
    }
    for name, call in calls.items():
        for dtype in (torch.float64, torch.complex128):
            x, c = own(rank, 3, 2, dtype=dtype).T.requires_grad_(), own(50 + rank, 2, 3, dtype=dtype)
            y = call(x)
            y.backward(c)
            out[f"{name} {dtype}"] = x.detach(), c, y.detach(), x.grad
    assert push_sum(x, torch.ones((), dtype=torch.float64).requires_grad_(), pushing)[1].requires_grad is False
    return out


def gradients_of_lists(rank, n, W):
    """A list of which one tensor has no gradient; y.square()/2 twice over: W^T W x and W^T W d."""
    rows = Topology(W)
    x, fixed = own(rank, 4).requires_grad_(), own(rank, 2, dtype=torch.float32)
    narrow = own(rank, 3, dtype=torch.bfloat16).requires_grad_()
    y, z, v = neighbor_allreduce([x, fixed, narrow], rows)
    assert y.requires_grad and not z.requires_grad and v.requires_grad
    (g,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)
    (again,) = torch.autograd.grad((g * own(20 + rank, 4)).sum(), x)
    y, _, v = neighbor_allreduce((x, fixed, narrow), rows)
    v.float().sum().backward()  # the other's gradient is zero, and travels
    with torch.no_grad():
        plain = neighbor_allreduce(x, rows)
    assert not plain.requires_grad and not neighbor_allreduce(x.detach(), rows).requires_grad
    return x.detach(), g.detach(), again, x.grad, narrow.grad, fixed.grad


def trained_through(rank, n):
    """The gradient through an exchange of what a network computes, twice in one graph: finite differences agree."""
    torch.manual_seed(0)
    a, b = own(rank, 3, 3).requires_grad_(), own(9 + rank, 3)

    def loss(a):
        h = neighbor_allreduce(torch.tanh(a @ b), "one-peer-exponential", 1)
        return neighbor_exchange(h * h, {(rank + 1) % n: -0.5}, [(rank - 1) % n], 2.0).sum()

    loss(a).backward()
    eps, numeric = 1e-6, []
    for k in range(9):  # of rank 0's a, in the sum of all ranks' losses
        both = []
        for sign in (1, -1):
            moved = a.detach().clone()
            moved.view(-1)[k] += sign * eps * (rank == 0)
            total = loss(moved)
            dist.all_reduce(total)
            both.append(total.item())
        numeric.append((both[0] - both[1]) / (2 * eps))
    return a.grad.view(-1).tolist(), numeric
