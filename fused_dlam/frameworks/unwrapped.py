"""Optimizers in the wrappers of a framework: `self.optimizers().averaged(model)` in Lightning, `.join()` in Fabric.

Their wrappers keep the optimizer as `_optimizer`, and are instances of a class that is derived from its class. So they
find its methods and properties before they look into it, and would call them on themselves, where nothing runs.
"""

from __future__ import annotations

from typing import Any

# What wrappers have of their own, or find by themselves: Gossip's groups, state and defaults are the inner optimizer's.
OTHERS = {"step", "param_groups", "state", "defaults"}
_classes: dict[type, type] = {}


def seen_through(optimizer: Any) -> Any:
    """Makes the optimizer's public methods and properties work on it, whatever wraps it. Returns it."""
    kind = type(optimizer)
    if kind not in _classes and kind not in _classes.values():
        public = (name for name in dir(kind) if not name.startswith("_") and name not in OTHERS)
        _classes[kind] = type(kind.__name__, (kind,), {name: _Seen(kind, name) for name in public})
        _classes[kind].__module__ = kind.__module__
    optimizer.__class__ = _classes.get(kind, kind)
    return optimizer


class _Seen:
    """One attribute of a class, which a wrapper has of what it wraps."""

    def __init__(self, kind: type, name: str):
        self.kind, self.name = kind, name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return getattr(self.kind, self.name)
        wrapped = vars(instance).get("_optimizer")
        if wrapped is not None:
            return getattr(wrapped, self.name)
        return getattr(super(_classes[self.kind], instance), self.name)
