"""What worker processes run in the tests of fused_dlam/examples/ and of the launcher."""

import importlib
import os
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

import fused_dlam


class Killed(Exception):
    pass


def scripts(rank, cases):
    """Each case: (script, its command line, the epoch at whose start it is killed)."""
    return [script(*case) for case in cases]


def script(name, argv, killed_at=None):
    module = importlib.import_module(f"fused_dlam.examples.{name}")
    set_epoch = DistributedSampler.set_epoch

    def dies(sampler, epoch):
        if epoch == killed_at:
            raise Killed
        set_epoch(sampler, epoch)

    with mock.patch.object(DistributedSampler, "set_epoch", dies):
        try:
            return module.train(module.arguments(argv))
        except Killed:
            return None


def start_accelerate(rank):
    """What `accelerate launch --cpu` would have set; the process group is there already."""
    n = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, OMP_NUM_THREADS="1")


def accelerated(rank, cases, folder):
    start_accelerate(rank)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from fused_dlam.examples import accelerated as example
    from fused_dlam.examples.gossip import network
    from fused_dlam.frameworks.accelerate import GossipAccelerator

    accuracies = []
    for argv in cases:
        accuracies.append(example.train(example.arguments(argv)))
        AcceleratorState._reset_state()  # as in a new process: precision and accumulation are a process's
    own = []
    for argv in cases:
        model = network()
        gossip = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(gossip, 3)
        fused_dlam.load_checkpoint(f"{example.arguments(argv).out}/last", model, gossip, object0=scheduler)
        own.append({name: value.clone() for name, value in model.state_dict().items()})
    plain = Accelerator(cpu=True)
    refused = {"step": plain_prepare(plain), "prepare": "", "kept": ""}
    accelerator = GossipAccelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        accelerator.prepare(torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2)))
    except ValueError as error:
        refused["prepare"] = str(error)
    try:
        accelerator.save_state(folder)
    except ValueError as error:
        refused["kept"] = str(error)
    return {
        "accuracies": accuracies,
        "own": own,
        "refused": refused,
        "accumulated": accumulate(rank, accelerator),
        "uneven": uneven(rank, accelerator),
        "overflow": overflow(rank, accelerator),
        "saved": save_state(rank, accelerator, folder),
    }


def accelerated_in_parts(rank, argv):
    """The example, ended by an error after its second epoch, and resumed."""
    start_accelerate(rank)
    from accelerate.state import AcceleratorState

    from fused_dlam.examples import accelerated as example

    saved = example.GossipAccelerator.save_state
    seen = []

    def ends(accelerator, folder):
        saved(accelerator, folder)
        seen.append(folder)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with mock.patch.object(example.GossipAccelerator, "save_state", ends):
        try:
            example.train(example.arguments(argv))
        except KeyboardInterrupt:
            AcceleratorState._reset_state()
    models = []
    built = example.network
    with mock.patch.object(example, "network", lambda: models.append(built()) or models[-1]):
        example.train(example.arguments([*argv, "--resume"]))
    return {name: value.clone() for name, value in models[0].state_dict().items()}


def plain_prepare(accelerator):
    """What an Accelerator as it is makes of it: the error of the first step."""
    model = torch.nn.Linear(3, 3)
    model, optimizer = accelerator.prepare(model, fused_dlam.GossipSGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(2, 3)).sum())
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    finally:
        accelerator.free_memory()


def uneven(rank, accelerator):
    """Rank 1 has two batches more: steps of all, and how far apart the workers are in the end."""
    accelerator.free_memory()
    accelerator.gradient_accumulation_steps = 1
    model = torch.nn.Linear(3, 3)
    gossip = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, gossip)
    with accelerator.join_uneven_inputs([model]):
        for _ in range(3 + 2 * rank):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.full((2, 3), 1.0 + rank)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
    accelerator.free_memory()
    return gossip.param_groups[0]["step"]


def accumulate(rank, accelerator):
    """Two backward passes per step, by Accelerate and by hand: parameters, and messages sent in backward passes."""
    x, y = torch.randn(2, 6, 2, 4, 3, generator=torch.Generator().manual_seed(rank))
    models = [torch.nn.Linear(3, 3) for _ in range(2)]
    for model in models:
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.zeros_(model.bias)
    gossip, plain = (fused_dlam.GossipSGD(m.parameters(), lr=0.1, bucket_mb=1e-5) for m in models)
    model, optimizer = accelerator.prepare(models[0], gossip)
    early = []
    for k in range(6):
        for half in range(2):
            with accelerator.accumulate(model):
                before = gossip.messages_sent
                accelerator.backward((model(x[k, half]) - y[k, half]).square().mean())
                early.append(gossip.messages_sent - before)
                optimizer.step()
                optimizer.zero_grad()
        plain.zero_grad()
        (models[1](x[k].flatten(0, 1)) - y[k].flatten(0, 1)).square().mean().backward()
        plain.step()
    return [m.weight.detach().clone() for m in models], early, gossip.messages_sent == plain.messages_sent


def overflow(rank, accelerator):
    """The example's scaler, which Accelerate itself has on GPUs alone: rank 1's gradient overflows in step 2 of 4."""
    accelerator.gradient_accumulation_steps = 1
    accelerator.scaler = fused_dlam.GradScaler("cpu", init_scale=2.0**16)
    x = torch.nn.Parameter(torch.ones(4))
    gossip = fused_dlam.GossipSGD([x], lr=0.1)
    optimizer = accelerator.prepare(gossip)
    scales = []
    for k in range(4):
        with accelerator.accumulate(gossip):
            accelerator.backward(x.sum() * (1e38 if k == 2 and rank == 1 else 1.0))
            optimizer.step()
            optimizer.zero_grad()
        scales.append(accelerator.scaler.get_scale() / 2**16)
    accelerator.scaler = None
    return scales, x.detach().clone()


def save_state(rank, accelerator, folder):
    """What save_state and load_state make of workers that differ: before, and after a step more and loading."""
    accelerator.free_memory()
    net = torch.nn.Linear(3, 3)
    gossip = fused_dlam.GossipSGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(gossip, 1)
    model, optimizer, scheduler = accelerator.prepare(net, gossip, scheduler)

    def step():
        optimizer.zero_grad()
        accelerator.backward(model(torch.full((1, 3), 1.0 + rank)).square().sum())
        optimizer.step()
        scheduler.step()
        momentum, rate = optimizer.state[net.weight]["momentum_buffer"].clone(), gossip.param_groups[0]["lr"]
        return net.weight.detach().clone(), momentum, torch.tensor(rate)

    first = step()
    accelerator.save_state(folder)
    second = step()
    accelerator.load_state(folder)
    again = step()
    with gossip.averaged(net):
        accelerator.save_model(model, f"{folder}/model")
    return first, second, again, accelerator.save_state(f"{folder}/last")


def dashboard(rank, argv):
    from fused_dlam.examples import dashboard as example

    distances = []
    measured = fused_dlam.GossipSGD.consensus_distance

    def record(optimizer):
        distances.append(measured(optimizer))
        return distances[-1]

    with mock.patch.object(fused_dlam.GossipSGD, "consensus_distance", record):
        example.train(example.arguments(argv))
    return distances


def fails(rank):
    if rank == 1:
        raise ArithmeticError("two and two")
