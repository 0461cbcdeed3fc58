"""What worker processes run in test_checkpoint_refusals.py."""

import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import checkpoint_workers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import workers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import fused_dlam


def build(rank, steps=0, **options):
    model, optimizer, scheduler = checkpoint_workers.build("pc-dmsgd", options)
    checkpoint_workers.run(model, optimizer, scheduler, workers.data(rank), steps)
    return model, optimizer


def error_of(call, *args, **kwargs):
    """(kind, text, seconds) of what a call raises."""
    start = time.monotonic()
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "none", "", time.monotonic() - start


def parts(path):
    """The files of a checkpoint's workers, wherever they lie in it."""
    return {file.name: file for file in sorted(Path(path).rglob("*.distcp"))}


def copied(rank, path, name, spoil):
    """A copy of a checkpoint, in which rank 0 spoils something."""
    there = f"{path}/{name}"
    if rank == 0:
        shutil.copytree(f"{path}/3", there)
        spoil(there)
    dist.barrier()
    return there


def one_file(rank):
    """What is said where both ranks load rank 0's state, and its mean, of methods with and without corrections."""
    said = []
    for kind in ("mi-dmsgd", "gradient-tracking", "push-diging", "dmsgd", "rounds"):
        model = torch.nn.Linear(3, 2)
        if kind == "rounds":
            optimizer = fused_dlam.Gossip(torch.optim.SGD(model.parameters(), lr=0.1), outer="mi-dmsgd", every=2)
        else:
            optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1, method=kind)
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(1, 3)) * (rank + 1)).sum().backward()
            optimizer.step()
        states = [None, None]
        dist.all_gather_object(states, optimizer.state_dict())
        mean = optimizer.consensus_state_dict()
        for state in (states[0], states[rank], mean):
            said.append((kind, *error_of(optimizer.load_state_dict, state)[:2]))
        assert not [name for name in optimizer.param_groups[0] if name == "gossip_worker"]
        optimizer.step()
        optimizer.close()
    return said


def mixed(rank, path):
    """What is said of parts of two saves, of a missing and of a truncated one; nothing is loaded of them."""
    model, optimizer = build(rank, 3)
    fused_dlam.save_checkpoint(f"{path}/3", model, optimizer)
    fused_dlam.save_checkpoint(f"{path}/again", model, optimizer)
    later = build(rank, 6)
    fused_dlam.save_checkpoint(f"{path}/6", *later)

    def newer(other):
        return lambda there: shutil.copy(parts(f"{path}/{other}")["__0_0.distcp"], parts(there)["__0_0.distcp"])

    def other_files(there):
        for name, file in parts(f"{path}/again").items():
            shutil.copy(file, parts(there)[name])

    def short(there):
        file = parts(there)["__1_0.distcp"]
        file.write_bytes(file.read_bytes()[:100])

    spoils = {
        "newer": newer("6"),
        "same step": newer("again"),
        "all of another": other_files,
        "missing": lambda there: parts(there)["__1_0.distcp"].unlink(),
        "short": short,
    }
    told = {}
    for name, spoil in spoils.items():
        there = copied(rank, path, name, spoil)
        model, optimizer = build(rank, 1)
        before = checkpoint_workers.summary(model, optimizer)
        told[name] = error_of(fused_dlam.load_checkpoint, there, model, optimizer)
        told[f"{name}, mean"] = error_of(fused_dlam.load_checkpoint, there, model, optimizer, mean=True)
        after = checkpoint_workers.summary(model, optimizer)
        assert torch.equal(before[0], after[0]) and before[2:] == after[2:]
    # As a user of DCP may save: no save has a name there, but each part its step.
    for name, objects in (("mine3", (model, optimizer)), ("mine6", later)):
        dcp.save(fused_dlam.worker_state(*objects), checkpoint_id=f"{path}/{name}")
    assert error_of(fused_dlam.load_checkpoint, f"{path}/mine3", *build(rank))[0] == "none"
    dist.barrier()
    if rank == 0:
        shutil.copy(parts(f"{path}/mine6")["__0_0.distcp"], parts(f"{path}/mine3")["__0_0.distcp"])
    dist.barrier()
    told["by hand"] = error_of(fused_dlam.load_checkpoint, f"{path}/mine3", *build(rank))
    return told


def never_comes(rank, path, timeout):
    """Rank 1 does not come, or calls something else; then both come, and it works."""
    model, optimizer = build(rank, 2, timeout=timeout)
    told = {}
    save = (fused_dlam.save_checkpoint, f"{path}/x", model, optimizer)
    load = (fused_dlam.load_checkpoint, f"{path}/x", model, optimizer)
    for name, calls in {
        "save first": (save, None),
        "both": (save, save),
        "save": (save, None),
        "rank 0 not": (None, save),
        "load": (load, None),
        "other": (save, load),
        "both again": (save, save),
        "load by both": (load, load),
    }.items():
        if calls[rank] is not None:
            told[name] = error_of(*calls[rank])
        dist.barrier()
    state = optimizer.state_dict()
    if rank == 0:
        told["load_state_dict"] = error_of(optimizer.load_state_dict, state)
    dist.barrier()
    return told


def full_disk(rank, path):
    """Rank 1 may write 400 kB a file: what is said, and that the last checkpoint stays, and what comes later.

    The job's store is a file too, and smaller.
    """
    model, optimizer = build(rank, 2)
    model.register_buffer("more", torch.randn(200_000))
    fused_dlam.save_checkpoint(path, model, optimizer)
    before = checkpoint_workers.summary(model, optimizer)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    for group in optimizer.param_groups:
        group["step"] = 3
    told = error_of(fused_dlam.save_checkpoint, path, model, optimizer)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    folders = [entry.name for entry in Path(path).iterdir() if entry.is_dir()]
    fused_dlam.load_checkpoint(path, model, optimizer)
    after = checkpoint_workers.summary(model, optimizer)
    again = error_of(fused_dlam.save_checkpoint, path, model, optimizer)
    unwritable = error_of(fused_dlam.save_checkpoint, "/proc/nothing", model, optimizer)
    return told, folders, torch.equal(before[0], after[0]) and before[2:] == after[2:], again, unwritable


def other_steps(rank, path):
    """Ranks at different steps, and checkpoints of different steps, or of bad values, on one rank."""
    model, optimizer = build(rank, 2)
    saved = optimizer.state_dict()
    checkpoint_workers.run(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), workers.data(rank), 2)
    four = optimizer.state_dict()
    bad = optimizer.state_dict()
    bad["param_groups"][0]["lr"] = -1.0
    before = checkpoint_workers.summary(model, optimizer)
    told = {
        "steps": error_of(optimizer.load_state_dict, four if rank else saved),
        "bad on 1": error_of(optimizer.load_state_dict, bad if rank else four),
        "bad": error_of(optimizer.load_state_dict, bad),
    }
    after = checkpoint_workers.summary(model, optimizer)
    assert torch.equal(before[0], after[0]) and before[2:] == after[2:]
    told["good"] = error_of(optimizer.load_state_dict, four)
    if rank:
        optimizer.param_groups[0]["step"] = 5
    told["save"] = error_of(fused_dlam.save_checkpoint, f"{path}/steps", model, optimizer)
    optimizer.param_groups[0].update(step=4, lr=-1.0 if rank else 0.1)
    fused_dlam.save_checkpoint(f"{path}/bad", model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    told["load bad"] = error_of(fused_dlam.load_checkpoint, f"{path}/bad", model, optimizer)
    wide = torch.nn.Linear(3, 3 + rank)
    told["load shapes"] = error_of(fused_dlam.load_checkpoint, f"{path}/bad", wide, optimizer)
    checkpoint_workers.run(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), workers.data(rank), 1)
    return told


def over_and_over(rank, path):
    """One directory, that a plain dcp.save had before: what torch warns of, and which files are left at the end."""
    model, optimizer = build(rank, 2)
    former = fused_dlam.worker_state(model, optimizer)
    del former["parts"]  # as earlier releases saved
    dcp.save(former, checkpoint_id=path)
    count = fused_dlam.load_checkpoint(path, model, optimizer)
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fused_dlam.save_checkpoint(path, model, optimizer)
            fused_dlam.load_checkpoint(path, model, optimizer)
    left = sorted(str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file())
    if rank == 0:
        dcp_to_torch_save(path, f"{path}.pt")
    dist.barrier()
    whole = torch.load(f"{path}.pt", weights_only=False)
    equal = torch.equal(whole[f"worker{rank}"]["model"]["embed"], model.embed)
    dcp.async_save(fused_dlam.worker_state(model, optimizer), checkpoint_id=f"{path}.async").result()
    dist.barrier()
    return (
        count,
        [str(w.message) for w in caught],
        left,
        equal,
        fused_dlam.load_checkpoint(f"{path}.async", *build(rank)),
    )
