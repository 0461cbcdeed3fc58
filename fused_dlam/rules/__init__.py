"""Every method by name. A method is a `Rule` in one of the files below, and one entry in the list here.

momentum.py has the momentum SGD methods, pc_dmsgd.py and mi_dmsgd.py ours, corrected.py D2, exact diffusion, NIDS,
EXTRA and the tracking methods, pushed.py those for directed graphs, local.py those with local steps, nesterov.py
Nesterov's forms, adaptive.py Adam, outer.py the outer methods GASLoC and NoLoCo. README.md has the table of methods,
and how to write one.
"""

from __future__ import annotations

from .adaptive import adam, adamw
from .corrected import d2_dmsgd, exact_diffusion, extra, gradient_tracking, momentum_tracking, nids
from .hyper import Hyper, did_you_mean
from .local import k_gt, led, proxskip
from .mi_dmsgd import auto_displacement_rate, mi_adamw, mi_dmsgd, nesterov_mi_dmsgd
from .momentum import awc_dmsgd, da_dmsgd, decentlam, dmsgd, dsgd, inverse_lr, pmsgd, psgd, qg_dmsgd
from .nesterov import nesterov_awc_dmsgd, nesterov_dmsgd, nesterov_pc_dmsgd, nesterov_pmsgd, nesterov_qg_dmsgd
from .outer import gasloc, noloco
from .pc_dmsgd import auto_correction_rate, pc_dmsgd
from .pushed import push_diging, push_pull, push_sum
from .rule import Rule

__all__ = ["ALL", "Hyper", "Rule", "auto_correction_rate", "auto_displacement_rate", "get", "inverse_lr"]

ALL = {
    rule.name: rule
    for rule in (
        psgd, pmsgd, dsgd, dmsgd, da_dmsgd, awc_dmsgd, qg_dmsgd, decentlam, pc_dmsgd, mi_dmsgd,
        d2_dmsgd, exact_diffusion, nids, extra, led, proxskip, gradient_tracking, momentum_tracking, k_gt,
        push_sum, push_diging, push_pull,
        nesterov_pmsgd, nesterov_dmsgd, nesterov_awc_dmsgd, nesterov_qg_dmsgd, nesterov_pc_dmsgd,
        nesterov_mi_dmsgd, adam, adamw, mi_adamw, gasloc, noloco,
    )
}  # fmt: skip


def get(method: str | Rule) -> Rule:
    """A rule by name, or the rule itself. Raises ValueError for an unknown name, TypeError for anything else."""
    if isinstance(method, Rule):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method must be a name or a Rule, not {type(method).__name__}")
    if method not in ALL:
        known = f"known: {', '.join(ALL)} (or pass a fused_dlam.Rule)"
        raise ValueError(f"unknown method {method!r}; {known}{did_you_mean(method.replace('_', '-'), ALL)}")
    return ALL[method]
