"""# 4. Bias correction

Decentralized gradient descent stays away from the minimum: there each worker's own gradient is not zero, and pulls it
out again in every step. Remember the pull, and take it away. Exact diffusion (Yuan, Ying, Zhao and Sayed, 2019) does
it with the difference of the last two steps:

    psi_i  =  x_i - gamma grad f_i(x_i)                        adapt
    x_i   <-  sum_j V_ij (psi_j + x_j - psi_j_before)          correct and combine, V = (I + W)/2

Its fixed point is the minimum itself, with any gamma that is stable. The price is one vector of memory; messages are as
many as before. W must be symmetric.
"""

# %%
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from fused_dlam import GossipSGD, Topology, neighbor_allreduce, topology
from fused_dlam.tutorials.least_squares import LeastSquares
from fused_dlam.tutorials.picture import panels
from fused_dlam.tutorials.worker import TIMEOUT, main, relative_errors, say

WORKERS = 4
GAMMA = 0.2


# %% [markdown]
# ## Exact diffusion by hand
#
# Two lines in the loop. psi starts as x, so that the first step is one of DGD. The graph is a ring of lazy workers, who
# give themselves half the weight: the corrected methods below are all stable there.


# %%
def lazy_ring() -> Topology:
    return topology.ring(dist.get_world_size()).lazy()


def exact_diffusion(f: LeastSquares, W: Topology, steps: int) -> list[torch.Tensor]:
    x = psi = torch.zeros_like(f.solution)
    path, V = [x], W.lazy()
    for _ in range(steps):
        psi, before = x - GAMMA * f.gradient(x), psi
        x = neighbor_allreduce(psi + x - before, V, timeout=TIMEOUT)
        path.append(x)
    return path


def by_hand(steps: int = 400) -> list[float]:
    f, W = LeastSquares(), lazy_ring()
    errors = relative_errors(exact_diffusion(f, W, steps), f.solution)
    say("Exact diffusion by hand, relative distance to the minimum:")
    say("  " + ", ".join(f"{errors[k]:.0e} after {k} steps" for k in (0, 100, 200, 400) if k <= steps))
    return errors


# %% [notebook]
# %px found = {"exact diffusion by hand": by_hand()}

# %% [markdown]
# ## The others, as methods of the optimizer
#
# D2 corrects with W in the place of (I + W)/2, and needs all eigenvalues of W above -1/3. Gradient tracking sends a
# second message, an estimate of the mean gradient. MI-DmSGD, this package's default, sums up the pulls of the neighbors
# in a slow memory that leaks (`correction_gain=300`): it keeps some 1/300 of the bias, and works on any graph. With
# `correction_gain=math.inf` it does not leak. DSGD and DmSGD have no memory of the pull, and stay where DGD stays.
#
# Momentum is 0 here, so that the methods are those of the papers.

# %%
METHODS: dict[str, dict[str, Any]] = {
    "dsgd": {},
    "exact-diffusion": {},
    "d2-dmsgd": {},
    "gradient-tracking": {},
    "mi-dmsgd": {"schedule": "atc"},
    "mi-dmsgd, no leak": {"schedule": "atc", "correction_gain": float("inf")},
}


def train(f: LeastSquares, W: Topology, steps: int, method: str, **options: Any) -> list[torch.Tensor]:
    x = torch.nn.Parameter(torch.zeros_like(f.solution))
    optimizer = GossipSGD([x], lr=GAMMA, momentum=0.0, method=method, topology=W, timeout=TIMEOUT, **options)
    path = [x.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        f.loss(x).backward()
        optimizer.step()
        path.append(x.detach().clone())
    return path


def by_method(steps: int = 400, methods: Iterable[str] = METHODS) -> dict[str, list[float]]:
    f, W = LeastSquares(), lazy_ring()
    found = {}
    say(f"\nGossipSGD(method=..., momentum=0) after {steps} steps:")
    for name in methods:
        path = train(f, W, steps, name.split(",")[0], **METHODS[name])
        found[name] = relative_errors(path, f.solution)
        say(f"  {name:18} {found[name][-1]:.1e}")
    say("DSGD stays. The corrected methods go on to the minimum, to the last digits of float64.")
    return found


# %% [notebook]
# %px found |= by_method()

# %% [markdown]
# ## Picture


# %%
def draw(found: dict[str, list[float]]) -> Any:
    figure, (axes,) = panels(["Distance to the minimum"], height=4.0, width=8.5)
    for i, (name, errors) in enumerate(found.items()):
        by_hand = "by hand" in name  # the lines of most methods lie on one another: later ones are thinner
        style = {"linestyle": ":", "color": "black", "zorder": 3} if by_hand else {"linewidth": 5.5 - 0.7 * i}
        axes.semilogy(errors, label=name, **style)
    axes.set(xlabel="step", ylabel="relative error")
    figure.legend(loc="outside right upper")
    return figure


# %% [notebook]
# draw(team.pull("found"))


# %% [script]
def run() -> dict[str, list[float]]:
    """The tutorial, on every worker."""
    return {"exact diffusion by hand": by_hand(), **by_method()}


if __name__ == "__main__":
    main(__name__)
