"""What worker processes run in test_huggingface.py."""

import os
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fused_dlam

PAGE = Path(fused_dlam.__file__).parent / "frameworks" / "huggingface.md"


def start(rank):
    """What torchrun would have set; the process group is there already."""
    n = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512", ACCELERATE_USE_CPU="true")
    # From a checkout transformers takes its folder for the package of that name, and finds that it is none.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def tiny():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2))


def texts(number, seed=0):
    """Runs of numbers: what comes next can be learned."""
    starts = torch.randint(0, 32, (number, 1), generator=torch.Generator().manual_seed(seed))
    rows = (starts + torch.arange(8)) % 32
    # The first label is never predicted; Trainer counts it in evaluation unless it says so.
    return [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in rows]


def arguments(folder, **more):
    from transformers import TrainingArguments

    common = dict(use_cpu=True, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, save_strategy="no",
                  logging_steps=1, learning_rate=1e-2, max_steps=6, lr_scheduler_type="linear")  # fmt: skip
    return TrainingArguments(str(folder), **{**common, **more})


def values(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def trained(rank, folder, which, stops_at=None, resume=None, **more):
    """A run of six steps with evaluation and a checkpoint after the third; what was seen on the way."""
    from transformers import TrainerCallback

    from fused_dlam.frameworks.huggingface import GossipTrainer

    class Watch(TrainerCallback):
        distances, own, sent, steps = [], [], [], 0

        def on_step_end(self, args, state, control, **_):
            gossip = trainer.gossip_optimizer
            self.distances.append(gossip.consensus_distance())
            self.sent.append(gossip.messages_sent)
            self.steps += 1
            if state.global_step == 3:
                self.own.append(values(trainer.model))
            control.should_training_stop = state.global_step == stops_at

    watch = Watch()
    kinds = {
        "AdamW": {"gossip": {"schedule": "midpoint"}},
        "AdamW awc": {"gossip": {"schedule": "awc"}},
        "GossipSGD": {"optimizer_cls_and_kwargs": (fused_dlam.GossipSGD, {"momentum": 0.9})},
        "GossipSGD awc": {"optimizer_cls_and_kwargs": (fused_dlam.GossipSGD, {"schedule": "awc"})},
    }
    given = arguments(folder, eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=3, **more)
    trainer = GossipTrainer(
        tiny(), given, train_dataset=texts(48), eval_dataset=texts(16, 1), callbacks=[watch], **kinds[which]
    )
    trainer.train(resume_from_checkpoint=resume)
    if rank == 0:
        trainer.save_model(f"{folder}/after")  # by one rank alone
    logs = trainer.state.log_history
    return {
        "distances": watch.distances,
        "sent": watch.sent,
        "steps": watch.steps,
        "own": watch.own,
        "model": values(trainer.model),
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "eval": [entry["eval_loss"] for entry in logs if "eval_loss" in entry],
        "rate": trainer.gossip_optimizer.param_groups[0]["initial_lr"],
        "again": trainer.evaluate()["eval_loss"],
    }


def saved_model(rank, folder, checkpoint):
    """A checkpoint's model files, and its loss by hand on the data of evaluation."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(f"{folder}/{checkpoint}")
    rows = torch.stack([row["input_ids"] for row in texts(16, 1)])
    with torch.no_grad():
        return values(model), model.eval()(input_ids=rows, labels=rows).loss.item()


def accumulated(rank, folder):
    """Batches of two, two per step, beside batches of four: messages sent, and the models. All samples are alike, for
    Accelerate deals them out by batches."""
    from fused_dlam.frameworks.huggingface import GossipTrainer

    found = []
    for size, number in ((2, 2), (4, 1)):
        given = arguments(folder, per_device_train_batch_size=size, gradient_accumulation_steps=number, max_grad_norm=0)
        sgd = {"optimizer_cls_and_kwargs": (fused_dlam.GossipSGD, {"bucket_mb": 0.01})}
        trainer = GossipTrainer(still(tiny()), given, train_dataset=texts(1) * 48, **sgd)
        trainer.train()
        found.append((trainer.gossip_optimizer.messages_sent, values(trainer.model)))
    (sent, model), (plain, other) = found
    return sent, plain, model, other


def still(model):
    """Without dropout, so that two batches of two are one of four."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def uneven(rank, folder):
    """Each rank has data of its own: six batches and four."""
    from torch.utils.data import DataLoader
    from transformers import Trainer, default_data_collator

    from fused_dlam.frameworks.huggingface import GossipTrainer

    class OwnData(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, 4, collate_fn=default_data_collator)

    class Mine(GossipTrainer, OwnData):
        pass

    given = arguments(folder, max_steps=-1, num_train_epochs=2, eval_strategy="epoch")
    trainer = Mine(tiny(), given, train_dataset=texts(16 + 8 * rank, rank), eval_dataset=texts(8))
    trainer.train()
    return trainer.state.global_step, trainer.gossip_optimizer.messages_sent


def refused(rank, folder):
    """Errors by what was done."""
    from transformers import Trainer, TrainerCallback

    from fused_dlam.frameworks.huggingface import GossipTrainer

    sgd = {"optimizer_cls_and_kwargs": (fused_dlam.GossipSGD, {"lr": 0.1})}

    class Replaces(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)

    def plain():
        Trainer(tiny(), arguments(folder), train_dataset=texts(48), **sgd).train()

    def wrapped():
        GossipTrainer(DistributedDataParallel(tiny()), arguments(folder), train_dataset=texts(48))

    def replaced():
        GossipTrainer(tiny(), arguments(folder), train_dataset=texts(48), callbacks=[Replaces()]).train()

    def other_model():
        other = torch.optim.SGD(tiny().parameters(), lr=0.1)
        GossipTrainer(tiny(), arguments(folder), train_dataset=texts(48), optimizers=(other, None)).train()

    def options_of_another():
        GossipTrainer(tiny(), arguments(folder), train_dataset=texts(48), gossip={"topology": "ring"}, **sgd).train()

    def batch_size():
        GossipTrainer(tiny(), arguments(folder, auto_find_batch_size=True), train_dataset=texts(48))

    errors = {}
    for call in (plain, wrapped, replaced, other_model, options_of_another, batch_size):
        try:
            call()
        except (RuntimeError, ValueError) as error:
            errors[call.__name__] = str(error)
    return errors


def pages(rank, folder):
    """The page's examples as they stand, in a folder of their own: what they leave there, their lines and models."""
    os.chdir(folder)
    found = []
    for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        names = {}
        exec(compile(text, str(PAGE), "exec"), names)
        dist.barrier()
        gossip = names["gossip"] if "gossip" in names else names["trainer"].gossip_optimizer
        found.append((len(text.splitlines()), gossip.consensus_distance(), values(names["model"])))
    return sorted(p.name for p in Path(folder).glob("*")), found
