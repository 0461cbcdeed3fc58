"""Checkpoints: plain tensors out of flat buffers, and back into them.

A worker's own `state_dict` continues its run bit for bit, on the topology it was saved on. What is to continue on
another number of workers is the workers' mean: `consensus_state_dict`, or `load_checkpoint` from everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer

from ..comm.sharded import local
from ..engine.buckets import Bucket
from ..engine.compressed import is_memory
from ..engine.engine import Engine
from ..engine.slot import Slot
from ..engine.spikes import USUAL
from .kept_state import put_back, show
from .loaded_values import PLACE, WORKER, check_everywhere, whose
from .local_steps import SCALE

if TYPE_CHECKING:
    from .shared import GossipOptimizer


def by_parameter(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[torch.Tensor, dict]:
    """A checkpoint's state by parameter, uncast: torch rounds state to the parameter's type when it loads, which would
    ruin float32 state of 16-bit parameters."""
    return {
        p: state_dict["state"].get(key, {})
        for theirs, group in zip(state_dict["param_groups"], param_groups, strict=True)
        for key, p in zip(theirs["params"], group["params"], strict=True)
    }


@contextmanager
def loading(optimizer: GossipOptimizer, engine: Engine) -> Iterator[dict[str, Any]]:
    """Within the context torch's `load_state_dict` checks what it loads, and fills the flat buffers with it.

    Gives a dictionary that is what was loaded then: hooks may have made another of what they were given.
    """
    final: dict[str, Any] = {}
    step = optimizer._step  # that may have begun, before the checkpoint's takes its place

    def checked(_: Any, theirs: dict[str, Any]) -> None:  # the last of the hooks, which may have made another dict
        check_everywhere(optimizer, theirs)
        final.update(theirs)

    def restored(_: Any) -> None:  # the first of the hooks: others see what was loaded
        for group in optimizer.param_groups:
            group.pop(WORKER, None)
        engine.forget(step)
        restore(by_parameter(final, optimizer.param_groups), optimizer, engine)

    handles = (
        optimizer.register_load_state_dict_pre_hook(checked),
        optimizer.register_load_state_dict_post_hook(restored, prepend=True),
    )
    try:
        yield final
    finally:
        for handle in handles:
            handle.remove()


def restore(saved: dict[torch.Tensor, dict], optimizer: Optimizer, engine: Engine) -> None:
    """Copies saved state into the flat buffers and makes the optimizer's state views of them again."""
    with torch.no_grad():
        for b in engine.buckets:
            for slot in b.slots:
                for name, buffer in engine.buffers(b).items():
                    if not is_memory(name):
                        put_back(engine, slot, name, slot.view(buffer), saved[slot.p].get(name))
                show(optimizer.state, engine, b, slot)
            restore_copies(b, lambda slot: saved[slot.p].get("master"))
        restore_memories(engine, lambda slot: saved[slot.p])


def restore_copies(b: Bucket, master: Callable[[Slot], torch.Tensor | None]) -> None:
    """x where parameters are copies of it: from a checkpoint's master values, if there are, or the parameters."""
    for slot in b.copies:
        value = master(slot)
        slot.view(b.x).copy_(slot.data if value is None else local(value))
    b.publish()


def restore_memories(engine: Engine, saved: Callable[[Slot], dict[str, Any]], prefix: str = "") -> None:
    """What is remembered of messages. All ranks must call it: where one's checkpoint lacks it, none has any.

    saved: what a checkpoint holds of a parameter, by names that begin with the prefix.
    """
    if engine.codec is None or not engine.gossips:
        return
    lacks = False
    for b in engine.buckets:
        for slot in b.slots if b.compressed is not None else ():
            for name, buffer in b.compressed.kept.items():  # type: ignore[union-attr]
                value = saved(slot).get(prefix + name)
                lacks = lacks or value is None
                if value is not None:
                    slot.view(buffer).copy_(local(value))
    if engine.place.largest(torch.tensor([float(lacks)]), "loading what is remembered of messages", None) > 0:
        for b in engine.buckets:
            b.remember_nothing(engine.place.workers)


def detach(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copies the views, so that a checkpoint holds plain tensors and not whole flat buffers.

    A group's memory becomes pairs: DCP keeps a list as it is, but makes every entry of a dictionary an entry of the
    checkpoint, and reads back only what a new optimizer's memory, which is empty, has.
    """
    for b in optimizer._engine.buckets:
        b.absorb()  # what the script wrote into 16-bit parameters since the last step
    groups = [
        {k: [list(pair) for pair in numbers(v).items()] if k == "memory" else v for k, v in group.items()}
        | whose(optimizer._engine)
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": copied(state_dict["state"]), "param_groups": groups}


def copied(state: dict[Any, Any]) -> dict[Any, Any]:
    """A state whose tensors may be written to."""
    return {
        key: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()} if isinstance(s, dict) else s
        for key, s in state.items()
    }


def tensors(state_dict: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the state that can be averaged, in the order of the names; of DTensors this rank's shard."""
    for key, values in sorted(state_dict["state"].items(), key=lambda item: str(item[0])):
        for name, value in sorted(values.items()) if isinstance(values, dict) else ():
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                yield f"{key}.{name}", local(value)


def entries(state_dict: dict[str, Any]) -> str:
    """What `tensors` yields, for workers to compare before they average it."""
    return str([(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors(state_dict)])


def unplaced(state_dict: dict[str, Any], centered: Iterable[str]) -> dict[str, Any]:
    """A mean state for any number of workers: without a place, and zero where the mean is zero by definition.

    Without what is each worker's own too: running norms of gradients, weights of local steps, what is remembered of
    messages.
    """
    for name, value in tensors(state_dict):
        if name.rpartition(".")[2].removeprefix("gossip_") in centered:
            value.zero_()
    state = {
        key: {k: v for k, v in s.items() if not is_memory(k)} if isinstance(s, dict) else s
        for key, s in state_dict["state"].items()
    }
    groups = [{k: v for k, v in group.items() if k not in (*PLACE, WORKER)} for group in state_dict["param_groups"]]
    for group in groups:
        if "memory" in group:
            group["memory"] = [pair for pair in group["memory"] if not str(pair[0]).startswith((USUAL, SCALE))]
    return {**state_dict, "state": state, "param_groups": groups}


def numbers(memory: dict[str, Any]) -> dict[str, Any]:
    """A copy of what a rule remembers of its scalars, without tensors: a checkpoint may be loaded on another device."""
    return {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in memory.items()}
