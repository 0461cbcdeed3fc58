"""PyTorch Lightning: `Trainer(strategy=GossipStrategy(), devices=4)`.

Of Lightning's DDP strategy it keeps processes, process group and reductions of metrics, and leaves out DDP: the model
stays unwrapped, and the optimizer that `configure_optimizers` returns exchanges. Lightning calls on all ranks what is
overridden here, in this order:

    setup                      the model to its device, rank 0's values to all, optimizers, a scaler of all ranks
    process_dataloader         training data end on all ranks when they end on one
    block_backward_sync        around the backward passes that accumulate
    on_validation_start, _end  the workers' mean in the model; checkpoints of ModelCheckpoint are saved between
    save_checkpoint            the mean in the file, every worker's own state beside it
    on_train_end               the mean in the model, for whatever the script does with it next
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins import precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType

from .. import Gossip, GossipSGD, GradScaler
from . import clipping, own_states
from .shortest import Shortest
from .unwrapped import seen_through


class GossipStrategy(DDPStrategy):
    """A Lightning strategy for models that are trained by `GossipSGD` or `Gossip`.

    Args:
        timeout: seconds after which a wait in Lightning's own exchanges is an error; the optimizer has its own.
        start_method: "popen" starts the script anew for every rank, "fork", "spawn" and "forkserver" start processes
            of this one, for notebooks, say. Under torchrun, SLURM and other launchers nothing is started.
        process_group_backend: "gloo", "nccl"; default: by the device.
        others: as of every strategy. The Trainer sets them.

    Raises TypeError, as fit() begins, for an optimizer that does not gossip.
    """

    def __init__(
        self,
        timeout: float = 600.0,
        start_method: str = "popen",
        process_group_backend: str | None = None,
        *,
        accelerator: Any = None,
        parallel_devices: Any = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ):
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend=process_group_backend,
            timeout=own_states.deadline(timeout),
            start_method=start_method,  # type: ignore[arg-type]
        )
        self._evaluation = ExitStack()  # holds the mean in the model, within evaluation
        self._evaluating = False
        self._loaded_from: str | PathLike[str] | None = None
        self._own_loaded = False  # whether every worker's own state was loaded, the optimizers' among it

    # -- setup -------------------------------------------------------------------------------------------------------

    def configure_ddp(self) -> None:
        """In the place of DDP: the model as it is, with rank 0's values of what no optimizer holds."""
        _sync_module_states(self.model)

    def setup_optimizers(self, trainer: Any) -> None:
        for optimizer in self._gossips:  # of an earlier fit
            optimizer.close()
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if optimizer.param_groups:  # Lightning's stand-in for none has no group
                seen_through(own_states.check(optimizer, "GossipStrategy"))

    def setup_precision_plugin(self) -> None:
        scaler = getattr(self.precision_plugin, "scaler", None)
        if isinstance(scaler, torch.amp.GradScaler) and not isinstance(scaler, GradScaler):
            # Of an overflow on one rank all must learn. What a scaler was built with is in its state.
            ours = GradScaler(scaler._device, enabled=scaler.is_enabled())
            ours.load_state_dict(scaler.state_dict())
            self.precision_plugin.scaler = ours
        if type(self.precision_plugin) is precision.MixedPrecision:
            self.precision_plugin.__class__ = MixedPrecision  # the same object, for scripts hold it
        super().setup_precision_plugin()

    @property
    def _gossips(self) -> list[GossipSGD | Gossip]:
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, (GossipSGD, Gossip))]

    # -- training ----------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        """A training dataloader that ends on all ranks when it ends on one, for all must step equally often."""
        trainer = self.lightning_module.trainer
        if self.world_size == 1 or not trainer.training:
            return dataloader
        return Shortest.of(dataloader, self.reduce_boolean_decision, self._smallest)

    def _smallest(self, number: int) -> int:
        value = torch.tensor(number, device=self.root_device)
        return int(self.reduce(value, reduce_op="min"))

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with ExitStack() as stack:
            for optimizer in self._gossips:
                if isinstance(optimizer, GossipSGD):  # Gossip sends nothing before step()
                    stack.enter_context(optimizer.no_sync())
            yield

    def on_train_end(self) -> None:
        """Puts the mean into every worker's model: what a script tests and saves after fit() is what was validated."""
        super().on_train_end()
        gossips = self._gossips
        if not gossips:
            return
        values = [*self.lightning_module.parameters(), *self.lightning_module.buffers()]
        with own_states.averaged(gossips, self.lightning_module):
            means = own_states.cloned(values)
        for optimizer in gossips:
            optimizer.synchronize()
        with torch.no_grad():
            for value, mean in zip(values, means, strict=True):
                value.copy_(mean)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _begin_evaluation(self) -> None:
        """Puts the mean into the model. Outside of fit() nothing trains, and it is there already."""
        if self._gossips and not self._evaluating and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._evaluation.enter_context(own_states.averaged(self._gossips, self.lightning_module))
            self._evaluating = True

    def _end_evaluation(self) -> None:
        self._evaluating = False
        self._evaluation.close()

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._begin_evaluation()

    def on_validation_end(self) -> None:
        self._end_evaluation()
        super().on_validation_end()

    def on_exception(self, exception: BaseException) -> None:
        self._end_evaluation()  # each worker has its own back; this exchanges nothing
        super().on_exception(exception)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @contextmanager
    def _mean(self) -> Iterator[None]:
        with ExitStack() as stack:
            if not self._evaluating:
                stack.enter_context(own_states.averaged(self._gossips, self.lightning_module))
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The mean's, on all ranks."""
        with self._mean():
            return own_states.cloned(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The mean's, on all ranks: with it a file alone starts training again, on any number of workers."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # without Lightning's wrapper
        if optimizer not in self._gossips:
            return super().optimizer_state(optimizer)
        with self._mean():
            return own_states.cloned(optimizer.consensus_state_dict())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | PathLike[str], storage_options: Any = None
    ) -> None:
        folder = None
        if "optimizer_states" in checkpoint and self._gossips:  # else weights alone are wanted
            evaluating = self._evaluating
            self._end_evaluation()
            try:
                entry = own_states.save(filepath, self.lightning_module, self._gossips, self.broadcast)
            finally:
                if evaluating:
                    self._begin_evaluation()
            checkpoint[own_states.KEY], folder = entry, entry["folder"]
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.is_global_zero and "://" not in str(filepath):
            own_states.tidy(filepath, folder)

    def remove_checkpoint(self, filepath: str | PathLike[str]) -> None:
        super().remove_checkpoint(filepath)
        if self.is_global_zero and "://" not in str(filepath):
            own_states.tidy(filepath)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # the optimizers are there then, and the parameters where they stay

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._loaded_from = checkpoint_path
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._own_loaded, entry = False, checkpoint.get(own_states.KEY)
        if entry is not None and self._gossips and self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            where = self._loaded_from, entry, self.lightning_module, self._gossips
            self._own_loaded = own_states.load(*where, self.reduce_boolean_decision)  # type: ignore[arg-type]
        if not self._own_loaded:
            super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if not self._own_loaded:
            super().load_optimizer_state_dict(checkpoint)


class MixedPrecision(precision.MixedPrecision):
    """Lightning's, in checkpoints too, where its class's name is the key. See clipping.py."""

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        def unscaled() -> Any:
            loss = closure()
            if loss is not None or not model.automatic_optimization:  # else there was no backward pass
                clipping.unscale(self.scaler, optimizer)
            return loss

        clipping.check_others(self.scaler, optimizer)
        return super().optimizer_step(optimizer, model, unscaled, **kwargs)

    def clip_gradients(
        self,
        optimizer: Any,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        if not isinstance(optimizer, (GossipSGD, Gossip)):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
            return
        if clip_val > 0:  # a script that clips by hand does so before step(), with Lightning's wrapper
            clipping.unscale(self.scaler, vars(optimizer).get("_optimizer", optimizer))
        precision.Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)
