"""Curves for TensorBoard: how far apart the workers are, and what a step sends.

    torchrun --nproc-per-node 4 -m fused_dlam.examples.dashboard && tensorboard --logdir digits

Each worker has images of few labels only, so that its own gradient drags it away from the others; the distance falls
with the learning rate, 0.49 after 5 steps to below 0.001. Needs `pip install tensorboard`.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.tensorboard import SummaryWriter

from fused_dlam import GossipSGD

from .gossip import digits, network


class Curves:
    """Writes `gossip/consensus_distance` and `gossip/bytes_per_step` in every k-th step.

    The distance is an exact average of all parameters, over all workers, so every worker must call this after every
    step; worker 0 writes. What the average itself sends, 2 (n-1)/n of the parameters, is not in bytes_per_step.

    Args:
        optimizer: the `GossipSGD`.
        folder: of the event files.
        every: steps from one point to the next, the same on all workers.
    """

    def __init__(self, optimizer: GossipSGD, folder: Path, every: int):
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self.optimizer, self.every = optimizer, every
        self.writer = SummaryWriter(str(folder)) if dist.get_rank() == 0 else None
        self.bytes_sent = optimizer.bytes_sent

    def __call__(self, step: int, **more: float) -> None:
        """After step number `step`, the first being 1; `more` are curves of worker 0's own, by name."""
        if step % self.every:
            return
        sent = self.optimizer.bytes_sent - self.bytes_sent
        distance = self.optimizer.consensus_distance()  # on all workers, like every exchange
        self.bytes_sent = self.optimizer.bytes_sent
        if self.writer is not None:
            self.writer.add_scalar("gossip/consensus_distance", distance, step)
            self.writer.add_scalar("gossip/bytes_per_step", sent / self.every, step)
            for name, value in more.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def train(args: argparse.Namespace) -> None:
    """One worker's part of the training, full local batch."""
    training, _ = digits()
    images, labels = training.tensors
    mine = labels.argsort(stable=True).tensor_split(dist.get_world_size())[dist.get_rank()]
    torch.manual_seed(0)
    model = network()
    optimizer = GossipSGD(model.parameters(), args.lr)
    scheduler = CosineAnnealingLR(optimizer, args.steps)
    curves = Curves(optimizer, args.out, args.every)
    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        curves(step, loss=loss.item(), lr=optimizer.param_groups[0]["lr"])
        scheduler.step()
    curves.close()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Handwritten digits by gossip, with curves for TensorBoard.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="steps from one point to the next")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start; cosine to zero")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder of the event files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(arguments())
    dist.destroy_process_group()
