"""What the commands and benchmarks show figures with on a plain install: aligned tables, means, and colors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

BLACK = "#000000"
#: Okabe and Ito's colors: people with any color vision can tell them apart.
BLUE, SKY, GREEN, ORANGE, RED, PINK, OLIVE = (
    "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#8a8a00",
)  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns of plain text, the first to the left and the others to the right; a header may have two lines."""
    heads = [h.split("\n") for h in header]
    height = max(map(len, heads))
    lines = [list(line) for line in zip(*([""] * (height - len(h)) + h for h in heads), strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, *rows, strict=True)]
    lines += [["-" * w for w in widths], *map(list, rows)]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(align, line, widths, strict=True)).rstrip() for line in lines)


def spread(values: Iterable[float], sign: str = "", digits: int = 1) -> str:
    """Mean ± standard deviation; the mean alone of a single value. sign: "+" shows it of positive means too."""
    values = list(values)
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def bytes_text(size: float) -> str:
    """1,500,000 -> "1.5 MB"."""
    for unit, name in ((1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:g} {name}"
    return f"{size:g} B"
