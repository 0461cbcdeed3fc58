"""The gate's table, kept as a file: the next run is compared with it, so that a change shows as a diff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

Row = list[str]

KEPT = Path(__file__).resolve().parents[2] / "bench" / "results" / "gate.txt"  # there in a source checkout
KEY = ("rule", "schedule", "pass", "message", "gradient", "d")
HEADER = (*KEY, "B/param", "loads", "stores")  # and the registers of each architecture
LINE = "{:20}{:9}{:8}{:8}{:9}{:>2}{:>8} {:>15}{:>12}"


def show(row: Sequence[str]) -> str:
    return LINE.format(*row[: len(HEADER)]) + "".join(f"{r:>8}" for r in row[len(HEADER) :])


def read(architectures: Sequence[str]) -> tuple[str, dict[tuple[str, ...], Row]]:
    """The version of Triton that made the kept table, and its rows, with the registers of these architectures."""
    if not KEPT.exists():
        return "", {}
    version, header, *lines = KEPT.read_text().splitlines()
    rows = {}
    for line in lines:
        fields = dict(zip(header.split(), line.split(), strict=True))
        row = [fields.get(column, "-") for column in (*HEADER, *architectures)]
        rows[tuple(row[: len(KEY)])] = row
    return version.removeprefix("triton "), rows


def write(rows: Iterable[Row], architectures: Sequence[str], version: str) -> None:
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text("\n".join((f"triton {version}", show((*HEADER, *architectures)), *map(show, rows))) + "\n")


def compare(rows: Iterable[Row], architectures: Sequence[str], version: str, complete: bool) -> tuple[Row, Row]:
    """Lines of difference from the kept table: those that fail, and those that another version of Triton explains.

    Registers are ptxas's choice: they are held to the kept number only under the version that gave it.
    """
    kept_version, kept = read(architectures)
    if not kept:
        return [], []
    hard: Row = []
    soft: Row = []
    for row in rows:
        old = kept.pop(tuple(row[: len(KEY)]), None)
        if old is None:
            hard.append(f"+ {show(row)}")
        elif old != row:
            only_registers = old[: len(HEADER)] == row[: len(HEADER)]
            into = soft if only_registers and version != kept_version else hard
            into += [f"- {show(old)}", f"+ {show(row)}"]
    if complete:
        hard += [f"- {show(old)}" for old in kept.values()]
    return hard, soft
