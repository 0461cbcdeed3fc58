"""Trains a detector, data parallel, in the shape of torchvision's reference script with the optimizer dropped in.

    fused-dlam run -n 2 -m fused_dlam.examples.detection --optimizer gossip        or decentlam, pmsgd (all-reduce), ddp
    torchrun --nproc-per-node 2 -m fused_dlam.examples.detection --uneven

What differs from the reference (references/detection/train.py and engine.py of pytorch/vision): the model is not
wrapped; `optimizer.averaged` around evaluation, of the model and of its moving average (EMA); `optimizer.mean` in the
place of reduce_dict, once per line that is printed and not in every step; every worker's checkpoint. Images are drawn
(detection_data.py), so that it runs anywhere: a small model learns them on two cores in two minutes. --data-path takes
COCO's. It needs torchvision.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR, MultiStepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from fused_dlam import GossipSGD, load_checkpoint, save_checkpoint

from .average_precision import average_precision, matches
from .detection_data import COCO_CLASSES, SHAPES, Shapes, coco, collate, transforms
from .detection_model import build, models, parameter_groups

METHODS = {  # --optimizer: a rule, and the topology that it gets if none is asked for
    "gossip": ("mi-dmsgd", "one-peer-exponential"),
    "decentlam": ("decentlam", "symmetric-exponential"),
    "pmsgd": ("pmsgd", "full"),
}


class Epoch(NamedTuple):
    """What is known after an epoch; on all ranks the same."""

    losses: dict[str, float]  # the mean over its steps and all ranks, by their names
    precision: float  # the mean over classes of the average precision at IoU 0.5, of the workers' mean
    ema_precision: float  # the same of the mean of the workers' EMAs


class Progress:
    """What else a worker needs to go on where it was: the epoch, and its random numbers (Faster R-CNN draws boxes)."""

    def __init__(self, device: torch.device):
        self.epoch, self.device = 0, device

    def state_dict(self) -> dict[str, Any]:
        here = {"gpu": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"epoch": self.epoch, "random": torch.get_rng_state(), **here}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["gpu"].cpu(), self.device)


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    """This worker's training data, its share of the validation data, and the number of classes with the background."""
    rank, workers = dist.get_rank(), dist.get_world_size()
    training: Any
    validation: Any
    if args.data_path is not None:
        training = coco(args.data_path, "train", transforms(train=True))
        validation, classes = coco(args.data_path, "val", transforms(train=False)), COCO_CLASSES
        sampler: DistributedSampler = DistributedSampler(training, workers, rank)
    else:
        favorite = 1 + rank % len(SHAPES) if args.uneven else None
        training = Shapes(args.images, args.size, 1 + rank, favorite, transforms(train=True))
        validation, classes = Shapes(args.test_images, args.size, 0, None, transforms(train=False)), 1 + len(SHAPES)
        sampler = DistributedSampler(training, 1, 0)  # all images of this worker's own
    options: dict[str, Any] = {"batch_size": args.batch_size, "num_workers": args.workers, "collate_fn": collate}
    share = Subset(validation, range(rank, len(validation), workers))
    own = torch.Generator()  # a loader draws a number in every pass: looking must not change what training draws
    loader = DataLoader(training, sampler=sampler, drop_last=True, **options)
    return loader, DataLoader(share, generator=own, **options), classes


def choose(args: argparse.Namespace, net: nn.Module) -> tuple[nn.Module, Any]:
    """The model as it is called in training, and its optimizer."""
    groups = parameter_groups(net, args.weight_decay, args.norm_weight_decay)
    if args.optimizer == "ddp":
        return DistributedDataParallel(net), torch.optim.SGD(groups, args.lr, args.momentum)
    method, topology = METHODS[args.optimizer]
    return net, GossipSGD(
        groups, args.lr, args.momentum, method=args.method or method, topology=args.topology or topology,
        max_grad_norm=args.clip_grad_norm, timeout=args.timeout,
    )  # fmt: skip


def mean(optimizer: Any, value: torch.Tensor) -> torch.Tensor:
    """The mean over all ranks, on each of them."""
    if isinstance(optimizer, GossipSGD):
        return optimizer.mean(value)
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def train_one_epoch(
    model: nn.Module, optimizer: Any, loader: DataLoader, device: torch.device, epoch: int, args: argparse.Namespace,
    ema: AveragedModel | None,
) -> dict[str, float]:  # fmt: skip
    """The losses, a mean over all steps and ranks. Raises FloatingPointError on all ranks if they are not finite."""
    model.train()
    warm_up = None
    if epoch == 0 and len(loader) > 1:
        warm_up = LinearLR(optimizer, start_factor=1 / 1000, total_iters=min(1000, len(loader) - 1))

    names: list[str] = []
    since, whole = torch.zeros(()), torch.zeros(())  # sums since the last line, on this rank; of the epoch, on all
    for i, (images, targets) in enumerate(loader, 1):
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            losses = model(images, targets)
            loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad_norm is not None and not isinstance(optimizer, GossipSGD):
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        optimizer.step()
        if warm_up is not None:
            warm_up.step()
        if ema is not None:
            ema.update_parameters(getattr(model, "module", model))  # DDP has it there

        names = sorted(losses)
        since = since + torch.stack([losses[name].detach().double() for name in names])
        if i % args.print_freq == 0 or i == len(loader):
            steps = (i - 1) % args.print_freq + 1
            now = mean(optimizer, since) / steps
            whole, since = whole.to(device) + now * steps, torch.zeros_like(since)
            said = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, now.tolist(), strict=True))
            if not now.isfinite().all():  # on all ranks, for all have the same mean
                raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}: {said}")
            if dist.get_rank() == 0:
                lr = optimizer.param_groups[0]["lr"]
                print(f"epoch {epoch + 1} [{i}/{len(loader)}] lr {lr:.4f} loss {now.sum():.3f} ({said})", flush=True)
    return dict(zip(names, (whole / len(loader)).tolist(), strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """The mean average precision at IoU 0.5 over all ranks' images; on all ranks, whose models must be equal."""
    was_training = model.training
    model.eval()
    found, there = [], []
    for images, targets in loader:
        outputs = model([image.to(device) for image in images])
        found += [{name: value.cpu() for name, value in output.items()} for output in outputs]
        there += targets
    model.train(was_training)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, matches(found, there))
    precisions = average_precision(parts)
    return math.fsum(precisions.values()) / max(1, len(precisions))


def train(args: argparse.Namespace) -> list[Epoch]:
    """One worker's part of the training; returns what was found before it and after every epoch."""
    rank = dist.get_rank()
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    loader, test_loader, classes = loaders(args)

    torch.manual_seed(args.seed)  # alike on all ranks: frozen layers and buffers are not exchanged
    net = build(args.model, classes, args.size, args.trainable_backbone_layers, args.weights_backbone).to(device)
    model, optimizer = choose(args, net)
    gossips = isinstance(optimizer, GossipSGD)
    scheduler = MultiStepLR(optimizer, milestones=args.lr_steps, gamma=args.lr_gamma)
    ema = None
    if args.ema_decay:
        ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)
    progress = Progress(device)
    parts: dict[str, Any] = {"scheduler": scheduler, "progress": progress, **({"ema": ema} if ema else {})}
    torch.manual_seed(1 + rank + args.seed)
    if args.resume:
        count = load_checkpoint(args.out / "checkpoint", net, optimizer, **parts)
        if count != dist.get_world_size():  # all have worker 0's random numbers
            torch.manual_seed(1 + rank + args.seed + progress.epoch * 1000)

    def look(losses: dict[str, float]) -> Epoch:
        """Evaluates the workers' mean, and saves it for use."""
        precision = []
        for name, one in (("model", net), ("ema", ema)):
            if one is None:
                precision.append(math.nan)
                continue
            with optimizer.averaged(one) if gossips else nullcontext():
                precision.append(evaluate(one, test_loader, device))
                if rank == 0:
                    whole = one.module if isinstance(one, AveragedModel) else one
                    torch.save(whole.state_dict(), args.out / f"{name}.pt")
        return Epoch(losses, *precision)

    def report(epoch: int, begin: float) -> None:
        apart = f", workers {optimizer.consensus_distance():.2e} apart" if gossips else ""
        if rank == 0:
            *_, precision, ema_precision = history[-1]
            head = f"epoch {epoch}" if epoch else "before training"
            averages = "" if ema is None else f", of the EMA {ema_precision:.3f}"
            print(f"{head}: AP50 {precision:.3f}{averages}{apart}, {time.monotonic() - begin:.0f} s", flush=True)

    begin = time.monotonic()
    history = [look({})]
    report(progress.epoch, begin)
    for epoch in range(progress.epoch, args.epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        losses = train_one_epoch(model, optimizer, loader, device, epoch, args, ema)
        scheduler.step()
        history.append(look(losses))
        report(epoch + 1, begin)
        progress.epoch = epoch + 1
        if gossips:
            save_checkpoint(args.out / "checkpoint", net, optimizer, **parts)
    return history


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A detector by gossip.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=(*METHODS, "ddp"), default="gossip", help="ddp: for comparison, without checkpoints")
    add("--method", help="another rule than the optimizer's own, as nesterov-pc-dmsgd")
    add("--topology", help="another than its own")
    add("--model", choices=models(), default="small", help="a small Faster R-CNN, or one of torchvision's models")
    add("--weights-backbone", help="weights that torchvision downloads")
    add("--trainable-backbone-layers", type=int, default=3, help="of the small model's four; the others are frozen")
    add("--data-path", type=Path, help="COCO's folder, in place of images that are drawn")
    add("--images", type=int, default=400, help="drawn images per worker")
    add("--test-images", type=int, default=200, help="drawn images to evaluate on, of all workers together")
    add("--size", type=int, default=96, help="pixels of an image's side")
    add("--uneven", action="store_true", help="four of five shapes of a worker are of one class")
    add("-b", "--batch-size", type=int, default=4, help="images per worker and step")
    add("-j", "--workers", type=int, default=0, help="processes that load data, per worker")
    add("--epochs", type=int, default=8)
    add("--lr", type=float, default=0.02, help="learning rate, after a linear warm-up in the first epoch")
    add("--lr-steps", type=int, nargs="+", default=[6], help="epochs after which the learning rate falls")
    add("--lr-gamma", type=float, default=0.1, help="by this factor")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--norm-weight-decay", type=float, help="of normalization layers, if it is another")
    add("--clip-grad-norm", type=float, help="largest norm of a worker's gradient (with ddp: of the mean gradient)")
    add("--ema-decay", type=float, default=0.99, help="of the moving average of the model; 0: none")
    add("--amp", action="store_true", help="bfloat16 autocast in training")
    add("--seed", type=int, default=0, help="of the model, and of what training draws")
    add("--print-freq", type=int, default=50, help="steps between lines")
    add("--timeout", type=float, default=600.0, help="seconds after which waiting for a peer is an error")
    add("--out", type=Path, default=Path("detection"), help="folder of checkpoints and models")
    add("--resume", action="store_true", help="go on from the checkpoint there")
    args = parser.parse_args(argv)
    if args.resume and args.optimizer == "ddp":
        parser.error("--resume goes on from a checkpoint of gossip: --optimizer ddp saves none")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = arguments()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=args.timeout))
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
