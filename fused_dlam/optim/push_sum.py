"""`PushSum`: any torch optimizer, its workers at paces of their own, averaging by asynchronous push-sum."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from ..comm.mailbox import Mailbox
from ..topology import TopologyLike
from .unsynchronized import Unsynchronized

#: The mass below which a worker sends nothing. One that hears of nobody for long would halve all of it away, until x is
#: too small a number to be divided by p.
LEAST = 2.0**-32


class PushSum(Unsynchronized):
    """Makes an optimizer decentralized and asynchronous: no worker waits for another in `step()`.

        x, p  <- what came is added         p: this worker's mass. All masses sum to n, all x to n times the mean
        x     <- x + p d                    d: what the inner optimizer's step adds to the parameters, at z
        x, p  <- x / 2, p / 2               the other half goes to the next neighbor, if its slot is free
        z     <- x / p                      what the model computes with: written into the parameters

    (Stochastic gradient push: Assran, Loizou, Ballas and Rabbat, 2019, on a `Mailbox`; Assran and Rabbat,
    "Asynchronous gradient push", 2021.) Steps are scaled by p: mass gathers where a worker is slow, so that the data of
    slow workers keep their share. Without (weigh="steps": x + d) data count by how many steps their worker takes.

        optimizer = PushSum(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        while time.monotonic() < end:  # ranks take unequal numbers of steps
            ...
            optimizer.step()
        with optimizer.averaged(model):
            evaluate(model)
        optimizer.close()

    When: workers that die, or whose paces nobody can plan for. Where paces are known, synchronous steps with unequal
    numbers of local steps (`GossipSGD(local_steps=True)`) ended lower in most trials (fused_dlam/comm/asynchrony.md),
    and are reproducible, which this is not; nor has it a certificate of stability.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built, over a model on its device. Its state stays each
            worker's own. All ranks start from rank 0's parameters. Frozen ones are not sent; those without a gradient
            are averaged all the same.
        topology: to whom halves go, in turn; see `Mailbox`. It must be strongly connected, no more.
        group, timeout, on_loss: as for `Mailbox`. A lost worker's mass is gone, and the mean with it; others go on.
        weigh: "mass" or "steps", see above.

    Memory: x, what was last written to the parameters, a displacement, and the mailbox's. CUDA parameters: messages
    pass through pinned host memory; this has not run on a GPU.

    Raises TypeError or ValueError for bad input, also on all ranks where theirs differ; ExchangeError if a rank does
    not build it in time. One worker alone takes the inner optimizer's steps, bit for bit.
    """

    key = "push_sum"

    def __init__(
        self,
        optimizer: Optimizer,
        topology: TopologyLike = "one-peer-exponential",
        group: dist.ProcessGroup | None = None,
        *,
        timeout: float = 600.0,
        on_loss: str = "continue",
        weigh: str = "mass",
    ):
        if weigh not in ("mass", "steps"):
            raise ValueError(f"weigh must be 'mass' or 'steps', not {weigh!r}")
        super().__init__(optimizer, group, timeout)
        self._by_mass, self._mass, self._x = weigh == "mass", 1.0, self._flat.read()
        self._box: Mailbox = Mailbox(self._x, topology, group, timeout, on_loss)

    @property
    def mass(self) -> float:
        """What this worker holds of the total, n: after a step a half of what it held when it took the step."""
        return self._mass

    @property
    def steps(self) -> dict[int, int]:
        """The step at which the last message of each source was sent; -1 before the first."""
        return self._box.steps

    def _collect(self) -> None:
        dx, mass = self._box.collect()
        if mass:
            assert isinstance(dx, torch.Tensor)
            self._x.add_(dx)
            self._mass += mass

    def _mix(self, d: torch.Tensor) -> torch.Tensor:
        self._collect()
        self._mixed_in(d)
        if self._mass > LEAST and self._box.push(self._x, self._mass, 0.5, self._step):
            self._x.mul_(0.5)
            self._mass *= 0.5
        return self._x / self._mass

    def _mixed_in(self, d: torch.Tensor) -> None:
        self._x.add_(d, alpha=self._mass if self._by_mass else 1.0)

    def _gather(self) -> torch.Tensor:
        self._collect()
        return self._x / self._mass

    def _share(self) -> tuple[torch.Tensor, float]:
        return self._x.clone(), self._mass

    def _restore(self, x: torch.Tensor, mass: float) -> torch.Tensor:
        self._x.copy_(x)
        self._mass = mass
        return self._x / self._mass
