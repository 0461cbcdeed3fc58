"""What a section found, written to a file as it is found: what a killed section knew is not lost."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class Record:
    """`check` must hold, `goal` should, `row` is data, `line` goes into the table of all sections."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[str] = []
        self.checks: list[dict[str, Any]] = []
        self.goals: list[dict[str, Any]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.more: dict[str, Any] = {}

    def line(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)
        self.save()

    def row(self, table: str, **values: Any) -> None:
        self.tables.setdefault(table, []).append({k: _plain(v) for k, v in values.items()})
        print(f"{table}: " + ", ".join(f"{k} {v}" for k, v in self.tables[table][-1].items()), flush=True)
        self.save()

    def check(self, what: str, holds: bool, detail: object = "") -> bool:
        self.checks.append({"what": what, "holds": bool(holds), "detail": str(detail)[:400]})
        if not holds:
            print(f"FAILS {what}: {detail}", flush=True)
        self.save()
        return bool(holds)

    def goal(self, what: str, value: float | None, least: float) -> None:
        """A figure that should reach `least`; None is no figure: there was nothing to measure."""
        if value is not None and math.isfinite(value):
            self.goals.append({"what": what, "value": round(value, 4), "least": least, "holds": value >= least})
            self.save()

    def absent(self, why: str) -> None:
        """The section cannot run here."""
        self.more["absent"] = why
        self.save()

    def raised(self, error: str, trace: str) -> None:
        self.more.update(error=error, trace=trace)
        self.save()

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [c for c in self.checks if not c["holds"]]

    def save(self) -> None:
        text = {"lines": self.lines, "checks": self.checks, "goals": self.goals, "tables": self.tables, **self.more}
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps(text))
        os.replace(whole, self.path)  # whole or not at all, whenever this process is killed


def _plain(value: Any) -> Any:
    """For JSON and people: five digits of a number, no NaN."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, (int, bool, str, list, type(None))) else str(value)
