"""The snippets of fused_dlam/examples/README.md, as worker processes run them."""

import copy
import io
import itertools

import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_dlam import GossipSGD


def model_and_data(rank, batches=6):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    data = torch.randn(batches, 8, 4, generator=torch.Generator().manual_seed(rank)) + 0.5 * rank
    return model, data


def loss_of(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def train(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def all_of_them(rank):
    return {f.__name__: f(rank) for f in (uneven, bad_batch, not_finite, ema, best, plateau, clones, clipped)}


def uneven(rank):
    """Ranks with 5, 6 and 7 batches all take 5 steps."""
    model, loader = model_and_data(rank, batches=5 + rank)
    optimizer = GossipSGD(model.parameters(), lr=0.01)
    steps = torch.tensor(len(loader))
    dist.all_reduce(steps, op=dist.ReduceOp.MIN)
    for x in itertools.islice(loader, steps.item()):
        train(model, optimizer, x)
    return optimizer.param_groups[0]["step"]


def bad_batch(rank):
    """Rank 1 has nothing to learn from in step 3: it takes no local step, and exchanges."""
    model, data = model_and_data(rank)
    optimizer = GossipSGD(model.parameters(), lr=0.01, timeout=20)
    for step, x in enumerate(data):
        optimizer.zero_grad()
        if not (rank == 1 and step == 3):
            loss_of(model, x).backward()
        optimizer.step()
    return optimizer.consensus_distance()


def not_finite(rank):
    """Whether parameters stay finite although rank 1 has a NaN in step 3, with a guard in the script and without."""
    found = {}
    for guarded in (True, False):
        model, data = model_and_data(rank)
        optimizer = GossipSGD(model.parameters(), lr=0.01, timeout=20)
        for step, x in enumerate(data):
            optimizer.zero_grad()
            loss = loss_of(model, x * (float("nan") if rank == 1 and step == 3 else 1.0))
            if torch.isfinite(loss) or not guarded:
                loss.backward()
            optimizer.step()
        found[guarded] = bool(model.weight.isfinite().all())
    return found


def ema(rank):
    """(this worker's EMA, the workers' mean of their EMAs, the EMA of the workers' mean, its own again afterwards)"""
    model, data = model_and_data(rank)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), model)
    optimizer = GossipSGD(model.parameters(), lr=0.01)
    average, reference = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for _ in range(2)
    )
    for x in data:
        train(model, optimizer, x)
        average.update_parameters(model)
        with optimizer.averaged(model):
            reference.update_parameters(model)

    def values(of):
        return [t.detach().clone() for t in of.module.state_dict().values() if t.is_floating_point()]

    own = values(average)
    with torch.no_grad(), optimizer.averaged(average):
        mean = values(average)
    return own, mean, values(reference), values(average)


def best(rank):
    """What is saved within `averaged` is what was evaluated there; a save after it is this worker's own."""
    model, data = model_and_data(rank)
    optimizer = GossipSGD(model.parameters(), lr=0.01)
    for x in data:
        train(model, optimizer, x)
    model.eval()
    with torch.no_grad(), optimizer.averaged(model):
        evaluated = loss_of(model, data[0])
        saved = copy.deepcopy(model.state_dict())
    own = copy.deepcopy(model.state_dict())
    losses = []
    for state in (saved, own):
        other = torch.nn.Linear(4, 1)
        other.load_state_dict(state)
        losses.append(loss_of(other, data[0]).item())
    return evaluated.item(), *losses


def plateau(rank, patience=1):
    """The learning rate, and the epoch after which training stops, by one number on all ranks."""
    model, data = model_and_data(rank)
    optimizer = GossipSGD(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    best, waited, stopped = float("inf"), 0, None
    for epoch in range(12):
        train(model, optimizer, data[epoch % len(data)])
        with torch.no_grad(), optimizer.averaged(model):
            loss = loss_of(model, data[epoch % len(data)])  # on this worker's part of the validation data
        dist.all_reduce(loss)
        loss = loss.item() / dist.get_world_size()
        scheduler.step(loss)
        if loss < best:
            best, waited = loss, 0
        elif (waited := waited + 1) > patience:
            stopped = epoch
            break
    return optimizer.param_groups[0]["lr"], stopped


def clones(rank):
    """Bytes of a file of one layer of a large model, as it is and cloned."""
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Linear(200, 2))
    GossipSGD(model.parameters(), lr=0.01)
    sizes = []
    for copied in (False, True):
        file = io.BytesIO()
        state = model[1].state_dict()
        torch.save({name: value.clone() for name, value in state.items()} if copied else state, file)
        sizes.append(len(file.getvalue()))
    return sizes


def clipped(rank):
    """clip_grad_norm_ from the first step on is what max_grad_norm= does, and the gradient norm is returned."""
    ends = []
    for options in ({"max_grad_norm": 0.5}, {}):
        model, data = model_and_data(rank)
        optimizer = GossipSGD(model.parameters(), lr=0.01, **options)
        for x in data:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if not options:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        ends.append(model.weight.detach().clone())
    return ends


def timeline(rank, folder):
    """The spans of a step by what they are, and what was written."""
    import glob

    from torch.profiler import ProfilerActivity, profile, record_function

    from fused_dlam.examples import timeline

    model, data = model_and_data(rank)
    optimizer, x, y = GossipSGD(model.parameters(), lr=0.01), data[0], data[0].sum(1, keepdim=True)
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            optimizer.zero_grad()
            with record_function("forward"):
                loss = torch.nn.functional.mse_loss(model(x), y)
            with record_function("backward"):
                loss.backward()
            with record_function("step"):
                optimizer.step()
    found = timeline.spans(profiler)
    timeline.draw({"my step": found}).savefig(f"{folder}/{rank}.png")
    profiler.export_chrome_trace(f"{folder}/{rank}.json")
    return [span.what for span in found], timeline.summary("my step", found), len(glob.glob(f"{folder}/{rank}.*"))
