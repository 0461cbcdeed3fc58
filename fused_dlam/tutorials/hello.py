"""# 1. Workers

A decentralized program is one script that n processes run. Each knows its own number, its *rank*, and how many there
are. They have no memory in common: what one wants another to know it sends. There is no server.
"""

# %%
from typing import Any

import torch
import torch.distributed as dist

from fused_dlam import neighbor_allreduce, topology
from fused_dlam.tutorials.picture import panels
from fused_dlam.tutorials.worker import TIMEOUT, main, mean, say

WORKERS = 4


# %% [markdown]
# ## Everybody says hello
#
# Each line comes from another process. Worker 0 gathers them here, so that they appear in order.


# %%
def hello() -> list[str]:
    rank, n = dist.get_rank(), dist.get_world_size()
    greetings: list[str] = [""] * n
    dist.all_gather_object(greetings, f"Hello, I am worker {rank} of {n}.")
    for greeting in greetings:
        say(greeting)
    return greetings


# %% [notebook]
# %px greetings = hello()

# %% [markdown]
# ## One average with the neighbors
#
# The workers stand on a ring. Worker i has the number i, and takes the average of its own and its two neighbors':
#
#     x_i  <-  sum_j W_ij x_j          W_ij = 1/3 if i = j or i and j are neighbors, else 0
#
# One call does it, on all workers. Each sends one message to each neighbor, and nobody else hears of it. The row sums
# of W are one, so x_i is an average; the column sums are one too, so the mean of all x stays what it was.


# %%
def one_average() -> dict[str, Any]:
    rank, n = dist.get_rank(), dist.get_world_size()
    ring = topology.ring(n)
    x = torch.tensor([float(rank)], dtype=torch.float64)
    new = neighbor_allreduce(x, ring, timeout=TIMEOUT)

    peers = ring.peers(rank)
    lines: list[Any] = [None] * n
    dist.all_gather_object(lines, (rank, peers.sources, x.item(), new.item()))
    say("\nOn a ring each takes the average of its own number and its neighbors':")
    for i, sources, before, after in lines:
        say(f"  worker {i} hears from {' and '.join(map(str, sources))}: {before:.3f} becomes {after:.3f}")
    before_mean, after_mean = mean(x).item(), mean(new).item()
    say(f"The mean of all numbers was {before_mean:.3f} and is {after_mean:.3f}.")
    return {
        "before": [line[2] for line in lines],
        "after": [line[3] for line in lines],
        "weights": ring.weights().tolist(),
        "means": (before_mean, after_mean),
    }


# %% [notebook]
# %px found = one_average()

# %% [markdown]
# ## A mistake
#
# Worker 1 passes a vector of another length. The workers compare what they pass before they send it, so all of them
# raise, and the message says who passed what. Nobody hangs, and the next call works.


# %%
def mistake() -> str:
    rank, n = dist.get_rank(), dist.get_world_size()
    message = "no error"
    try:
        neighbor_allreduce(torch.zeros(3 if rank == 1 else 2), topology.ring(n), timeout=TIMEOUT)
    except ValueError as error:
        message = str(error)
    say("\nWorker 1 passes a vector of length 3, the others of length 2. All of them get the same error:")
    say(f"  ValueError: {message}")
    neighbor_allreduce(torch.zeros(2), topology.ring(n), timeout=TIMEOUT)
    say("The next call works as ever.")
    return message


# %% [notebook]
# %px message = mistake()

# %% [markdown]
# ## Picture
#
# The weights W, one row per worker, and the numbers before and after: a step brings them together, not yet to one.


# %%
def draw(found: dict[str, Any]) -> Any:
    figure, (left, right) = panels(["W: whom worker i hears, and how much it counts", "before and after one average"])
    n = len(found["before"])
    left.imshow(found["weights"], cmap="Blues", vmin=0, vmax=1)
    left.grid(False)
    left.set(xlabel="j", ylabel="i", xticks=range(n), yticks=range(n))
    for i, row in enumerate(found["weights"]):
        for j, weight in enumerate(row):
            if weight > 0:
                left.text(j, i, f"{weight:.2f}", ha="center", va="center")
    workers = range(n)
    right.plot(workers, found["before"], "o", label="before")
    right.plot(workers, found["after"], "s", label="after")
    right.axhline(found["means"][0], color="black", linestyle="--", linewidth=1, label="mean of all")
    right.set(xlabel="worker", xticks=workers)
    right.legend()
    return figure


# %% [notebook]
# draw(team.pull("found"))


# %% [script]
def run() -> dict[str, Any]:
    """The tutorial, on every worker."""
    greetings = hello()
    found = one_average()
    return {"greetings": greetings, **found, "message": mistake()}


if __name__ == "__main__":
    main(__name__)
