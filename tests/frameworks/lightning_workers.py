"""What worker processes run in the tests of Lightning's strategy."""

import contextlib
import io
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fused_dlam
from fused_dlam.frameworks.lightning import GossipStrategy

BATCHES, SIZE = 5, 4


def launched(rank):
    """As a launcher says it, so that Lightning starts no processes: these have a process group."""
    world = torch.distributed.get_world_size()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="tests", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511",
    )  # fmt: skip


def batches_of(rank, number=BATCHES):
    """This worker's own data."""
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(number * SIZE, 6, generator=generator) + 0.2 * rank
    return TensorDataset(x, x[:, :1].sin() + 0.3 * rank)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def loss_of(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def flat(model):
    return torch.cat([t.detach().reshape(-1).float() for t in model.state_dict().values()])


OPTIMIZERS = {
    "sgd": lambda params: fused_dlam.GossipSGD(params, lr=0.05, bucket_mb=1e-4),
    "awc": lambda params: fused_dlam.GossipSGD(params, lr=0.05, schedule="awc", method="dmsgd"),
    "adamw": lambda params: fused_dlam.Gossip(torch.optim.AdamW(params, lr=0.01)),
    "plain": lambda params: torch.optim.SGD(params, lr=0.05),
}


class Net(pl.LightningModule):
    """Keeps what its parameters were after every batch, within every evaluation, and when training ended."""

    def __init__(self, optimizer="sgd"):
        super().__init__()
        self.net, self.built = network(), optimizer
        self.path, self.seen, self.fails = [], [], False

    def training_step(self, batch, number):
        return loss_of(self.net, batch)

    def on_train_batch_end(self, *_):
        self.path.append(flat(self.net).clone())

    def validation_step(self, batch, number):
        self.seen.append(flat(self.net).clone())
        if self.fails:
            raise RuntimeError("the validation fails")
        self.log("loss", loss_of(self.net, batch), sync_dist=True)

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.built](self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def trainer(folder, epochs=2, strategy=None, **options):
    world = torch.distributed.get_world_size()
    return pl.Trainer(
        strategy=strategy or GossipStrategy(), devices=world, accelerator="cpu", max_epochs=epochs, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
        **{"enable_checkpointing": False, **options},
    )  # fmt: skip


def validation():
    return DataLoader(batches_of(7), SIZE)


def fit(rank, folder, built, epochs=2, number=BATCHES, ckpt=None, **options):
    model = Net(built)
    run = trainer(folder, epochs, **options)
    run.fit(model, DataLoader(batches_of(rank, number), SIZE), validation(), ckpt_path=ckpt)
    return model, run


CLIPS = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}


def loop(rank, built, batches, accumulate=1, clip=None, epochs=2, by="norm", bf16=False):
    """The oracle: a plain loop, without Lightning."""
    net = network()
    optimizer = OPTIMIZERS[built](net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    path, means = [], []
    for _ in range(epochs):
        for i, batch in enumerate(batches, 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(net, batch)
            (loss / accumulate).backward()
            if i % accumulate == 0 or i == len(batches):
                if clip:
                    CLIPS[by](net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            path.append(flat(net).clone())
        with optimizer.averaged(net):
            means.append(flat(net).clone())
        scheduler.step()
    return torch.stack(path), means


def as_a_loop(rank, folder, built, accumulate, clip, by="norm", precision=None):
    """What Lightning and a plain loop do with the same data."""
    launched(rank)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "num_sanity_val_steps": 0}
    model, _ = fit(rank, folder, built, gradient_clip_algorithm=by, precision=precision, **options)
    batches = [*DataLoader(batches_of(rank), SIZE)]
    path, means = loop(rank, built, batches, accumulate, clip, by=by, bf16=precision == "bf16-mixed")
    return torch.stack(model.path), path, model.seen, means, flat(model.net)


class Stream(IterableDataset):
    def __init__(self, rank, number):
        self.rank, self.number = rank, number

    def __iter__(self):
        return iter(batches_of(self.rank, self.number))


def uneven(rank, folder):
    """Rank 0 has 5 batches, rank 1 has 7: once they know it, once they do not. How many each has trained on."""
    launched(rank)
    number, out = (5, 7)[rank], []
    for data in (batches_of(rank, number), Stream(rank, number)):
        model = Net()
        trainer(folder, 3).fit(model, DataLoader(data, SIZE), validation())
        out.append(len(model.path))
    return out


def resumed(rank, folder, built):
    """Three epochs in one go, and after the first one's checkpoint: what every batch left, and the file."""
    launched(rank)
    home = Path(folder, built)

    def saving(where):
        saver = ModelCheckpoint(home / where, "{epoch}", save_top_k=2, save_last=True, monitor="loss")
        return {"enable_checkpointing": True, "callbacks": [saver]}

    whole, run = fit(rank, home, built, 3, **saving("whole"))
    first, _ = fit(rank, home, built, 1, **saving("parts"))
    saved = home / "parts" / "epoch=0.ckpt"
    file = torch.load(saved, weights_only=False)
    rest, _ = fit(rank, home, built, 3, ckpt=saved, **saving("parts"))
    mean = torch.cat([v.reshape(-1).float() for v in file["state_dict"].values()])
    names = {folder.name.rsplit(".", 1)[0] for folder in (home / "whole" / "workers").iterdir()}
    files = {path.name for path in (home / "whole").glob("*.ckpt")}
    return {
        "whole": torch.stack(whole.path),
        "parts": torch.stack(first.path + rest.path),
        "file": mean,
        "validated": first.seen[-1],
        "folders": names,
        "files": files,
        "keys": set(file),
        "inference": flat(Net.load_from_checkpoint(saved, map_location="cpu").net),
    }


class Full(TorchCheckpointIO):
    """A disk that is full from the second save on."""

    saves = 0

    def save_checkpoint(self, *args, **kwargs):
        self.saves += 1
        if self.saves > 1:
            raise OSError("no room")
        super().save_checkpoint(*args, **kwargs)


class Saves(Callback):
    """Into one file, whatever becomes of it."""

    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, _):
        try:
            trainer.save_checkpoint(self.path)
        except OSError:
            trainer.strategy.barrier()  # for which the others wait


def cut_short(rank, folder):
    """A second save into the same file fails where a kill would end it; then its folder is lost."""
    launched(rank)
    path = Path(folder, "only.ckpt")
    options = {"num_sanity_val_steps": 0, "callbacks": [Saves(path)], "plugins": [Full()]}
    whole, _ = fit(rank, folder, "sgd", 2, **options)
    rest, _ = fit(rank, folder, "sgd", 2, ckpt=path)
    torch.distributed.barrier()
    if rank == 0:
        for folder_of_file in (path.parent / "workers").iterdir():
            folder_of_file.rename(path.parent / f"lost-{folder_of_file.name}")
    torch.distributed.barrier()
    mean, _ = fit(rank, folder, "sgd", 2, ckpt=path)
    return torch.stack(whole.path), torch.stack(rest.path), torch.stack(mean.path)


def refused(rank, folder):
    """What is said, by name."""
    launched(rank)
    out = {}
    for name, strategy, built in (("ddp", "ddp", "sgd"), ("ddp, Gossip", "ddp", "adamw"), ("plain", None, "plain")):
        try:
            trainer(folder, strategy=strategy).fit(Net(built), DataLoader(batches_of(rank), SIZE))
        except (ValueError, TypeError) as error:
            out[name] = str(error)
    try:
        GossipStrategy(find_unused_parameters=True)
    except TypeError as error:
        out["option"] = str(error)
    try:
        GossipStrategy(timeout=0)
    except ValueError as error:
        out["timeout"] = str(error)
    return out


def failed_validation(rank, folder):
    """Each worker's own parameters, before a validation that raises and after it."""
    launched(rank)
    model, run = Net(), trainer(folder, 1, num_sanity_val_steps=0)
    model.fails = True
    try:
        run.fit(model, DataLoader(batches_of(rank), SIZE), validation())
    except RuntimeError as error:
        assert "the validation fails" in str(error)
    return model.path[-1], model.seen[-1], flat(model.net)


class Overflows(Net):
    """In its second batch rank 1's loss is too large for a scaled gradient. Keeps scales, and norms that hooks see."""

    def __init__(self, built="sgd", clips_by_hand=None):
        super().__init__(built)
        self.clip, self.automatic_optimization = clips_by_hand, clips_by_hand is None
        self.scales, self.norms = [], []

    def training_step(self, batch, number):
        huge = number == 1 and self.global_rank == 1
        loss = super().training_step(batch, number) * (1e36 if huge else 1.0)
        if self.clip is not None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            optimizer.step()
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(norm_of(self.net))

    def on_train_batch_end(self, *_):
        super().on_train_batch_end()
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def norm_of(net):
    return float(nn.utils.get_total_norm([p.grad for p in net.parameters()]))


def sixteen(scaler):
    # As a plugin, for on CPUs the Trainer takes bfloat16 in the place of float16.
    return MixedPrecision("16-mixed", "cpu", scaler)


def overflow(rank, folder, built="sgd", clip=None, by_hand=False):
    """What every step leaves, every step's loss scale, norms before clipping; the plugin's names."""
    launched(rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    plugin, model = sixteen(scaler), Overflows(built, clip if by_hand else None)
    options = {"plugins": [plugin], "gradient_clip_val": None if by_hand else clip}
    trainer(folder, 1, **options).fit(model, DataLoader(batches_of(rank), SIZE))
    kind = type(plugin.scaler).__module__, type(plugin).__qualname__
    return torch.stack(model.path), model.scales, kind, model.norms


def overflow_loop(rank, built, clip):
    """The same without Lightning."""
    net = network()
    optimizer = OPTIMIZERS[built](net.parameters())
    scaler = fused_dlam.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    path, norms = [], []
    for number, batch in enumerate(DataLoader(batches_of(rank), SIZE)):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(net, batch) * (1e36 if number == 1 and rank == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(norm_of(net))
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        path.append(flat(net).clone())
    return torch.stack(path), norms


class Two(Net):
    """Two optimizers, by hand, of which one accumulates."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.told = False, []
        self.other = nn.Linear(6, 1)

    def training_step(self, batch, number):
        first, second = self.optimizers()
        first.zero_grad()
        with second.toggle_model(sync_grad=number % 2 == 1):
            self.manual_backward(loss_of(self.other, batch))
        self.manual_backward(loss_of(self.net, batch))
        first.step()
        if number % 2 == 1:
            second.step()
            second.zero_grad()
        self.told.append((first.consensus_distance(), first.bytes_sent, first.optimizer.bytes_sent))

    def on_train_batch_end(self, *_):
        self.path.append(torch.cat([flat(self.net), flat(self.other)]).clone())

    def configure_optimizers(self):
        half = OPTIMIZERS["adamw"](self.other.parameters())
        return [OPTIMIZERS["sgd"](self.net.parameters()), half]


def two(rank, folder):
    launched(rank)
    paths, told = [], []
    for epochs, ckpt in ((2, None), (1, None), (2, "first.ckpt")):
        torch.manual_seed(5)
        model = Two()
        saver = ModelCheckpoint(folder, "first", save_on_train_epoch_end=True)
        own = {"enable_checkpointing": True, "callbacks": [saver]} if epochs == 1 else {}
        run = trainer(folder, epochs, **own)
        run.fit(model, DataLoader(batches_of(rank, 4), SIZE), ckpt_path=ckpt and Path(folder, ckpt))
        paths.append(torch.stack(model.path))
        told.extend(model.told)
    return paths, told


def script(rank, folder, *codes):
    """Runs an example of the page, as it is and altered; what it printed, and what was in its folder after each run."""
    launched(rank)
    os.chdir(folder)
    out = []
    for code in codes:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "example.py", "exec"), {"__name__": "__main__"})
        torch.distributed.barrier()
        out.append((printed.getvalue(), {path.name for path in Path(folder, "run").iterdir()}))
    return out
