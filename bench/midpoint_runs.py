"""What the parts of bench/midpoint.py share: the eight methods, and finished runs kept as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pc_training

from fused_dlam import Topology
from fused_dlam.tools.plain import spread

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = (
    "pmsgd", "dmsgd", "qg-dmsgd", "da-dmsgd", "exact-diffusion", "decentlam", "pc-dmsgd", "mi-dmsgd",
)  # fmt: skip
ONE_PEER_TOO = "exact-diffusion, one-peer"  # on 8 and 16 workers exact diffusion is stable on that graph as well
ONE_PEER = "one-peer-exponential"
GRAPHS = "decentlam, exact-diffusion: symmetric exponential graph; the others: one-peer exponential."
BETA = 0.9


def graph_for(method: str, n: int) -> Topology:
    """One-peer exponential; the two methods for static symmetric graphs take the symmetric exponential one."""
    return pc_training.graph_for(method, ONE_PEER, n)


def clipping(clip: str | None) -> dict[str, str]:
    """As keyword arguments of `Simulation`."""
    return {} if clip is None else {"clip": clip}


def cell(values: Sequence[float], seeds: int, more: str = "") -> str:
    """Mean ± standard deviation; how many values there are, if fewer than seeds; empty if there are none."""
    fewer = f" [{len(values)}]" if len(values) < seeds else ""
    return f"{spread(values)}{more}{fewer}" if values else ""


class Runs:
    """Finished runs in a file, one JSON object per line: a job's settings and what came out.

    A job is a dict of settings. The results are appended as soon as they are there, so an interrupted program goes on
    where it was. Half a line, of a program that was killed while it wrote, is dropped.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path.exists():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole)
            self.records = [json.loads(line) for line in whole.splitlines()]

    def find(self, **settings: Any) -> list[dict[str, Any]]:
        return [r for r in self.records if all(r.get(k, "missing") == v for k, v in settings.items())]

    def make(self, jobs: Iterable[dict[str, Any]], run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Runs the jobs that are not in the file yet, in order."""
        keys = list(jobs)
        done = {json.dumps({k: r[k] for k in job}, sort_keys=True) for job in keys for r in self.find(**job)}
        left = [job for job in keys if json.dumps(job, sort_keys=True) not in done]
        print(f"{len(keys) - len(left)} of {len(keys)} runs are there", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        for number, job in enumerate(left, 1):
            begun = time.perf_counter()
            found = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in run(job).items()}
            record = {**job, **found, "seconds": round(time.perf_counter() - begun, 2)}
            self.records.append(record)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if number % 20 == 0 or number == len(left):
                print(
                    f"{number} of {len(left)} after {time.monotonic() - start:.0f} s: {json.dumps(record)}", flush=True
                )
