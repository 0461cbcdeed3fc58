"""Hugging Face Accelerate, its workers gossiping in the place of DistributedDataParallel.

`GossipAccelerator` is an `Accelerator` whose `prepare` moves models, compiles them and has them run under autocast, and
wraps them in nothing. What of it differs besides, and why:

    accumulate(model)           holds messages back in all but the last backward pass: `GossipSGD.no_sync`
    save_state, load_state      of all workers: Accelerate's write worker 0's and give it to all
    join_uneven_inputs(...)     is `optimizer.join()`
    the scaler (float16)        is `fused_dlam.GradScaler`: where any rank overflows, no rank steps

Written for Accelerate 1.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from fused_dlam import Gossip, GossipSGD, GradScaler, load_checkpoint, save_checkpoint


class GossipAccelerator(Accelerator):
    """An `Accelerator` for `GossipSGD` and `Gossip`, with the arguments of `Accelerator`.

    On a GPU move the model there before the optimizer is built: `model.to(accelerator.device)`.

    Raises ValueError for what owns gradients or parameters itself (DeepSpeed, FSDP, Megatron-LM), and in `prepare` for
    a model in DistributedDataParallel and one that `prepare` would move to another device.
    """

    scaler: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        kind = self.distributed_type.value
        if any(name in kind for name in ("DEEPSPEED", "FSDP", "MEGATRON", "XLA")):
            raise ValueError(
                f"{kind} owns parameters or gradients, and gossip is between whole models, one per process: choose"
                " plain multi-GPU or multi-CPU in `accelerate config`"
            )
        if self.scaler is not None:  # Accelerate's follows the overflows of one rank
            self.scaler = GradScaler(self.device.type)

    @property
    def gossip_optimizers(self) -> list[GossipSGD | Gossip]:
        """Those that were prepared, without Accelerate's wrapper."""
        inner = [getattr(one, "optimizer", one) for one in self._optimizers]
        return [one for one in inner if isinstance(one, (GossipSGD, Gossip))]

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        for thing in args:
            if isinstance(thing, (GossipSGD, Gossip)):
                self._check_device(thing)
        return super().prepare(*args, **kwargs)

    def _check_device(self, optimizer: GossipSGD | Gossip) -> None:
        here = next(p.device.type for group in optimizer.param_groups for p in group["params"])
        if self.device_placement and here != self.device.type:
            raise ValueError(
                f"prepare() would move the model from {here} to {self.device}, away from the optimizer's buffers: call"
                " model.to(accelerator.device) before the optimizer is built"
            )

    def prepare_model(self, model: torch.nn.Module, device_placement: bool | None = None, **_: Any) -> torch.nn.Module:
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, which would all-reduce the gradients of workers that"
                " gossip: pass it unwrapped, GossipAccelerator needs no wrapper"
            )
        return super().prepare_model(model, device_placement, evaluation_mode=True)

    @contextmanager
    def no_sync(self, model: torch.nn.Module) -> Iterator[None]:
        with ExitStack() as held:
            for one in self.gossip_optimizers:
                if isinstance(one, GossipSGD):  # Gossip sends when its step comes
                    held.enter_context(one.no_sync())
            yield

    @contextmanager
    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Iterator[None]:
        """`optimizer.join()` of the prepared optimizers, whose models `joinables` are. All ranks must enter it."""
        samplers: list[Any] = [getattr(loader, "batch_sampler", None) for loader in self._dataloaders]
        samplers = [s for s in samplers if even_batches is not None and hasattr(s, "even_batches")]
        before = [s.even_batches for s in samplers]
        try:
            with ExitStack() as joined:
                for one in self.gossip_optimizers:
                    joined.enter_context(one.join())
                for s in samplers:
                    s.even_batches = even_batches
                yield
        finally:
            for s, was in zip(samplers, before, strict=True):
                s.even_batches = was

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_state(self, output_dir: str | None = None, *_: Any, **__: Any) -> str:
        """Every worker's model, optimizer, schedulers and registered objects, by `fused_dlam.save_checkpoint`.

        Args:
            output_dir: a directory that all ranks can reach; the same again and again is safe.

        Random numbers are the script's: seed by epoch, say. Raises ValueError unless one model and one gossiping
        optimizer were prepared.
        """
        model, optimizer, others = self._whole(output_dir)
        save_checkpoint(str(output_dir), model, optimizer, **others)
        return str(output_dir)

    def load_state(self, input_dir: str | None = None, *_: Any, **__: Any) -> None:
        """Loads what `save_state` saved: by as many workers, bit for bit; by others, their mean."""
        model, optimizer, others = self._whole(input_dir)
        load_checkpoint(str(input_dir), model, optimizer, **others)

    def _whole(self, folder: str | Path | None) -> tuple[torch.nn.Module, GossipSGD | Gossip, dict[str, Any]]:
        optimizers = self.gossip_optimizers
        if folder is None or len(self._models) != 1 or len(optimizers) != 1:
            raise ValueError(
                f"save_state and load_state need a directory and one prepared model and optimizer; there are"
                f" {len(self._models)} and {len(optimizers)}, and the directory is {folder}: with more, call"
                " fused_dlam.save_checkpoint for each"
            )
        others = {f"scheduler{k}": one for k, one in enumerate(self._schedulers)}
        others |= {f"object{k}": one for k, one in enumerate(self._custom_objects)}
        if self.scaler is not None:
            others["scaler"] = self.scaler
        return self.unwrap_model(self._models[0]), optimizers[0], others
