"""What test_pushed_processes.py runs on its workers: least squares in float64, by ordinary scripts."""

import copy
from functools import partial

import networkx as nx
import numpy as np
import torch
from join_workers import Worker, problem
from workers import machines_of

import fused_dlam
from fused_dlam import Topology, topology

LR, MOMENTUM, DECAY = 0.05, 0.8, 1e-2


def drawn(n, step):
    """Columns that sum to one, another directed graph in every step."""
    rng = topology.generator(5, step)
    A = rng.rand(n, n) * (rng.rand(n, n) < 0.5) + 0.5 * np.eye(n)
    return A / A.sum(axis=0)


def lopsided(n):
    """Everybody pushes to the next and to worker 0."""
    return topology.push(nx.DiGraph([(i, (i + 1) % n) for i in range(n)] + [(i, 0) for i in range(n)]), "lopsided")


def by_turns(n):
    return topology.one_peer(topology.star(n))


def changing(n):
    return topology.changing(partial(drawn, n), n, name="drawn, seed = 5", sums="columns")


def seldom(n):
    return lopsided(n).every(2)


def rows(n):
    """Worker 0 hears everybody, the others the one before."""
    W = np.eye(n) / 2 + np.roll(np.eye(n), 1, axis=0) / 2
    W[0] = 1 / n
    return Topology(W, "rows")


def lr_at(step):
    """A warm-up, a pause, a tenth."""
    return LR * (min(1.0, (step + 1) / 5) if step < 12 else 0.0 if step < 15 else 0.1 if step < 20 else 1.0)


def settings(method, graph, options):
    return dict(lr=LR, momentum=MOMENTUM, weight_decay=DECAY, method=method, topology=graph, timeout=30.0,
                bucket_mb=1e-6, **options)  # fmt: skip


def train(rank, method, graph, options, steps, missing=(), locally=None):
    """x before and after every step. missing: (step, rank) without a gradient; locally: steps up to each step(), by
    rank, for which the gradients are those of the x at hand."""
    worker = Worker(rank, torch.float64)
    optimizer = fused_dlam.GossipSGD(worker.params, **settings(method, graph, options))
    path = [worker.x]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        for k in range(1 if locally is None else locally[rank]):
            optimizer.zero_grad()
            if (step, rank) not in missing:
                worker.loss().backward()
            (optimizer.step if locally is None or k == locally[rank] - 1 else optimizer.local_step)()
        path.append(worker.x)
    optimizer.close()
    return torch.stack(path)


def train_each(rank, cases):
    return [train(rank, *case) for case in cases]


def settle(rank, method, graph, lr, steps):
    """Where it ends at a constant rate, without weight decay."""
    worker = Worker(rank, torch.float64)
    options = {**settings(method, graph, {}), "lr": lr, "momentum": 0.5, "weight_decay": 0.0}
    optimizer = fused_dlam.GossipSGD(worker.params, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        worker.loss().backward()
        optimizer.step()
    end = worker.x
    optimizer.close()
    return end


def resumed(rank, graph, folder):
    """Whether steps 9 to 14 after a checkpoint are those of a run that went on, bit for bit."""
    ends = []
    for loads in (False, True):
        worker = Worker(rank, torch.float64)
        model = torch.nn.ParameterList(worker.params)
        optimizer = fused_dlam.GossipSGD(worker.params, **settings("push-diging", graph(4), {}))
        for step in range(15):
            if step == 9:
                if loads:
                    fused_dlam.load_checkpoint(folder, model, optimizer)
                else:
                    fused_dlam.save_checkpoint(folder, model, optimizer)
            if loads and step < 9:
                continue
            optimizer.zero_grad()
            worker.loss().backward()
            optimizer.step()
        ends.append(worker.x)
        optimizer.close()
    return torch.equal(*ends)


def joined(rank, method, graph, counts):
    """x after an epoch in which ranks have unlike numbers of batches, and the steps taken."""
    worker = Worker(rank, torch.float64)
    optimizer = fused_dlam.GossipSGD(worker.params, **settings(method, graph, {}))
    with optimizer.join():
        for _ in range(counts[rank]):
            optimizer.zero_grad()
            worker.loss().backward()
            optimizer.step()
    end = worker.x
    optimizer.close()
    return end, optimizer._step


def machines(rank, method, graph, steps):
    """Two machines of two ranks: masses are those of machines."""
    worker = Worker(rank, torch.float64)
    with machines_of(2):
        optimizer = fused_dlam.GossipSGD(worker.params, **settings(method, graph, {"hierarchical": True}))
    path = [worker.x]
    for _ in range(steps):
        optimizer.zero_grad()
        worker.loss().backward()
        optimizer.step()
        path.append(worker.x)
    optimizer.close()
    return torch.stack(path)


def refused(rank):
    """What optimizers that know no masses say, and that nothing was left behind: the next one trains."""
    said = []
    for options in ({"method": "mi-dmsgd"}, {"method": "dmsgd", "allow_unstable": True}):
        try:
            fused_dlam.GossipSGD(Worker(rank, torch.float64).params, lr=0.1, topology=lopsided(4), **options)
        except ValueError as error:
            said.append(str(error))
    inner = torch.optim.SGD(Worker(rank, torch.float64).params, lr=0.1)
    for graph in (lopsided(4), lopsided):
        try:
            fused_dlam.Gossip(copy.copy(inner), topology=graph)
        except ValueError as error:
            said.append(str(error))
    return said


def least_squares():
    return problem(4)
