"""The digits of gossip.py with Hugging Face Accelerate: its launcher, precision, accumulation and data loaders.

    accelerate launch --num_processes 4 -m fused_dlam.examples.accelerated

What Accelerate 1.15 does, and what that leaves to be done by hand:

- `prepare(model)` wraps a model in DistributedDataParallel, which gossip has no use for: its workers differ.
  `prepare_model(model, evaluation_mode=True)` only moves it to the device and puts its forward pass under autocast.
- `accumulate(optimizer)` in place of `accumulate(model)`: it asks for `no_sync`, which `GossipSGD` has.
- Its GradScaler (float16) follows one rank's overflows; `fused_dlam.GradScaler` takes its place.
- `accelerator.clip_grad_norm_` works, but keeps messages back until `step`; `max_grad_norm=` does not.

What does not work:

- `save_state` and `save_model`: with safetensors, their default, Accelerate takes parameters for copies of one tensor,
  for they are views of one flat buffer, and drops all but one ("Removed shared tensor"); without, it writes the model
  and optimizer of worker 0 alone, and `load_state` gives them to all. `fused_dlam.save_checkpoint` has every worker's.
- Plug-ins that own gradients or parameters: DeepSpeed, FSDP, Megatron-LM and DDP's communication hooks.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from fused_dlam import GossipSGD, GradScaler, save_checkpoint

from .gossip import digits, network


def train(args: argparse.Namespace) -> float:
    """One worker's part of the training; returns the test accuracy in percent."""
    accelerator = Accelerator(
        mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate, cpu=not torch.cuda.is_available()
    )
    accelerator.scaler = GradScaler(accelerator.device.type, enabled=args.precision == "fp16")
    torch.manual_seed(0)
    training, test = digits()
    model = accelerator.prepare_model(network(), evaluation_mode=True)
    gossip = GossipSGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = CosineAnnealingLR(gossip, args.epochs)  # not prepared, which would step it once per process
    optimizer, loader, tests = accelerator.prepare(
        gossip, DataLoader(training, args.batch_size, shuffle=True), DataLoader(test, args.batch_size)
    )
    torch.manual_seed(1 + accelerator.process_index)  # of dropout

    accuracy = 0.0
    for epoch in range(args.epochs):
        model.train()
        for images, labels in loader:
            with accelerator.accumulate(gossip):
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()

        model.eval()
        right = []
        with torch.no_grad(), gossip.averaged(model):
            for images, labels in tests:
                right.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
            accelerator.save(model.state_dict(), args.out / "model.pt")  # on worker 0: they are equal here
        accuracy = 100 * torch.cat(right).float().mean().item()
        accelerator.print(f"epoch {epoch + 1}: test accuracy {accuracy:.1f} %", flush=True)

        save_checkpoint(args.out / f"epoch{epoch + 1}", model, gossip, scheduler=scheduler)
    return accuracy


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Handwritten digits by gossip, with Hugging Face Accelerate.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="images per worker and backward pass")
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes per step")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate at the start; cosine to zero")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--out", type=Path, default=Path("digits"), help="folder of checkpoints and model")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    train(arguments())
    torch.distributed.destroy_process_group()
