"""Holds a configuration against the promise in test_fuzz.py: runs its script in several ways, and compares."""

from __future__ import annotations

import time
import traceback
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fuzz_draw import AVERAGE_GRADIENTS, Config
from fuzz_model import TIMEOUT, Tools
from fuzz_script import Script

#: What may be raised, as long as it is raised on all ranks and whatever overlap= says.
REFUSALS = (
    "needs a method with one message",
    "unstable",  # certified configurations that are not
    "never brings its",  # Gossip on a graph that does not mix
    "consensus_state_dict",  # of states with different entries
    "state_dict() averages",
)
SGD = ("pc-dmsgd", "mi-dmsgd", "dmsgd", "decentlam", "pmsgd", "awc-dmsgd", "psgd", "dsgd")


def variants(c: Config) -> list:
    if c.kind == "gossip":
        return [False, "torch"] if c.n == 1 else [False]
    plain = not c.low and not c.layers and not c.clip and c.kind == "sgd" and c.method in SGD
    plain = plain and not any(e.name == "state_replace" for e in c.events)  # torch has no entries before a step
    # Where gradients stay, torch's are clipped and unscaled in place, and this package's are as the script left them.
    closes = any(kind == "closure" for kind, _ in c.backward)
    plain = plain and not ((c.scaler or closes) and c.max_grad_norm) and not (c.scaler and "keep" in c.zero)
    return ["auto", False, True] if c.n > 1 else [False, "auto", *(["torch"] if plain else [])]


def first_difference(a: list, b: list) -> str:
    for (label, xs), (other, ys) in zip(a, b, strict=False):
        if label != other or len(xs) != len(ys):
            return f"{label} ({len(xs)} tensors) against {other} ({len(ys)})"
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if x.dtype != y.dtype or x.shape != y.shape:
                return f"{label} [{k}]: {x.dtype} {tuple(x.shape)} against {y.dtype} {tuple(y.shape)}"
            if not torch.equal(_bits(x), _bits(y)):
                if label.startswith("distance") and float((x - y).abs()) <= 1e-12 * float(y.abs()):
                    continue  # a sum over the buckets, whose order is that of arrival
                off = (x - y).abs().max() if x.numel() else 0
                some = f"{x.flatten()[:4].tolist()} against {y.flatten()[:4].tolist()}"
                return f"{label} [{k}]: off by {float(off):.3g}: {some}"
    return "" if len(a) == len(b) else f"{len(a)} records against {len(b)}"


def _bits(t: torch.Tensor) -> torch.Tensor:
    """What torch.equal compares: one NaN is like another, and zeros are without a sign."""
    flat = torch.view_as_real(t) if t.is_complex() else t
    return torch.nan_to_num(flat, nan=12345.0, posinf=54321.0, neginf=-54321.0)


def near(a: list, b: list) -> str:
    """The parameters alone, up to roundings: for torch's own optimizer."""
    a, b = ([x for x in t if x[0].startswith("parameters")] for t in (a, b))
    for (label, xs), (_, ys) in zip(a, b, strict=False):
        for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if not y.numel():
                continue
            if not float(y.abs().max()) < float("inf"):
                return ""  # torch's own has overflowed, and nothing is to be compared from here on
            off, size = float((x - y).abs().max()), max(1.0, float(y.abs().max()))
            if not off <= (1e-11 if y.dtype == torch.float64 else 1e-5) * size:
                return f"{label} [{k}]: off by {off:.3g} from torch's"
    return "" if len(a) == len(b) else f"{len(a)} steps against torch's {len(b)}"


def check(c: Config, rank: int, tools: Tools) -> tuple[str, list[str]]:
    """("ok", "refused" or "failed", what is wrong), the same on all ranks."""
    wrong: list[str] = []
    runs: dict[Any, Script] = {}
    refused, broken = "", False
    for overlap in variants(c):
        start, error, script = time.monotonic(), "", None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                script = Script(c, rank, overlap, tools)
                script.run()
        except Exception as e:  # noqa: BLE001 -- whatever it is, it is what a user would see
            where = "".join(traceback.format_tb(e.__traceback__)[-3:])
            error = f"{type(e).__name__}: {str(e)[:300]}\n{where}"
        took = time.monotonic() - start
        everywhere: list = [None] * c.n
        dist.all_gather_object(everywhere, error)
        if script is not None:
            for opt in script.opts:
                if hasattr(opt, "close"):
                    opt.close()
        errors = [e for e in everywhere if e]
        if errors:
            allowed = len(errors) == c.n and all(any(w in e for w in REFUSALS) for e in errors)
            refused = refused or (errors[0].splitlines()[0] if allowed else "")
            if not allowed:
                broken = True
                wrong += [f"overlap={overlap!r} rank {r}: {e}" for r, e in enumerate(everywhere) if e and r == rank]
                break
            continue
        if took > TIMEOUT:
            wrong.append(f"overlap={overlap!r} took {took:.0f} s")
        assert script is not None
        runs[overlap] = script
        wrong += [f"overlap={overlap!r}: {text}" for text in script.wrong]
    if refused and runs:
        wrong.append(f"refused with some overlap= only ({refused}), not with {list(runs)}")
    for overlap, script in runs.items():
        if overlap == "torch" or overlap is False or False not in runs:
            continue
        text = first_difference(script.trace, runs[False].trace)
        if text:
            wrong.append(f"overlap={overlap!r} against overlap=False: {text}")
    if "torch" in runs and False in runs:
        text = near(runs[False].trace, runs["torch"].trace)
        if text:
            wrong.append(text)
    if False in runs and equal_workers(c):
        traces: list = [None] * c.n
        mine = [(l, t) for l, t in runs[False].trace if l.startswith("parameters")]
        dist.all_gather_object(traces, mine)
        text = first_difference(traces[0], mine)
        if text:
            wrong.append(f"workers that should be equal are not: {text}")
    everything: list = [None] * c.n
    dist.all_gather_object(everything, (wrong, broken))
    said = [f"rank {r}: {text}" for r, (texts, _) in enumerate(everything) for text in texts]
    if any(b for _, b in everything):
        tools.group = dist.new_group(timeout=timedelta(seconds=TIMEOUT + 15))
    return ("failed" if said else f"refused: {refused}" if refused else "ok"), said


def equal_workers(c: Config) -> bool:
    """Whether all workers should be bit-equal: they do the same, or average gradients and nobody writes alone."""
    if c.same:
        return True
    alone = any(e.rank is not None and not e.name.startswith(("g_", "clip")) for e in c.events)
    return (
        c.kind == "sgd"
        and c.method in AVERAGE_GRADIENTS
        and not alone
        and not c.scaler
        and not (c.max_grad_norm or c.clip)
    )
