"""# 7. Deep learning

Handwritten digits, a small network, and each worker has a share of the images. In a training script one line changes:
the optimizer is wrapped, or replaced. What is averaged are parameters, not gradients.

| here | what a step does | messages a worker sends per step |
|---|---|---|
| all-reduce | gradients are averaged over all workers, as DDP does | 2 (n - 1)/n of the model |
| AWC, static | x is averaged over the exponential graph while the gradient is computed | log2 n models |
| AWC, one peer | the same over the one-peer exponential graph | 1 model |
| ATC, one peer | first the step of SGD, then the average | 1 model |
| MI-DmSGD, the default | momentum SGD with bias correction, sent halfway | 1 model |
| AdamW, one peer | AdamW's own step, then the average | 1 model |
"""

# %%
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_dlam import Gossip, GossipSGD
from fused_dlam.tutorials.picture import panels
from fused_dlam.tutorials.worker import TIMEOUT, main, say

WORKERS = 4
LR, MOMENTUM, BATCH, TEST_IMAGES = 0.1, 0.9, 32, 400

# %% [markdown]
# ## The optimizers
#
# `Gossip` wraps any torch optimizer; `GossipSGD` is momentum SGD with a method of its own. All have one
# learning rate but AdamW, whose steps are in other units.

# %%
Build = Callable[[Any], Gossip | GossipSGD]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


OPTIMIZERS: dict[str, Build] = {
    "all-reduce": lambda p: GossipSGD(p, lr=LR, momentum=MOMENTUM, method="pmsgd", timeout=TIMEOUT),
    "AWC, static": lambda p: Gossip(sgd(p), topology="exponential", schedule="awc", timeout=TIMEOUT),
    "AWC, one peer": lambda p: Gossip(sgd(p), schedule="awc", timeout=TIMEOUT),
    "ATC, one peer": lambda p: Gossip(sgd(p), schedule="atc", timeout=TIMEOUT),
    "MI-DmSGD, the default": lambda p: GossipSGD(p, lr=LR, momentum=MOMENTUM, timeout=TIMEOUT),
    "AdamW, one peer": lambda p: Gossip(torch.optim.AdamW(p, lr=0.02), timeout=TIMEOUT),
}


# %% [markdown]
# ## Training
#
# An ordinary loop. Workers differ, so what is evaluated is their mean, within `averaged`.


# %%
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 images [64] in [0, 1] and their labels, in one order for all workers."""
    from sklearn.datasets import load_digits

    data, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data).float()[order] / 16, torch.tensor(labels)[order]


def train(build: Build, epochs: int) -> dict[str, Any]:
    rank, n = dist.get_rank(), dist.get_world_size()
    x, y = images()
    test_x, test_y = x[:TEST_IMAGES], y[:TEST_IMAGES]
    steps = (len(y) - TEST_IMAGES) // n // BATCH  # per epoch, as many on every worker
    x, y = x[TEST_IMAGES + rank :: n], y[TEST_IMAGES + rank :: n]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = build(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    found: dict[str, Any] = {"accuracy": [], "apart": [], "MB": 0.0}
    random = torch.Generator().manual_seed(rank)
    for _ in range(epochs):
        before = optimizer.bytes_sent
        for batch in torch.randperm(len(y), generator=random)[: steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            scheduler.step()
        found["MB"] += (optimizer.bytes_sent - before) / 1e6
        with torch.no_grad(), optimizer.averaged(model):
            found["accuracy"].append(100 * (model(test_x).argmax(1) == test_y).double().mean().item())
        found["apart"].append(optimizer.consensus_distance())
    return found


def compare(epochs: int = 12, names: Iterable[str] = OPTIMIZERS) -> dict[str, dict[str, Any]]:
    found = {}
    say(f"{'':24}{'accuracy':>10}{'MB sent':>10}{'workers apart, epoch 1':>25}")
    for name in names:
        one = found[name] = train(OPTIMIZERS[name], epochs)
        say(f"{name:24}{one['accuracy'][-1]:8.1f} %{one['MB']:10.2f}{one['apart'][0]:25.3f}")
    say(f"Accuracy of the workers' mean on {TEST_IMAGES} images after {epochs} epochs; MB sent by worker 0.")
    accuracies, sent = ([one[what] for one in found.values()] for what in ("accuracy", "MB"))
    ends = [accuracy[-1] for accuracy in accuracies]
    apart, share = max(ends) - min(ends), min(sent) / found["all-reduce"]["MB"]
    say(f"Their accuracies are within {apart:.1f} points, and one image is {100 / TEST_IMAGES:g} points.")
    say(f"One peer per step sends {share:.2f} of what all-reduce sends.")
    return found


# %% [notebook]
# %px found = compare()

# %% [markdown]
# ## Picture


# %%
def draw(found: dict[str, dict[str, Any]]) -> Any:
    figure, (left, right) = panels(["Accuracy of the mean, %", "MB sent by a worker"], width=5.2)
    for i, (name, one) in enumerate(found.items()):
        left.plot(range(1, len(one["accuracy"]) + 1), one["accuracy"], label=name, linewidth=2)
        right.barh(i, one["MB"])
    left.set(xlabel="epoch", ylim=(max(0, min(one["accuracy"][0] for one in found.values()) - 5), 100))
    left.legend(fontsize="small", loc="lower right")
    right.set(yticks=range(len(found)), yticklabels=list(found))
    right.invert_yaxis()
    return figure


# %% [notebook]
# draw(team.pull("found"))


# %% [script]
def run() -> dict[str, dict[str, Any]]:
    """The tutorial, on every worker."""
    return compare()


if __name__ == "__main__":
    main(__name__)
