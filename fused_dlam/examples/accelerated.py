"""The digits of gossip.py with Hugging Face Accelerate: its launcher, precision, accumulation and data loaders.

    accelerate launch --num_processes 4 -m fused_dlam.examples.accelerated

`GossipAccelerator` is an `Accelerator` whose `prepare` wraps no model in DistributedDataParallel; `accumulate(model)`
holds messages back, and `save_state` has every worker's state ([what differs](../frameworks/accelerate.py)). An
`Accelerator` as it is ends at the first step with an error that says so.

- Schedulers that are prepared step once per process, as ever in Accelerate: this one is not.
- `accelerator.clip_grad_norm_` works, but keeps messages back until `step`; `max_grad_norm=` does not.
- `save_model` saves a worker's own model: call it within `averaged`, on all ranks, for the mean.
- DeepSpeed, FSDP and Megatron-LM, which own gradients or parameters, are refused.
"""

import argparse
from pathlib import Path

import torch
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from fused_dlam import GossipSGD
from fused_dlam.frameworks.accelerate import GossipAccelerator

from .gossip import digits, network


def train(args: argparse.Namespace) -> float:
    """One worker's part of the training; returns the test accuracy in percent."""
    accelerator = GossipAccelerator(
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the order is the epoch's, see set_epoch
        cpu=not torch.cuda.is_available(),
    )
    torch.manual_seed(0)
    training, test = digits()
    net = network().to(accelerator.device)
    gossip = GossipSGD(net.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    model, optimizer, loader, tests = accelerator.prepare(
        net, gossip, DataLoader(training, args.batch_size, shuffle=True), DataLoader(test, args.batch_size)
    )
    scheduler = CosineAnnealingLR(gossip, args.epochs)
    accelerator.register_for_checkpointing(scheduler)
    if args.resume:
        accelerator.load_state(args.out / "last")  # as many workers go on bit for bit, others from the mean

    accuracy = 0.0
    for epoch in range(scheduler.last_epoch, args.epochs):
        torch.manual_seed(1000 * epoch + accelerator.process_index)  # of dropout
        loader.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()

        model.eval()
        right = []
        with torch.no_grad(), gossip.averaged(model):
            for images, labels in tests:
                right.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
            accelerator.save(net.state_dict(), args.out / "model.pt")  # on worker 0: they are equal here
        accuracy = 100 * torch.cat(right).float().mean().item()
        accelerator.print(f"epoch {epoch + 1}: test accuracy {accuracy:.1f} %", flush=True)

        accelerator.save_state(args.out / "last")
    return accuracy


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Handwritten digits by gossip, with Hugging Face Accelerate.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="images per worker and backward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes per step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start; cosine to zero")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder of checkpoints and model")
    parser.add_argument("--resume", action="store_true", help="go on from the last epoch that was saved in --out")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    train(arguments())
    torch.distributed.destroy_process_group()
