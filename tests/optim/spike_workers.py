"""What test_spikes.py runs on its workers."""

import torch
import workers

import fused_dlam


def size_of(step, rank):
    """What a rank's gradient is multiplied by in a step: now and then a spike."""
    return 30.0 if (7 * step + 3 * rank) % 11 == 0 else 1.0


def train_each(rank, cases, steps):
    """(every step's trained parameters, bytes sent) of each case: a method and its options."""
    return [_train(rank, method, options, steps) for method, options in cases]


def _train(rank, method, options, steps):
    model, x = workers.Tied(), workers.data(rank)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.0, method=method, **options)
    path = [workers.trained(model).clone()]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = workers.lr_at(step)
        optimizer.zero_grad()
        (size_of(step, rank) * model.loss(x)).backward()
        optimizer.step()
        path.append(workers.trained(model).clone())
    return torch.stack(path), optimizer.bytes_sent


def spiky(rank):
    """(running norms after each step, how far x moved in each); rank 1 has odd gradients. See the test."""
    p = torch.nn.Parameter(torch.zeros(8))
    optimizer = fused_dlam.GossipSGD([p], lr=0.1, momentum=0.0, method="dmsgd", clip="spikes")
    scaler = fused_dlam.GradScaler("cpu", init_scale=4096.0)
    norms, moved = [], []
    for step in range(14):
        optimizer.zero_grad()
        scaler.scale((p * torch.ones(8)).sum()).backward()
        if rank == 1 and step == 6:
            p.grad *= 1000
        if step == 8:
            p.grad.zero_()
        if step == 10:
            p.grad = None
        if step == 9:
            p.grad[3] = float("inf")  # on all ranks: the step is skipped, and tells nothing
        before = p.detach().clone()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved.append(float((p.detach() - before).norm()))
        norms.append(next(v for k, v in optimizer.param_groups[0]["memory"].items() if k.startswith("usual norm")))
    return norms, moved


def relaid(rank):
    """(how far each parameter moves after a checkpoint was loaded into other buckets, what the mean remembers)."""
    ends, means = [], []
    for bucket_mb in (1e-6, 1.0):
        small, large = (torch.nn.Parameter(torch.zeros(8)) for _ in range(2))
        optimizer = fused_dlam.GossipSGD(
            [small, large], lr=0.1, momentum=0.0, method="dmsgd", clip="spikes", bucket_mb=bucket_mb
        )
        if ends:
            optimizer.load_state_dict(ends[0])
        before = [p.detach().clone() for p in (small, large)]
        for p, size in ((small, 1.0 if ends else 1e-4 * (rank + 1)), (large, 1.0)):
            p.grad = torch.full((8,), size)
        optimizer.step()
        ends.append(optimizer.state_dict())
        means.append(optimizer.consensus_state_dict()["param_groups"])
        moved = [float((p.detach() - old).norm()) for p, old in zip((small, large), before, strict=True)]
    return moved, means
