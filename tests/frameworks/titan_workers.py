"""What test_torchtitan.py runs on its four ranks: torchtitan's containers around a model that two workers train."""

import dataclasses
import logging
import re

import fsdp2_workers
import torch
from torch.distributed.fsdp import fully_shard


def example():
    (code,) = re.findall(r"```python\n(from dataclasses.*?)```", fsdp2_workers.PAGE.read_text(encoding="utf-8"), re.S)
    return code


class Data:
    """A loader's state: which batch is next."""

    def __init__(self, batches):
        self.batches, self.next = batches, 0

    def __iter__(self):
        while self.next < len(self.batches):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state_dict):
        self.next = state_dict["next"]


def build(rank, dims, space, folder):
    """(model, optimizers, schedulers, data, checkpoints), in the order of torchtitan's Trainer."""
    from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig, default_adamw

    mesh = dims.get_mesh("fsdp")
    model = fsdp2_workers.Transformer().double()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    embedding = ParamGroupConfig(pattern="embed", optimizer_name="Adam", optimizer_kwargs={"lr": 0.02})
    config = dataclasses.replace(default_adamw(0.01), implementation="for-loop")
    config.param_groups.insert(0, embedding)
    optimizers = config.build(model_parts=[model])
    space["gossip"](optimizers, [model], dims)
    schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=10)
    data = Data(list(fsdp2_workers.batches(rank)))
    config = space["WorkerCheckpoints"].Config(
        enable=True, folder="saved", interval=fsdp2_workers.HALF, last_save_model_only=False, keep_latest_k=0
    )
    checkpoints = config.build(
        dataloader=data, model_parts=[model], optimizers=optimizers, lr_schedulers=schedulers, states={},
        sd_adapter=None, base_folder=folder,
    )  # fmt: skip
    return model, optimizers, schedulers, data, checkpoints


def train(model, optimizers, schedulers, data, checkpoints):
    from torchtitan.distributed.utils import clip_grad_norm_

    for step, tokens in enumerate(data, data.next + 1):
        optimizers.zero_grad()
        fsdp2_workers.loss_of(model, tokens).backward()
        clip_grad_norm_(list(model.parameters()), fsdp2_workers.CLIP, foreach=True)
        optimizers.step()
        schedulers.step()
        checkpoints.save(step)
    return fsdp2_workers.shards(model)


def resumed(rank, folder):
    """A run's last parameters, those of one that starts from its checkpoint, and what each did."""
    import torchtitan.distributed.parallel_dims as dims_of

    logging.disable(logging.INFO)
    dims_of.device_type = "cpu"  # found out at import, from GPUs alone
    dims = dims_of.ParallelDims(dp_replicate=2, dp_shard=2, cp=1, tp=1, pp=1, ep=1, world_size=4,
                                spmd_backend="partial_dtensor")  # fmt: skip
    dims.build_mesh()
    space = {"__name__": "example", "rests": fsdp2_workers.rests}
    code = example().replace("hierarchical=mesh", "hierarchical=mesh, topology=rests")
    exec(compile(code, "torchtitan.md", "exec"), space)
    first = build(rank, dims, space, folder)
    last = train(*first)
    again = build(rank, dims, space, folder)
    with torch.no_grad():
        for p in again[0].parameters():
            p.fill_(9.0)
    loaded, begins = again[-1].load(), again[3].next
    return last, train(*again), loaded, begins, [[o.steps_done for o in run[1]] for run in (first, again)]
