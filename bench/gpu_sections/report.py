"""The table of all sections, for a terminal, and everything that was measured, to read."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH, ROOM = 150, 11_500  # columns, and characters in all: for logs that keep the last 12,000
FAULTS = 4  # of a section that are shown; all are in gpu.json


def table(record: dict[str, Any], names: list[str]) -> str:
    """Outcome, figures, faults and goals by section."""
    lines = ["", ", ".join(f"{k} {v}" for k, v in record["machine"].items())]
    for name in names:
        found = record["sections"][name]
        checks = found.get("checks", [])
        held = f"{sum(c['holds'] for c in checks)} of {len(checks)} checks hold" if checks else "nothing checked"
        held = found.get("absent", held)
        lines.append(f"{name:<11}{found['outcome']:<9}{found['seconds']:>6.1f} s  {held}")
        details = [*found.get("lines", ())]
        details += [f"{'holds' if g['holds'] else 'MISSED'}: {_goal(g)}" for g in found.get("goals", ())]
        faults = [f"FAILS: {c['what']} {c['detail']}" for c in checks if not c["holds"]]
        details += faults[:FAULTS] + ([f"and {len(faults) - FAULTS} more"] if len(faults) > FAULTS else [])
        if "error" in found:
            details += [f"ERROR: {found['error']}", *_last(found.get("trace", ""))]
        for text in details:
            lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ")[:3]
    return "\n".join(lines)[-ROOM:]


def _goal(goal: dict[str, Any]) -> str:
    return f"{goal['what']} {goal['value']:.3g}, at least {goal['least']:g}"


def _last(trace: str) -> list[str]:
    """Where it was: the end of a trace, or, where a hang or a signal was caught, what ran then, innermost first."""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    caught = [i for i, line in enumerate(lines) if line.startswith("Current thread")]
    return lines[caught[-1] + 1 :][:4] if caught else lines[-4:]


def markdown(record: dict[str, Any]) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
    lines = ["# What `python bench/gpu.py` found", "", machine, ""]
    for name, found in record["sections"].items():
        lines += [f"## {name}: {found['outcome']}", ""]
        if found.get("smoke"):
            lines += ["(--smoke: on a CPU, nothing timed)", ""]
        checks, goals = found.get("checks", []), found.get("goals", [])
        if "absent" in found:
            lines += [found["absent"], ""]
        if checks:
            lines += [f"{sum(c['holds'] for c in checks)} of {len(checks)} checks hold.", ""]
        lines += [f"- {text}" for text in found.get("lines", ())]
        lines += [f"- {'holds' if g['holds'] else '**missed**'}: {_goal(g)}" for g in goals]
        lines += [f"- **fails**: {c['what']} {c['detail']}" for c in checks if not c["holds"]]
        if "error" in found:
            lines += [f"- **{found['error']}**", "", "```", found.get("trace", "").strip(), "```"]
        lines.append("")
        for title, rows in found.get("tables", {}).items():
            lines += [f"### {title}", "", *_rows(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    body = []
    for row in rows:
        cells = ["" if row.get(c) is None else str(row[c]) for c in columns]
        body.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return head + body
