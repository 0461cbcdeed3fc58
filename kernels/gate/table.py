"""The gate's table as text, and the file that keeps it in a source checkout, where a change shows as a diff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ... import rules

KEPT = Path(__file__).resolve().parents[2] / "bench" / "results" / "gate.txt"
# Then the registers of each architecture.
HEADER = ("rule", "schedule", "pass", "message", "gradient", "d", "B/param", "loads", "stores")
LINE = "{:20}{:9}{:8}{:8}{:9}{:>2}{:>8} {:>15}{:>12}"


def show(row: Sequence[str]) -> str:
    return LINE.format(*row[: len(HEADER)]) + "".join(f"{r:>8}" for r in row[len(HEADER) :])


def kept() -> list[str]:
    """The lines of the kept table: the version of Triton that made it, the header, a line for each row."""
    return KEPT.read_text().splitlines() if KEPT.exists() else []


def keep(version: str, architectures: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Writes the table. These rows replace those of the same rules, and rows of rules that are gone go too."""
    new = [show(row) for row in rows]
    renewed = {line.split()[0] for line in new}
    lines = new + [line for line in kept()[2:] if line.split()[0] not in renewed]
    body = [line for name in rules.ALL for line in lines if line.split()[0] == name]
    KEPT.write_text("\n".join((f"triton {version}", show((*HEADER, *architectures)), *body)) + "\n")
