"""# 5. Directed and time-varying graphs

So far the rows and the columns of W summed to one. Where links go one way, or change from step to step, nobody may be
able to arrange that: a worker knows whom it hears, or whom it sends to, and not what the others weigh.

* **Pull**: a worker averages what it hears, with equal weights. Rows sum to one, columns do not. All agree, on a wrong
  mean.
* **Push**: a worker divides what it has among those it sends to, and adds up what comes. Columns sum to one, so the sum
  of all x stays what it was; but some workers collect more than others. So each sends a *mass* w along, which started
  at one and is divided in the same way:

      x_i  <-  sum_j A_ij x_j
      w_i  <-  sum_j A_ij w_j          z_i = x_i / w_i  comes to the mean

That is push-sum (Kempe, Dobra and Gehrke, 2003).
"""

# %%
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fused_dlam import GossipSGD, Topology, neighbor_exchange, push_sum, topology
from fused_dlam.tutorials.least_squares import LeastSquares
from fused_dlam.tutorials.picture import panels
from fused_dlam.tutorials.worker import TIMEOUT, main, mean, relative_errors, say

WORKERS = 6


# %% [markdown]
# ## The graph
#
# A mesh of two rows. In every step each worker sends to one of its neighbors, the next one in turn. Those in the middle
# have three neighbors and those in the corners two, so that in one step a worker may hear from two others, or from
# none.


# %%
def mesh() -> Topology:
    return topology.one_peer(topology.grid(dist.get_world_size()))


def neighbors(graph: Topology, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Whom this worker hears in step k, and whom it sends to."""
    peers = graph.peers(dist.get_rank(), k)
    return peers.sources, peers.destinations


# %% [markdown]
# ## Pull and push
#
# `neighbor_exchange` asks of each worker what it knows itself: whom it hears, whom it sends to, and the weights. The
# workers compare that before anything is sent, so a contradiction is an error on all of them and not a wait without
# end. `push_sum` does the second by itself, for a graph whose columns sum to one, and sends x and w in one message.
#
# What is averaged: worker 0 has a one and all others have a zero. The mean is 1/n, so that each worker learns how many
# there are.


# %%
def pull(x: torch.Tensor, graph: Topology, k: int, check: bool = True) -> torch.Tensor:
    sources, destinations = neighbors(graph, k)
    return neighbor_exchange(x, sources, destinations, timeout=TIMEOUT, check=check)  # equal weights for all it hears


def push(x: torch.Tensor, w: torch.Tensor, graph: Topology, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    sources, destinations = neighbors(graph, k)
    share = 1 / (1 + len(destinations))
    into, out = dict.fromkeys(sources, 1.0), dict.fromkeys(destinations, share)
    x, w = neighbor_exchange([x, w], into, out, self_weight=share, timeout=TIMEOUT)
    return x, w


def consensus(steps: int = 150) -> dict[str, Any]:
    graph = mesh()
    x = torch.tensor([1.0 if dist.get_rank() == 0 else 0.0], dtype=torch.float64)
    target = mean(x)
    by_pull, by_push, by_hand = [x], [x], [x]
    (u, w), (v, p) = (x, 1.0), (x, torch.ones((), dtype=torch.float64))
    for k in range(steps):
        by_pull.append(pull(by_pull[-1], graph, k))
        u, w = push_sum(u, w, graph, k, timeout=TIMEOUT)
        by_push.append(u / w)
        v, p = push(v, p, graph, k)
        by_hand.append(v / p)
    found = {
        "pull": relative_errors(by_pull, target),
        "push-sum": relative_errors(by_push, target),
        "push-sum by hand": relative_errors(by_hand, target),
    }
    apart = relative_errors([by_pull[-1] - mean(by_pull[-1]) + target], target)[0]
    masses = [torch.empty(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(masses, torch.tensor([w], dtype=torch.float64))
    say(f"{steps} steps on a mesh, one peer per step, relative distance to the mean:")
    for (name, errors), end in zip(found.items(), (by_pull[-1], u / w, v / p), strict=True):
        say(f"  {name:18} {errors[-1]:.1e}, so there seem to be {1 / mean(end).item():.3f} workers")
    say(f"The workers that pull agree to {apart:.0e}, on a wrong mean. The masses of push-sum are what corrects it:")
    all_masses = torch.cat(masses).tolist()
    say("  " + " ".join(f"{mass:.3f}" for mass in all_masses) + f", their sum is {sum(all_masses):.12f}")
    return {**found, "apart": apart, "masses": all_masses}


# %% [notebook]
# %px agreed = consensus()

# %% [markdown]
# ## Optimization
#
# Gradient descent by pull favors the data of those who are heard most, however small gamma is. With push-sum in the
# place of the average it stays away from the minimum by its bias, as DGD does: less with a smaller gamma. Push-DIGing
# (Nedic, Olshevsky and Shi, 2017) has an estimate y of the mean gradient besides, which is pushed too:
#
#     u_i, y_i  <-  sum_j A_ij (u_j - gamma y_j),  sum_j A_ij y_j          w_i  <-  sum_j A_ij w_j
#     x_i = u_i / w_i
#     y_i  <-  y_i + grad f_i(x_i) - grad f_i(x_i before)
#
# It comes to the minimum itself, on any graph whose links over time reach everybody. All of it is one message per step.


# %%
def pull_descent(f: LeastSquares, A: Topology, gamma: float, steps: int) -> list[torch.Tensor]:
    path = [torch.zeros_like(f.solution)]
    for k in range(steps):
        path.append(pull(path[-1] - gamma * f.gradient(path[-1]), A, k, check=False))
    return path


def push_descent(f: LeastSquares, A: Topology, gamma: float, steps: int) -> list[torch.Tensor]:
    x = u = torch.zeros_like(f.solution)
    w, path = 1.0, [x]
    for k in range(steps):
        u, w = push_sum(u - gamma * f.gradient(x), w, A, k, timeout=TIMEOUT)
        x = u / w
        path.append(x)
    return path


def push_diging(f: LeastSquares, A: Topology, gamma: float, steps: int) -> list[torch.Tensor]:
    x = u = torch.zeros_like(f.solution)
    y, w = f.gradient(x), 1.0
    path = [x]
    for k in range(steps):
        (u, y), w = push_sum([u - gamma * y, y], w, A, k, timeout=TIMEOUT)
        x, before = u / w, x
        y = y + f.gradient(x) - f.gradient(before)
        path.append(x)
    return path


Loop = Callable[[LeastSquares, Topology, float, int], list[torch.Tensor]]
LOOPS: dict[str, tuple[Loop, tuple[float, ...]]] = {
    "descent by pull": (pull_descent, (0.1, 0.025)),
    "descent by push-sum": (push_descent, (0.1, 0.025)),
    "push-DIGing": (push_diging, (0.1,)),
}


def optimization(steps: int = 500) -> dict[str, list[float]]:
    f, A = LeastSquares(), mesh()
    found = {}
    say(f"\nLeast squares on the same graph, relative distance to the minimum after {steps} steps:")
    for name, (loop, gammas) in LOOPS.items():
        for gamma in gammas:
            errors = relative_errors(loop(f, A, gamma, steps), f.solution)
            found[f"{name}, {gamma:g}"] = errors
            say(f"  {name:22} gamma = {gamma:<6g} {errors[-1]:.1e}")
    say("Pull stays away with any gamma, push-sum comes nearer with a smaller one, push-DIGing comes to the minimum.")
    return found


# %% [notebook]
# %px minimum = optimization()

# %% [markdown]
# ## As an optimizer
#
# `GossipSGD` knows the graph, so it knows the masses too: it sends x alone (and y with push-DIGing), and has momentum.
# Here it is 0, as in the loops above.


# %%
def as_optimizer(steps: int = 500, methods: tuple[str, ...] = ("push-sum", "push-diging")) -> dict[str, float]:
    f, A = LeastSquares(), mesh()
    found = {}
    for method in methods:
        x = torch.nn.Parameter(torch.zeros_like(f.solution))
        optimizer = GossipSGD([x], lr=0.1, momentum=0.0, method=method, topology=A, timeout=TIMEOUT)
        for _ in range(steps):
            optimizer.zero_grad()
            f.loss(x).backward()
            optimizer.step()
        found[method] = relative_errors([x.detach()], f.solution)[0]
    told = ", ".join(f"{method} {error:.1e}" for method, error in found.items())
    say(f"\nGossipSGD with gamma = 0.1 on the same graph after {steps} steps: {told}")
    return found


# %% [notebook]
# %px optimized = as_optimizer()

# %% [markdown]
# ## Picture


# %%
def draw(found: dict[str, Any]) -> Any:
    figure, (left, right) = panels(["Distance to the mean", "Distance to the minimum"], width=6.0)
    for name in ("pull", "push-sum"):
        left.semilogy([max(error, 1e-16) for error in found[name]], label=name)
    left.legend()
    for name, (_, gammas) in LOOPS.items():
        for gamma in gammas:
            right.semilogy(found[f"{name}, {gamma:g}"], label=f"{name}, gamma = {gamma:g}")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    for axes in (left, right):
        axes.set(xlabel="step", ylabel="relative error")
    return figure


# %% [notebook]
# draw(team.pull("agreed") | team.pull("minimum"))


# %% [script]
def run() -> dict[str, Any]:
    """The tutorial, on every worker."""
    return {**consensus(), **optimization(), "optimizer": as_optimizer()}


if __name__ == "__main__":
    main(__name__)
