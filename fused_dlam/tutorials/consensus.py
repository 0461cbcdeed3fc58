"""# 2. Average consensus

Each of n workers has a vector x_i and wants the mean of them all. Nobody may gather them: a worker talks to its
neighbors on a graph alone. It takes weighted averages with them, again and again,

    x_i  <-  sum_j W_ij x_j

and all of them come to the mean if the graph is connected and the rows and the columns of W sum to one. How fast? The
part of x that differs from the mean shrinks by rho in each step, the second largest singular or eigenvalue of W: a
number that the graph has, and that can be looked up before anything runs.
"""

# %%
import math
from typing import Any

import networkx as nx
import torch
import torch.distributed as dist

from fused_dlam import Topology, neighbor_allreduce, topology
from fused_dlam.tutorials.picture import panels
from fused_dlam.tutorials.worker import TIMEOUT, main, mean, relative_errors, say

WORKERS = 8


# %% [markdown]
# ## The algorithm
#
# One line of it is mathematics. All workers call it with the same graph and the same k, for on some graphs the
# neighbors change from step to step.


# %%
def consensus(x: torch.Tensor, graph: Topology, steps: int) -> list[torch.Tensor]:
    """x after 0, 1, 2, ... steps."""
    path = [x]
    for k in range(steps):
        x = neighbor_allreduce(x, graph, k, timeout=TIMEOUT)  # x_i <- sum_j W_ij x_j
        path.append(x)
    return path


# %% [markdown]
# ## Graphs
#
# Any connected networkx graph is a topology: `from_networkx` gives an undirected one Metropolis-Hastings weights,
# 1 / (1 + the larger degree) for an edge.


# %%
def graphs(n: int) -> list[Topology]:
    radius = 0.5
    points = nx.random_geometric_graph(n, radius, seed=5)  # points in a square, those that are near each other joined
    while not nx.is_connected(points):
        radius *= 1.1
        points = nx.random_geometric_graph(n, radius, seed=5)
    return [
        topology.ring(n),
        topology.grid(n),
        topology.star(n),
        topology.one_way_ring(n),
        topology.from_networkx(points, "random geometric"),
        topology.exponential(n),
    ]


# %% [markdown]
# ## The rate is rho
#
# The error, |x_i - mean| over all workers, is measured in every step. Late in the run its slowest part is left, which
# shrinks by rho per step.


# %%
def rate(errors: list[float]) -> float:
    """The shrinking per step, over the last 8 steps whose error is far above that of rounding."""
    last = max(k for k, error in enumerate(errors) if error > 1e-13)
    first = max(0, last - 8)
    return (errors[last] / errors[first]) ** (1 / (last - first)) if last > 1 else 0.0  # exact in one step


def start() -> tuple[torch.Tensor, torch.Tensor]:
    """This worker's vector, and the mean of all."""
    x = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    return x, mean(x)


def rates(steps: int = 150) -> dict[str, dict[str, Any]]:
    x, target = start()
    found = {}
    say(f"{'graph':18}{'messages':>9}{'measured rate':>15}{'rho':>9}{'error after 50 steps':>22}")
    for graph in graphs(dist.get_world_size()):
        errors = relative_errors(consensus(x, graph, steps), target)
        found[graph.name] = {"errors": errors, "rate": rate(errors), "rho": graph.rho}
        say(f"{graph.name:18}{graph.degree():9}{rate(errors):15.4f}{graph.rho:9.4f}{errors[50]:22.1e}")
    say("A worker sends as many messages per step as the second column says, at most. The measured rate is rho.")
    return found


# %% [notebook]
# %px found = rates()

# %% [markdown]
# ## Exact in a few steps
#
# The full graph has the mean after one step, with messages to everybody. The one-peer exponential graph has one message
# per step: worker i hears from i - 1, then from i - 2, from i - 4, ... If n is a power of two, everybody has the exact
# mean after log2 n steps (Ying et al., "Exponential graph is provably efficient for decentralized deep training",
# 2021).


# %%
def exact() -> dict[str, dict[str, Any]]:
    x, target = start()
    n = dist.get_world_size()
    found: dict[str, dict[str, Any]] = {}
    say()
    for graph, steps in ((topology.full(n), 1), (topology.one_peer_exponential(n), max(1, math.ceil(math.log2(n))))):
        errors = relative_errors(consensus(x, graph, steps), target)
        found[graph.name] = {"errors": errors, "steps": steps}
        say(f"{graph.name}: error {errors[-1]:.1e} after {steps} step{'s' * (steps > 1)}")
    if n & (n - 1) == 0:
        steps = found["one-peer-exponential"]["steps"]
        say(f"With one peer per step {n} workers have the exact mean after {steps} step{'s' * (steps > 1)}.")
    else:
        say(f"{n} workers are no power of two: one peer per step averages them as the exponential graph does.")
    return found


# %% [notebook]
# %px found |= exact()

# %% [markdown]
# ## Picture
#
# Lines are what was measured, dashes are the starting error times rho^k: they lie on one another.


# %%
def draw(found: dict[str, Any]) -> Any:
    figure, (axes,) = panels(["Distance to the mean"], height=4.2, width=8.5)
    for name, one in found.items():
        errors = one["errors"]
        steps = [k for k, error in enumerate(errors) if error > 1e-15]
        (line,) = axes.semilogy(steps, [errors[k] for k in steps], label=name, linewidth=3, alpha=0.8)
        if "rho" in one:
            late = max(k for k in steps if errors[k] > 1e-13)
            start = errors[late] / one["rho"] ** late  # of its slowest part alone
            line.set_label(f"{name}, rho = {one['rho']:.3f}")
            axes.semilogy(steps, [start * one["rho"] ** k for k in steps], "--", color="black", linewidth=0.8)
        else:
            axes.semilogy(range(len(errors)), [max(e, 1e-16) for e in errors], "o-", color=line.get_color())
    axes.set(xlabel="step", ylabel="relative error", ylim=(1e-16, 5), xlim=(0, 100))
    figure.legend(loc="outside right upper")
    return figure


# %% [notebook]
# draw(team.pull("found"))


# %% [script]
def run() -> dict[str, Any]:
    """The tutorial, on every worker."""
    found = rates()
    return {**found, **exact()}


if __name__ == "__main__":
    main(__name__)
