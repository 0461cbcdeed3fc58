"""Latency and rate fitted to what bench/exchange.py measured, and to published figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from costs import COSTS, MEASURED, MODELS, NVLINK, PUBLISHED, PUBLISHED_WORKERS, Cost, Link, Network, predict


def least_squares(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> np.ndarray:
    """Coefficients c >= 0 for which terms @ c is near the seconds, in relative error."""
    X = np.asarray(terms, dtype=float) / np.asarray(seconds, dtype=float)[:, None]
    scale = np.linalg.norm(X, axis=0)
    kept = scale > 0
    while True:
        c = np.zeros(X.shape[1])
        c[kept] = np.linalg.lstsq(X[:, kept] / scale[kept], np.ones(len(X)), rcond=None)[0] / scale[kept]
        if (c >= 0).all():
            return c
        kept &= c >= 0


def fit(costs: Sequence[Cost], seconds: Sequence[float]) -> Link:
    a, b = least_squares(costs, seconds)
    return Link(float(a), float(1 / b) if b else math.inf)


def fit_measured(result: dict[str, Any]) -> dict[str, Any]:
    """One link for everything that bench/exchange.py measured, one for each operation alone, and the residuals."""
    n, g = result["workers"], result["per_host"]
    rows = [row for row in result["rows"] if row["operation"] in MEASURED]
    costs = [COSTS[MEASURED[row["operation"]]](n, row["size"], g) for row in rows]
    seconds = [row["seconds"] for row in rows]
    link, alone = fit(costs, seconds), {}
    for name in MEASURED:
        mine = [i for i, row in enumerate(rows) if row["operation"] == name]
        alone[name] = fit([costs[i] for i in mine], [seconds[i] for i in mine])
    residuals = [
        {"operation": row["operation"], "size": row["size"], "seconds": s, "model": link.seconds(c),
         "residual": link.seconds(c) / s - 1, "residual_alone": alone[row["operation"]].seconds(c) / s - 1}
        for row, c, s in zip(rows, costs, seconds, strict=True)
    ]  # fmt: skip
    return {"workers": n, "per_host": g, "link": link, "alone": alone, "residuals": residuals}


def fit_published() -> dict[str, Any]:
    """The published figures by the ring's two alone (a and b), the other two alone, and all four (a, b, a constant)."""
    n = PUBLISHED_WORKERS
    rings, partials = ([COSTS[name](n, M, 1) for M in MODELS.values()] for name in ("ring all-reduce", "one-peer"))
    seconds = np.array([PUBLISHED[name] for name in MODELS])
    ring, partial = fit(rings, seconds[:, 0].tolist()), fit(partials, seconds[:, 1].tolist())
    terms = [(*cost, 0) for cost in rings] + [(*cost, 1) for cost in partials]
    a, b, constant = map(float, least_squares(terms, seconds.T.ravel().tolist()))
    together = Network("fitted to the published figures", Link(a, 1 / b), NVLINK, 1, constant)
    out: dict[str, Any] = {"ring": ring, "partial": partial, "together": together, "models": {}}
    for (name, M), r, p in zip(MODELS.items(), rings, partials, strict=True):
        both = predict(together, n, M)
        out["models"][name] = {
            "published": PUBLISHED[name],
            "from the ring": (ring.seconds(r), ring.seconds(p)),
            "from all four": (both["ring all-reduce"], both["one-peer"]),
            "8 behind a card": ring.seconds(COSTS["one-peer"](n, M, 8)),
        }
    return out
