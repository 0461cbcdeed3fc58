"""Trains a convolutional network on handwritten digits, data parallel: every worker has its share of the images.

After each epoch every worker saves a checkpoint of its own, for its dropout has random numbers of its own, and --resume
goes on from there. model.pt is the model for use.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

TEST_IMAGES = 400  # of 1,797; the others are trained on


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images [1, 8, 8] in [0, 1] and their labels, to train on and to test with; the same on every worker."""
    data, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(data).float().reshape(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]
    train, test = slice(TEST_IMAGES, None), slice(TEST_IMAGES)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def train(args: argparse.Namespace) -> float:
    """One worker's part of the training; returns the test accuracy in percent."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    random = torch.cuda if device.type == "cuda" else torch
    training, test = digits()
    sampler: DistributedSampler = DistributedSampler(training)
    loader = DataLoader(training, args.batch_size, sampler=sampler)
    test_images, test_labels = (t[rank::workers].to(device) for t in test.tensors)

    torch.manual_seed(0)
    net = network().to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = CosineAnnealingLR(optimizer, args.epochs * len(loader))
    scaler = GradScaler(device.type, enabled=args.amp)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}

    checkpoint = args.out / f"checkpoint{rank}.pt"
    first_epoch, accuracy = 0, 0.0
    torch.manual_seed(1 + rank)
    if args.resume:
        saved = torch.load(checkpoint, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        random.set_rng_state(saved["random"])
        first_epoch, accuracy = saved["epoch"], saved["accuracy"]

    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(device.type, enabled=args.amp):
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()

        model.eval()
        with torch.no_grad():
            right = (model(test_images).argmax(1) == test_labels).sum()
            dist.all_reduce(right)
            accuracy = 100 * right.item() / len(test)
            if rank == 0:
                print(f"epoch {epoch + 1}: test accuracy {accuracy:.1f} %", flush=True)
                torch.save(net.state_dict(), args.out / "model.pt")

        state = {name: part.state_dict() for name, part in parts.items()}
        state.update(random=random.get_rng_state(), epoch=epoch + 1, accuracy=accuracy)
        torch.save(state, checkpoint.with_suffix(".new"))
        dist.barrier()  # so that a run that dies while they write leaves checkpoints of one epoch
        checkpoint.with_suffix(".new").replace(checkpoint)
    return accuracy


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="images per worker and step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start; cosine to zero")
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on GPUs, bfloat16 on CPUs")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder of checkpoints and model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints there")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = arguments()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
