"""# 3. Decentralized gradient descent

Worker i knows a function f_i alone, and all want the minimum x* of their mean f(x) = (1/n) sum_i f_i(x). Gradient
descent would need the mean of the gradients, which nobody has. Decentralized gradient descent (DGD) takes its own
gradient, and averages x with the neighbors. There are two forms:

    x_i  <-  sum_j W_ij (x_j - gamma grad f_j(x_j))          ATC: adapt, then combine
    x_i  <-  sum_j W_ij x_j - gamma grad f_i(x_i)            AWC: adapt while combining

AWC can send x while the gradient is computed. ATC is closer to the minimum and stable for larger steps gamma. Neither
ends at the minimum: each worker's own gradient pulls it away, by a distance proportional to gamma.
"""

# %%
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fused_dlam import GossipSGD, Topology, neighbor_allreduce, topology
from fused_dlam.tutorials.least_squares import LeastSquares
from fused_dlam.tutorials.picture import panels
from fused_dlam.tutorials.worker import TIMEOUT, main, relative_errors, say

WORKERS = 4


# %% [markdown]
# ## The two forms
#
# One line each. f is this worker's own part of a least squares problem, whose solution is known.

# %%
Form = Callable[[torch.Tensor, LeastSquares, Topology, float, int], torch.Tensor]


def atc(x: torch.Tensor, f: LeastSquares, W: Topology, gamma: float, k: int = 0) -> torch.Tensor:
    return neighbor_allreduce(x - gamma * f.gradient(x), W, k, timeout=TIMEOUT)


def awc(x: torch.Tensor, f: LeastSquares, W: Topology, gamma: float, k: int = 0) -> torch.Tensor:
    return neighbor_allreduce(x, W, k, timeout=TIMEOUT) - gamma * f.gradient(x)


def descend(form: Form, f: LeastSquares, W: Topology, gamma: float, steps: int) -> list[torch.Tensor]:
    """x after 0, 1, 2, ... steps from zero."""
    path = [torch.zeros_like(f.solution)]
    for k in range(steps):
        path.append(form(path[-1], f, W, gamma, k))
    return path


# %% [markdown]
# ## The bias halves with the step
#
# Each run is long enough (steps times gamma is the same for all) to end where the method stays.


# %%
def biases(gammas: tuple[float, ...] = (0.2, 0.1, 0.05), length: float = 25.0) -> dict[str, dict[float, list[float]]]:
    f, W = LeastSquares(), topology.exponential(dist.get_world_size())
    found: dict[str, dict[float, list[float]]] = {}
    say("Relative distance to the minimum at the end, on the exponential graph:")
    for form in (atc, awc):
        paths = {gamma: descend(form, f, W, gamma, round(length / gamma)) for gamma in gammas}
        errors = {gamma: relative_errors(path, f.solution) for gamma, path in paths.items()}
        ends = [errors[gamma][-1] for gamma in gammas]
        say(f"  {form.__name__}: " + ", ".join(f"{e:.3e} with {g:g}" for g, e in zip(gammas, ends, strict=True)))
        say("       half the step, a bias smaller by " + " and ".join(f"{a / b:.2f}" for a, b in zip(ends, ends[1:])))  # noqa: B905
        found[form.__name__] = errors
    return found


# %% [notebook]
# %px bias = biases()

# %% [markdown]
# ## How large a step is stable
#
# For least squares the step is x <- M x + constant, with M = W (I - gamma H) for ATC and M = W - gamma H for AWC, where
# H holds the workers' Hessians as blocks. It comes to rest if all eigenvalues of M are below one. To know the largest
# such gamma the workers tell each other their H. Then they try one that is 5 % below that limit and one that is 5 %
# above it, and watch how far x moves from one step to the next.


# %%
def largest_eigenvalue(form: Form, hessians: list[torch.Tensor], W: Topology, gamma: float) -> float:
    n, d = len(hessians), len(hessians[0])
    mix = torch.kron(torch.as_tensor(W.weights()), torch.eye(d, dtype=torch.float64))
    H = torch.block_diag(*hessians)
    M = mix @ (torch.eye(n * d, dtype=torch.float64) - gamma * H) if form is atc else mix - gamma * H
    return torch.linalg.eigvals(M).abs().max().item()


def limit(form: Form, hessians: list[torch.Tensor], W: Topology) -> float:
    """The largest stable gamma, by bisection."""
    low, high = 0.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if largest_eigenvalue(form, hessians, W, middle) < 1 else (low, middle)
    return low


def stable_range(steps: int = 100) -> dict[str, dict[str, float]]:
    f, W = LeastSquares(), topology.exponential(dist.get_world_size())
    hessians = [torch.empty_like(f.hessian()) for _ in range(dist.get_world_size())]
    dist.all_gather(hessians, f.hessian())
    found: dict[str, dict[str, float]] = {}
    say("\nThe largest stable gamma, by the eigenvalues, and how far x still moves with one below and one above it:")
    for form in (atc, awc):
        gamma = limit(form, hessians, W)
        growth = []
        for factor in (0.95, 1.05):
            path = descend(form, f, W, factor * gamma, steps)
            moves = relative_errors([f.solution + new - old for old, new in zip(path, path[1:])], f.solution)  # noqa: B905
            growth.append(moves[-1] / moves[steps // 2])
        found[form.__name__] = {"limit": gamma, "below": growth[0], "above": growth[1]}
        say(f"  {form.__name__}: gamma = {gamma:.3f}. From step {steps // 2} to step {steps} the move is multiplied")
        say(f"       by {growth[0]:.4f} with {0.95 * gamma:.3f}, and by {growth[1]:.0f} with {1.05 * gamma:.3f}")
    say("ATC is stable for larger steps than AWC.")
    return found


# %% [notebook]
# %px stable = stable_range()

# %% [markdown]
# ## The same as an optimizer
#
# `GossipSGD` with the method of decentralized SGD and without momentum is this loop, for any model that autograd can
# differentiate. Its digits are the same but for the order of sums.


# %%
def as_optimizer(gamma: float = 0.1, steps: int = 100) -> dict[str, float]:
    f, W = LeastSquares(), topology.exponential(dist.get_world_size())
    differences = {}
    for form in (atc, awc):
        x = torch.nn.Parameter(torch.zeros_like(f.solution))
        optimizer = GossipSGD(
            [x], lr=gamma, momentum=0.0, method="dsgd", topology=W, schedule=form.__name__, timeout=TIMEOUT
        )
        for _ in range(steps):
            optimizer.zero_grad()
            f.loss(x).backward()
            optimizer.step()
        optimizer.synchronize()
        by_hand = descend(form, f, W, gamma, steps)[-1]
        differences[form.__name__] = relative_errors([x.detach() - by_hand + f.solution], f.solution)[0]
    told = ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items())
    say(f"\nGossipSGD(method='dsgd', momentum=0) after {steps} steps, relative difference to the loop by hand: {told}")
    return differences


# %% [notebook]
# %px differences = as_optimizer()

# %% [markdown]
# ## Picture
#
# A smaller step comes nearer, and later.


# %%
def draw(found: dict[str, dict[float, list[float]]]) -> Any:
    figure, (left, right) = panels(["Distance to the minimum, by step", "Where it stays, by gamma"], width=5.0)
    colors: dict[float, str] = {}
    for form, style in (("atc", "-"), ("awc", "--")):
        for gamma, errors in found[form].items():
            (line,) = left.semilogy(errors, style, label=f"{form}, gamma = {gamma:g}", color=colors.get(gamma))
            colors[gamma] = line.get_color()
        gammas = list(found[form])
        right.loglog(gammas, [found[form][gamma][-1] for gamma in gammas], "o" + style, label=form)
    right.loglog(gammas, [found["awc"][gammas[0]][-1] * g / gammas[0] for g in gammas], ":", color="black",
                 label="proportional to gamma")  # fmt: skip
    left.set(xlabel="step k", ylabel="relative error", xlim=(0, 300))
    right.set(xlabel="gamma", xticks=gammas, xticklabels=[f"{gamma:g}" for gamma in gammas])
    right.minorticks_off()
    left.legend(fontsize="small")
    right.legend()
    return figure


# %% [notebook]
# draw(team.pull("bias"))


# %% [script]
def run() -> dict[str, Any]:
    """The tutorial, on every worker."""
    return {**biases(), "stable": stable_range(), "differences": as_optimizer()}


if __name__ == "__main__":
    main(__name__)
