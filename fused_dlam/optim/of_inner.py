"""What optimizers around another one have of it: its groups, state and defaults are theirs, and its step is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

_around: weakref.WeakKeyDictionary[Optimizer, weakref.ref[OfInner]] = weakref.WeakKeyDictionary()  # the last one built


class OfInner(Optimizer):
    """`inner` is set before `Optimizer` asks for any of these."""

    inner: Optimizer
    _closed: bool
    _steps_inner = False  # whether it is this that calls the inner optimizer's step()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def _step_inner(self, *closure: Callable[[], Any]) -> Any:
        self._steps_inner = True
        try:
            return self.inner.step(*closure)
        finally:
            self._steps_inner = False

    def _refuse_inner_steps(self) -> None:
        """From now on a script that calls the inner optimizer's step() is told so: it would train each worker alone."""
        if self.inner not in _around:
            self.inner.register_step_pre_hook(_refuse)
        _around[self.inner] = weakref.ref(self)


def _refuse(inner: Optimizer, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling():  # a compiled step stays whole
        return
    known = _around.get(inner)
    around = None if known is None else known()
    if around is not None and not (around._steps_inner or around._closed):
        raise RuntimeError(
            f"step() of the {type(inner).__name__} inside a {type(around).__name__}, which would train this worker"
            f" alone: call step() of the {type(around).__name__}, and give that to a GradScaler"
        )
