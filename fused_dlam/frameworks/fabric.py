"""Lightning Fabric: `Fabric(strategy=GossipFabricStrategy(), devices=4)`.

Of Fabric's DDP strategy it keeps processes, process group and reductions, and leaves out DDP. The optimizer is built
over a model that is on its device:

    model = fabric.setup_module(Net())
    optimizer = fabric.setup_optimizers(GossipSGD(model.parameters(), lr=0.1))

`fabric.save(path, {"model": model, "optimizer": optimizer, ...})` writes the workers' mean into one file, and every
worker's own state beside it; `fabric.load` takes either, see own_states.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from os import PathLike
from typing import Any
from weakref import WeakSet

import torch
from lightning.fabric.plugins import precision
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch.optim import Optimizer

from .. import Gossip, GossipSGD
from . import clipping, own_states
from .unwrapped import seen_through


class GossipFabricStrategy(DDPStrategy):
    """A Fabric strategy for models that are trained by `GossipSGD` or `Gossip`.

    Args:
        timeout: seconds after which a wait in Fabric's own exchanges is an error; the optimizer has its own.
        start_method: "popen" starts the script anew for every rank, "fork", "spawn" and "forkserver" start processes
            of this one. Under torchrun, SLURM and other launchers nothing is started.
        process_group_backend: "gloo", "nccl"; default: by the device.
        others: as of every strategy. Fabric sets them.

    Raises TypeError where an optimizer is set up that does not gossip.
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
        precision: Any = None,
    ):
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision,
            process_group_backend,
            own_states.deadline(timeout),
            start_method,  # type: ignore[arg-type]
        )
        self._gossips: WeakSet[Any] = WeakSet()
        self._backward_sync_control = _NoSync(self._gossips)

    def setup_module(self, module: torch.nn.Module) -> torch.nn.Module:  # type: ignore[override]
        """The module as it is, with rank 0's values: the optimizer gives all ranks those that it trains alone."""
        with torch.no_grad():
            for value in (*module.parameters(), *module.buffers()):
                value.copy_(self.broadcast(value.detach().cpu()))
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        optimizer = seen_through(own_states.check(optimizer, "GossipFabricStrategy"))
        self._gossips.add(optimizer)
        if type(self.precision) is precision.MixedPrecision:
            self.precision.__class__ = MixedPrecision  # the same object, for Fabric holds it
        return optimizer

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        path: str | PathLike[str],
        state: dict[str, Any],
        storage_options: Any = None,
        filter: Any = None,
    ) -> None:
        modules, gossips = _parts(state)
        if not gossips:
            super().save_checkpoint(path, state, storage_options, filter)
            return
        entry = own_states.save(path, modules, gossips, self.broadcast)
        with own_states.averaged(gossips, modules):
            mean = own_states.cloned(self._convert_stateful_objects_in_state(state, filter or {}))
        super().save_checkpoint(path, {**mean, own_states.KEY: entry}, storage_options)
        if self.is_global_zero:
            own_states.tidy(path, entry["folder"])

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The mean's, on all ranks."""
        if isinstance(optimizer, (GossipSGD, Gossip)):
            return optimizer.consensus_state_dict()
        return super().get_optimizer_state(optimizer)

    def load_checkpoint(
        self, path: str | PathLike[str], state: Any = None, strict: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        modules, gossips = _parts(state)
        if not gossips:
            rest = super().load_checkpoint(path, state, strict, **kwargs)
            rest.pop(own_states.KEY, None)
            return rest
        entry = self.checkpoint_io.load_checkpoint(path).get(own_states.KEY)
        if entry is None or not own_states.load(path, entry, modules, gossips, self.reduce_boolean_decision):
            rest = super().load_checkpoint(path, state, strict, **kwargs)
        else:
            others = {name: thing for name, thing in state.items() if not isinstance(thing, _LOADED)}
            rest = super().load_checkpoint(path, others, strict, **kwargs)
            state.update(others)
        return {name: value for name, value in rest.items() if name not in (*state, own_states.KEY)}


_LOADED = (torch.nn.Module, GossipSGD, Gossip)


def _parts(state: Any) -> tuple[torch.nn.ModuleList, list[GossipSGD | Gossip]]:
    """The modules of what is saved or loaded, and the optimizers that gossip."""
    values = state.values() if isinstance(state, dict) else ()
    modules = torch.nn.ModuleList(value for value in values if isinstance(value, torch.nn.Module))
    return modules, [value for value in values if isinstance(value, (GossipSGD, Gossip))]


class _NoSync(_BackwardSyncControl):
    """`fabric.no_backward_sync(model)`: gradients accumulate, and no message leaves."""

    def __init__(self, gossips: WeakSet[Any]):
        self.gossips = gossips

    def no_backward_sync(self, module: torch.nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        stack, trained = ExitStack(), {id(p) for p in module.parameters()}
        for optimizer in self.gossips if enabled else ():
            own = isinstance(optimizer, GossipSGD)  # Gossip sends nothing before step()
            if own and any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
                stack.enter_context(optimizer.no_sync())
        return stack


class MixedPrecision(precision.MixedPrecision):
    """Fabric's, see clipping.py."""

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        clipping.check_others(self.scaler, optimizer)
        return super().optimizer_step(optimizer, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, (GossipSGD, Gossip)):
            clipping.unscale(self.scaler, optimizer)
        else:
            super().unscale_gradients(optimizer)
