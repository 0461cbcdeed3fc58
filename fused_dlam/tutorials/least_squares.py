"""A problem whose answer is known: least squares, of which every worker has some rows."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .worker import mean

ROWS, UNKNOWNS = 20, 5


class LeastSquares:
    """f_i(x) = |A_i x - b_i|^2 / (2 m), this worker's part of f(x) = (1/n) sum_i f_i(x); m rows each.

    The rows are drawn at random, and each worker has noise of its own in b_i = A_i x_i + noise, with an x_i of its own
    around a common one: what is best for one worker is not what is best for all.

    Attributes: `A` [m, d], `b` [m], and `solution` [d], the minimum of f, all of float64.
    """

    def __init__(self, unlike: float = 1.0):
        random = torch.Generator().manual_seed(dist.get_rank())
        common = torch.arange(1.0, UNKNOWNS + 1, dtype=torch.float64)
        own = common + unlike * torch.randn(UNKNOWNS, dtype=torch.float64, generator=random)
        self.A = torch.randn(ROWS, UNKNOWNS, dtype=torch.float64, generator=random)
        self.b = self.A @ own + 0.1 * torch.randn(ROWS, dtype=torch.float64, generator=random)
        self.solution = torch.linalg.solve(mean(self.A.T @ self.A), mean(self.A.T @ self.b))

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        """A_i^T (A_i x - b_i) / m."""
        return self.A.T @ (self.A @ x - self.b) / len(self.A)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        """f_i(x)."""
        return (self.A @ x - self.b).square().sum() / (2 * len(self.A))

    def hessian(self) -> torch.Tensor:
        """A_i^T A_i / m."""
        return self.A.T @ self.A / len(self.A)
