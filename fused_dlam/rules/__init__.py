"""Every method by name. Their equations: momentum.py, corrected.py, nesterov.py, adaptive.py."""

from __future__ import annotations

from .adaptive import adam, adamw
from .corrected import d2_dmsgd, exact_diffusion, gradient_tracking, momentum_tracking
from .momentum import (
    auto_correction_rate,
    awc_dmsgd,
    da_dmsgd,
    decentlam,
    dmsgd,
    dsgd,
    inverse_lr,
    pc_dmsgd,
    pmsgd,
    psgd,
    qg_dmsgd,
)
from .nesterov import nesterov_awc_dmsgd, nesterov_dmsgd, nesterov_pc_dmsgd, nesterov_pmsgd, nesterov_qg_dmsgd
from .rule import Rule

__all__ = ["ALL", "NESTEROV", "auto_correction_rate", "get", "inverse_lr"]

ALL = {
    rule.name: rule
    for rule in (
        psgd, pmsgd, dsgd, dmsgd, da_dmsgd, awc_dmsgd, qg_dmsgd, decentlam, pc_dmsgd,
        d2_dmsgd, exact_diffusion, gradient_tracking, momentum_tracking,
        nesterov_pmsgd, nesterov_dmsgd, nesterov_awc_dmsgd, nesterov_qg_dmsgd, nesterov_pc_dmsgd,
        adam, adamw,
    )
}  # fmt: skip

#: What `nesterov=True` makes of a method.
NESTEROV = {name.removeprefix("nesterov-"): rule for name, rule in ALL.items() if name.startswith("nesterov-")}


def get(method: str | Rule) -> Rule:
    """A rule by name, or the rule itself. Raises ValueError for an unknown name, TypeError for anything else."""
    if isinstance(method, Rule):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a Rule, not {type(method).__name__}")
    if method not in ALL:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(ALL)} (or pass a fused_dlam.Rule)")
    return ALL[method]
