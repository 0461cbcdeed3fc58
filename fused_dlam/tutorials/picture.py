"""Axes that the tutorials draw on: without a window, in colors that people with any color vision can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STYLE = "tableau-colorblind10"


def panels(titles: Sequence[str], height: float = 3.6, width: float = 4.6) -> tuple[Any, list[Any]]:
    """A figure with one panel for each title; returns it and the panels' axes. Needs matplotlib."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(STYLE):  # an axes takes its colors when it is made
        figure = Figure(figsize=(width * len(titles), height), dpi=110, layout="constrained")
        axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for each, title in zip(axes, titles, strict=True):
        each.set_title(title)
        each.grid(alpha=0.3)
    return figure, list(axes)
