"""What optimizers around another one have of it: its groups, state and defaults are theirs."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer


class OfInner(Optimizer):
    """`inner` is set before `Optimizer` asks for any of these."""

    inner: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults
