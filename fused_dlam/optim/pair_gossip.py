"""`PairGossip`: any torch optimizer, its workers at paces of their own, averaging in random pairs."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from ..comm.pairs import Pairs
from ..topology import TopologyLike
from .unsynchronized import Unsynchronized


class PairGossip(Unsynchronized):
    """Makes an optimizer decentralized and asynchronous: after a step a worker averages with one partner at random.

        x <- x + d            d: what the inner optimizer's step adds to the parameters
        x, x_j <- their mean  with a random partner j, which answers by a thread, whatever it computes

    (AD-PSGD: Lian, Zhang, Zhang and Liu, "Asynchronous decentralized parallel stochastic gradient descent", 2018.) It
    is that up to one thing: no lock is held over the network, so a worker's x may have taken a step between its
    question and the answer. Both add and subtract one difference (comm/pairs.py): the mean of all is kept, up to
    rounding, and nothing can deadlock on any graph. As in AD-PSGD gradients are of parameters that others have moved
    meanwhile, and data count by how many steps their worker takes: a fast worker's more. Where workers have unlike data
    and unequal paces prefer `PushSum`, and where paces are known `GossipSGD(local_steps=True)`, see there.

    Args:
        optimizer: as for `PushSum`.
        topology: who may be partners, in either direction: default all.
        group, timeout, on_loss: as for `Mailbox`.
        seed: of the choice of partners.

    x is in host memory; parameters on a GPU are copied there and back in every step, which has not run on a GPU.
    Raises what `PushSum` raises. One worker alone takes the inner optimizer's steps, bit for bit.
    """

    key = "pair_gossip"

    def __init__(
        self,
        optimizer: Optimizer,
        topology: TopologyLike = "full",
        group: dist.ProcessGroup | None = None,
        *,
        timeout: float = 600.0,
        on_loss: str = "continue",
        seed: int = 0,
    ):
        super().__init__(optimizer, group, timeout)
        self._random = np.random.default_rng([seed, self._group.rank])
        self._box: Pairs = Pairs(self._flat.read().cpu(), topology, group, timeout, on_loss)

    def _mix(self, d: torch.Tensor) -> torch.Tensor:
        self._mixed_in(d)
        free = self._box.free
        if free:
            self._box.ask(int(self._random.choice(free)), self._step)
        return self._gather()

    def _mixed_in(self, d: torch.Tensor) -> None:
        self._box.add(d.cpu())

    def _gather(self) -> torch.Tensor:
        return self._box.read().to(self._flat.device)

    def _share(self) -> tuple[torch.Tensor, float]:
        return self._gather(), 1.0

    def _restore(self, x: torch.Tensor, mass: float) -> torch.Tensor:
        self._box.set(x.cpu())
        return x
