"""# 6. Asynchrony

In all that came before, a worker waits for its neighbors in every step, so the slowest sets the pace of all. Here
nobody waits. A worker pushes half of what it has to a neighbor's mailbox, goes on at once, and adds whatever is in its
own mailbox when it next looks there. With x travels the mass p, as in push-sum, so it does not matter who pushes how
often:

    dx, dp = what came meanwhile
    x, p  <-  x + dx, p + dp
    x, p  <-  x/2, p/2  if a push of x/2, p/2 has left           x / p comes to the mean

Nothing is ever lost: the sum of all x, in the workers and on the way, stays what it was. Worker 0 is slow in this
tutorial: it sleeps five times as long as the others.
"""

# %%
import time
from typing import Any

import torch
import torch.distributed as dist

from fused_dlam import Mailbox, PushSum, neighbor_allreduce, topology
from fused_dlam.tutorials.least_squares import LeastSquares
from fused_dlam.tutorials.picture import panels
from fused_dlam.tutorials.worker import TIMEOUT, main, mean, say

WORKERS = 4
PAUSE, SLOWER = 0.01, 5  # seconds that a step takes, by sleeping; how many times as long worker 0 sleeps


def pause() -> None:
    """The computation of one step."""
    time.sleep(PAUSE * (SLOWER if dist.get_rank() == 0 else 1))


# %% [markdown]
# ## Consensus, each at its own pace
#
# The error is each worker's own, |x_i / p_i - mean|, with the time at which it was measured. When time is up all close
# their mailboxes: what was on its way has arrived then, and is collected once more.


# %%
def asynchronous(x: torch.Tensor, target: torch.Tensor, seconds: float) -> dict[str, Any]:
    p, step, log = 1.0, 0, []
    box: Any = Mailbox(x, topology.exponential(dist.get_world_size()), timeout=TIMEOUT)
    dist.barrier()
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        log.append((now, ((x / p - target).norm() / target.norm()).item()))
        pause()
        dx, dp = box.collect()
        x, p = x + dx, p + dp
        if box.push(x, p, weight=0.5, step=step):
            x, p = x / 2, p / 2
        step += 1
    box.close()
    dx, dp = box.collect()
    return {"x": x + dx, "p": p + dp, "steps": step, "log": log}


def synchronous(x: torch.Tensor, target: torch.Tensor, seconds: float) -> dict[str, Any]:
    """The same graph with `neighbor_allreduce`: as many steps on every worker, at the pace of the slowest."""
    graph, log = topology.exponential(dist.get_world_size()), []
    dist.barrier()
    start = time.monotonic()
    for k in range(round(seconds / (PAUSE * SLOWER))):
        log.append((time.monotonic() - start, ((x - target).norm() / target.norm()).item()))
        pause()
        x = neighbor_allreduce(x, graph, k, timeout=TIMEOUT)
    return {"steps": len(log), "log": log}


def consensus(seconds: float = 2.5) -> dict[str, Any]:
    n = dist.get_world_size()
    x = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    target = mean(x)
    one = asynchronous(x, target, seconds)
    z = one["x"] / one["p"]
    other = synchronous(x, target, seconds)

    mine = (one["steps"], one["p"], ((z - target).norm() / target.norm()).item(), one["log"], other["log"])
    ranks: list[Any] = [None] * n
    dist.all_gather_object(ranks, mine)
    lost_x = ((mean(one["x"]) - target).norm() / target.norm()).item()
    lost_p = abs(sum(p for _, p, *_ in ranks) - n)
    say(f"{seconds:g} seconds of consensus among {n} workers, of which worker 0 is {SLOWER} times slower:")
    for rank, (steps, p, error, *_) in enumerate(ranks):
        say(f"  worker {rank}: {steps} steps, mass {p:.3f} at the end, error {error:.0e}")
    say(f"Lost of the sum of all masses {lost_p:.0e}, of the sum of all x {lost_x:.0e}.")
    say(f"In steps together all workers took {other['steps']}.")
    return {
        "steps": [rank[0] for rank in ranks],
        "errors": [rank[2] for rank in ranks],
        "logs": [rank[3] for rank in ranks],
        "together": [rank[4] for rank in ranks],
        "lost": (lost_p, lost_x),
    }


# %% [notebook]
# %px found = consensus()

# %% [markdown]
# ## Training, each at its own pace
#
# `PushSum` wraps any torch optimizer in this manner: in a step it adds what came, takes the inner optimizer's step d,
# pushes a half, and computes with z = x / p. A fast worker takes more steps, so its data would count for more. Mass
# gathers where a worker is slow, and a step that is multiplied by the worker's mass gives all data their share again:
# that is what `PushSum` does by default. With weigh="steps" it does not.


# %%
def train(weigh: str, f: LeastSquares, seconds: float) -> dict[str, Any]:
    x = torch.nn.Parameter(torch.zeros_like(f.solution))
    optimizer = PushSum(torch.optim.SGD([x], lr=0.02), "exponential", timeout=TIMEOUT, weigh=weigh)
    dist.barrier()
    start, steps = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        pause()
        optimizer.zero_grad()
        f.loss(x).backward()
        optimizer.step()
        steps += 1
    with optimizer.averaged():
        error = ((x - f.solution).norm() / f.solution.norm()).item()
    optimizer.close()
    return {"steps": steps, "error": error}


def training(seconds: float = 6.0) -> dict[str, Any]:
    f = LeastSquares(unlike=4.0)
    found = {weigh: train(weigh, f, seconds) for weigh in ("mass", "steps")}
    say(f"\n{seconds:g} seconds of least squares with PushSum, distance of the workers' mean to the minimum:")
    say(f"  steps multiplied by the worker's mass  {found['mass']['error']:.1e}")
    say(f"  steps as they are                      {found['steps']['error']:.1e}")
    say("In the second the data of fast workers count for more, so that the minimum is another one.")
    return found


# %% [notebook]
# %px trained = training()

# %% [markdown]
# ## Picture
#
# Each worker's own error over time: left at its own pace, right in steps together, which are as slow as worker 0.


# %%
def draw(found: dict[str, Any]) -> Any:
    figure, (left, right) = panels(["Nobody waits", "Everybody waits for the slowest"], width=4.6)
    for axes, logs in ((left, found["logs"]), (right, found["together"])):
        for rank, log in enumerate(logs):
            axes.semilogy([t for t, _ in log], [max(error, 1e-16) for _, error in log], label=f"worker {rank}")
        axes.set(xlabel="seconds", ylabel="relative error", ylim=(3e-17, 10))
        axes.legend()
    return figure


# %% [notebook]
# draw(team.pull("found"))


# %% [script]
def run() -> dict[str, Any]:
    """The tutorial, on every worker."""
    return {**consensus(), "training": training()}


if __name__ == "__main__":
    main(__name__)
