"""`DecentLaM`: the paper's method under its own name."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..topology import TopologyLike
from .gossip_sgd import GossipSGD


class DecentLaM(GossipSGD):
    """DecentLaM: decentralized momentum SGD whose momentum leaves no bias beyond DSGD's (Yuan et al., ICCV 2021).

        m' = beta m + g~,  g~ = (x - sum_j w_ij (x_j - lr g_j)) / lr,  x' = x - lr m'

    For constant lr this is x'_i = sum_j w_ij (x_j - lr g_j) + beta (x_i - previous x_i). Proved for symmetric positive
    definite W; stable for any symmetric static one. On directed and one-peer graphs it diverges at usual momenta, so
    the constructor refuses them: use `GossipSGD` with its own method there. Arguments as `GossipSGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        topology: TopologyLike = "symmetric-exponential",
        **options: Any,
    ):
        if "method" in options:
            raise TypeError("DecentLaM is a method; pass method= to GossipSGD")
        super().__init__(params, lr, momentum, weight_decay, "decentlam", topology, **options)
