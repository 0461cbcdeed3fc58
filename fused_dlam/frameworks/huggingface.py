"""Hugging Face's `Trainer`, its workers gossiping in the place of DistributedDataParallel.

    GossipTrainer(model, arguments, train_dataset=data, gossip={"topology": "ring"})

is a `Trainer` whose model stays unwrapped and whose optimizer is `Gossip(the one that the arguments name)`, or a
`GossipSGD`. What of it differs from a Trainer's, and why:

    evaluate, predict     on the workers' mean, on all ranks: a worker's own model is not what is kept
    checkpoints           the model's files, for `from_pretrained`, are the workers' mean; beside them, in gossip/, are
                          all workers' own models, optimizers and schedules, from which a run goes on bit for bit
    after train()         the model is the mean on every rank, so that rank 0 may save or use it alone
    accumulation          messages are held back in all but the last backward pass
    uneven data           every rank takes as many batches as the shortest has

Written for transformers 5.24 and Accelerate 1.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from fused_dlam import Gossip, GossipSGD, GradScaler, load_checkpoint, save_checkpoint

FOLDER = "gossip"  # in a checkpoint, of every worker's own state


class GossipTrainer(Trainer):
    """A `Trainer` that gossips. Started as ever, by `torchrun` or `accelerate launch`.

    Args:
        gossip: keyword arguments of `fused_dlam.Gossip`, which is built around the optimizer that `TrainingArguments`,
            `optimizers=` or `optimizer_cls_and_kwargs=` say. Not with a `GossipSGD`, which has arguments of its own:
            `optimizer_cls_and_kwargs=(GossipSGD, {"momentum": 0.9})`; its rate is the arguments' `learning_rate`, if
            it is given none.
        args, kwargs: as for `Trainer`.

    The output directory must be one that all ranks can reach. All ranks must call `train`, `evaluate`, `predict`, and
    `save_model` while it trains.

    Raises ValueError for a model in DistributedDataParallel and for what owns gradients or parameters itself (FSDP,
    DeepSpeed) or does on one rank what all must do (`auto_find_batch_size`); RuntimeError in a step for which a
    parameter of the model was replaced, by its name; `fused_dlam.ExchangeError` if a peer does not answer in time.
    """

    def __init__(self, *args: Any, gossip: Mapping[str, Any] | None = None, **kwargs: Any):
        self.gossip_options = dict(gossip or {})
        self._is_mean = False  # whether training has ended, and the model is the workers' mean on all ranks
        self._named: dict[str, torch.Tensor] = {}  # the optimizer's parameters by their names in the model
        super().__init__(*args, **kwargs)
        _check(self)
        _rate(self)
        self.callback_handler.callbacks.insert(0, _AtTheEnd(self))  # before those that save or send away the model

    @property
    def gossip_optimizer(self) -> GossipSGD | Gossip | None:
        """The optimizer without Accelerate's wrapper, once there is one: for `consensus_distance()` and the like."""
        inner = self.optimizer
        while inner is not None and not isinstance(inner, (GossipSGD, Gossip)):
            inner = getattr(inner, "optimizer", None)
        return inner

    # -- what is built -----------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # It moves the model and has its forward pass run under autocast, and wraps it in nothing.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        if self.accelerator.scaler is not None:  # Accelerate's follows the overflows of one rank
            self.accelerator.scaler = GradScaler(self.accelerator.device.type)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if self.gossip_optimizer is None:
            self.optimizer = optimizer = Gossip(optimizer, **self.gossip_options)
        elif self.gossip_options and not isinstance(self.gossip_optimizer, Gossip):
            raise ValueError(
                f"gossip={self.gossip_options} is for Gossip, and the optimizer is a GossipSGD: give them to that"
            )
        ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._named = {name: p for name, p in self.model.named_parameters() if id(p) in ours}
        if not self._named:
            raise ValueError(
                "none of the optimizer's parameters is the model's: build it over this model, or let GossipTrainer"
                " build it (optimizer_cls_and_kwargs=)"
            )
        return optimizer

    def get_train_dataloader(self) -> Any:
        return _as_long_as_the_shortest(super().get_train_dataloader())

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        optimizer = self.gossip_optimizer
        if self.accelerator.sync_gradients:
            self._check_parameters()
            return super().training_step(model, *args, **kwargs)
        with getattr(optimizer, "no_sync", nullcontext)():  # Gossip sends when its step comes
            return super().training_step(model, *args, **kwargs)

    def _check_parameters(self) -> None:
        """Raises RuntimeError for a parameter that is another object than the optimizer's."""
        now = dict(self.model.named_parameters(remove_duplicate=False))
        for name, p in self._named.items():
            if now.get(name) is not p:
                what = "another object" if name in now else "gone"
                raise RuntimeError(
                    f"the model's parameter {name} is {what} since the optimizer was built, which would train the old"
                    " one: it was replaced by a new layer, load_state_dict(assign=True), or a model.to() that makes new"
                    " parameters. Change the model before GossipTrainer builds the optimizer"
                )

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Where nothing is clipped: Trainer's writes the gradients, times 1, and messages that have left are void."""
        if grad_norm is not None:
            return grad_norm
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    # -- what is evaluated and saved is the mean ---------------------------------------------------------------------

    def _averaged(self) -> AbstractContextManager[None]:
        """Within it the model is the workers' mean. Before there is an optimizer it is whatever it was made."""
        optimizer = self.gossip_optimizer
        return nullcontext() if optimizer is None or self._is_mean else optimizer.averaged(self.model)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self._averaged():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.gossip_optimizer is not None:
            path, schedule = Path(output_dir) / FOLDER, self.lr_scheduler
            save_checkpoint(path, self.model, self.gossip_optimizer, scheduler=schedule)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, path = self.gossip_optimizer, Path(checkpoint) / FOLDER
        assert optimizer is not None
        seen = float(optimizer.mean(float((path / ".metadata").exists())))
        if 0 < seen < 1:
            raise ValueError(
                f"some ranks have {path} and some have not: it must be on a file system that all can reach"
            )
        if seen:
            load_checkpoint(path, self.model, optimizer, scheduler=self.lr_scheduler)
        else:  # one of a Trainer with DDP, or without an optimizer: all start from its model
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        assert self.gossip_optimizer is not None
        self.gossip_optimizer.synchronize()  # with schedule="awc" x is on its way
        super()._load_best_model()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._is_mean = False
        return super().train(*args, **kwargs)

    def _become_the_mean(self) -> None:
        """At the end of training: on all ranks."""
        optimizer = self.gossip_optimizer
        assert optimizer is not None
        optimizer.synchronize()
        if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):  # else all have loaded one file
            with optimizer.averaged(self.model):
                mean = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in self.model.state_dict().items()}
            self.model.load_state_dict(mean)
        self._is_mean = True


class _AtTheEnd(TrainerCallback):
    """Trainer tells its callbacks of the end of training, and no method of its own in all versions."""

    def __init__(self, trainer: GossipTrainer):
        self.trainer = trainer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._become_the_mean()


def _check(trainer: GossipTrainer) -> None:
    """Raises ValueError for what cannot gossip."""
    if isinstance(trainer.model, DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which would all-reduce the gradients of workers that"
            " gossip: pass the model unwrapped, GossipTrainer needs no wrapper"
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.n_gpu > 1:
        raise ValueError(
            "DeepSpeed, FSDP and DataParallel own parameters or gradients, and GossipTrainer gossips with a whole model"
            " per process: start one process per GPU (torchrun --nproc-per-node) without deepspeed= and fsdp=. For"
            " FSDP2 inside a machine write the loop yourself, with hierarchical=mesh"
        )
    if trainer.args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size starts one rank anew, and the others would wait for it: set the batch size"
        )
    if trainer.args.fp16_full_eval or trainer.args.bf16_full_eval:
        raise ValueError(
            "fp16_full_eval and bf16_full_eval convert the parameters that are trained: use bf16=True, which evaluates"
            " under autocast"
        )


def _rate(trainer: GossipTrainer) -> None:
    """A `GossipSGD` without a rate of its own takes the arguments'."""
    if trainer.optimizer_cls_and_kwargs is not None:
        kind, options = trainer.optimizer_cls_and_kwargs
        if isinstance(kind, type) and issubclass(kind, GossipSGD):
            trainer.optimizer_cls_and_kwargs = kind, {"lr": trainer.args.learning_rate, **options}


def _as_long_as_the_shortest(loader: Any) -> Any:
    """A data loader that has, and says that it has, as many batches as that of the rank with the fewest."""
    try:
        own = len(loader)
    except TypeError:  # its length is unknown: then max_steps counts, the same on all ranks
        own = -1
    everybodys = gather_object([own])
    least = min(everybodys)
    if least == max(everybodys):
        return loader
    if least < 1:
        raise ValueError(
            f"the ranks have {everybodys} batches (-1: a length that is not known): give every rank at least one, and"
            " data of one kind"
        )

    class Shortened(type(loader)):  # type: ignore[misc]
        def __len__(self) -> int:
            return least

        def __iter__(self) -> Any:
            for _, batch in zip(range(least), super().__iter__(), strict=False):
                yield batch
            if hasattr(self, "end"):  # of Accelerate's, which notes at its last batch that it is through
                self.end()

    loader.__class__ = Shortened
    return loader
