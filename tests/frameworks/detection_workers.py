"""What worker processes run in the tests of the detection example."""

from unittest import mock

import torch

import fused_dlam
from fused_dlam.examples import detection
from fused_dlam.examples.detection_model import parameter_groups, small


def run(rank, line):
    """What `train` returns for a command line, and what this worker had when it saved for the last time."""
    kept = {}

    def keep(path, net, optimizer, **parts):
        fused_dlam.save_checkpoint(path, net, optimizer, **parts)
        kept.update({name: part.state_dict() for name, part in parts.items()})
        kept.update(net=net.state_dict(), optimizer=optimizer.state_dict())

    with mock.patch.object(detection, "save_checkpoint", keep):
        history = detection.train(detection.arguments(line))
    return history, copied(kept)


def copied(value):
    """Without views of flat buffers, for the way to the test."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list | tuple) else value


def without_gradients(rank, lr):
    """Steps in which rank 1 has nothing to learn boxes from; what every rank's parameters were before and after each.

    The third step is as all others are, to see that the run goes on.
    """
    torch.manual_seed(0)
    net = small(4, 64, 3)
    optimizer = fused_dlam.GossipSGD(parameter_groups(net, 0.0, None), lr, momentum=0.9, timeout=60)
    torch.manual_seed(1 + rank)
    box = {"boxes": torch.tensor([[10.0, 12.0, 30.0, 34.0]]), "labels": torch.tensor([2])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    found = []
    for step, classes_alone in enumerate((True, False, False)):
        targets = [nothing if rank == 1 and step < 2 else box] * 2
        before = copied(dict(net.named_parameters()))
        optimizer.zero_grad()
        losses = net([torch.rand(3, 64, 64) for _ in targets], targets)
        if rank == 1 and classes_alone:
            losses = {"loss_classifier": losses["loss_classifier"]}
        sum(losses.values()).backward()
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        found.append({
            "losses": {name: loss.item() for name, loss in losses.items()},
            "before": before, "gradients": gradients, "after": copied(dict(net.named_parameters())),
        })  # fmt: skip
    return found


def wrapped_twice(rank):
    """The error of gossip over a model in DDP."""
    net = torch.nn.parallel.DistributedDataParallel(small(4, 64, 3))
    try:
        fused_dlam.GossipSGD(parameter_groups(net, 0.0, None), 0.1, timeout=60)
    except ValueError as error:
        return str(error)
    return "no error"


def mean_of_losses(rank):
    """The mean of a dictionary of losses: as reduce_dict takes it, and as one tensor."""
    optimizer = fused_dlam.GossipSGD([torch.nn.Parameter(torch.zeros(2))], timeout=60)
    losses = {"boxes": torch.tensor(1.0 + rank), "classes": torch.tensor(5.0 - rank)}
    try:
        optimizer.mean(losses)
    except TypeError as error:
        return str(error), optimizer.mean(torch.stack(list(losses.values())))
    return "no error", None
