"""Everything that only a GPU can tell about this package, in under eight minutes, from a bare checkout.

    python bench/gpu.py                              # bench/results/gpu.json, and the same to read in gpu.md
    python bench/gpu.py --only kernels,loopback      # again, these alone (and compile); other results are kept
    python bench/gpu.py --smoke                      # without a GPU: every section once, tiny; nothing is timed

Nothing need be installed but torch and triton: the package is laid out in a scratch folder, which comes before an
installed one. Sections (gpu_sections/) run one after the other in processes of their own, most valuable first: one
that raises, hangs or breaks its CUDA context loses its own results and nobody else's. Each has a limit, and may use
what those before it left, up to twice the limit.

Exit code 1 if a section did not pass; with --gate also if a goal is missed. A section in which nothing can be checked
here does not count as passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_sections import SECTIONS
from gpu_sections.report import markdown, table

HERE = Path(__file__).resolve().parent
UNWANTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET")


def lay_out(site: Path) -> None:
    """A tree in which `fused_dlam`, with its kernels, and `gpu_sections` can be imported. Copies: a checkout may be
    edited while the sections run, and its folder may be read-only."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        HERE.parent / "fused_dlam", site / "fused_dlam", ignore=shutil.ignore_patterns("__pycache__", "kernels")
    )
    shutil.copytree(HERE.parent / "kernels", site / "fused_dlam" / "kernels", ignore=skip)
    shutil.copytree(HERE / "gpu_sections", site / "gpu_sections", ignore=skip)
    for name in ("images.py", "large_batch_training.py"):  # the section `simulation` trains with them
        shutil.copy(HERE / name, site)


def environment(scratch: Path, site: Path, out: Path | None, name: str, smoke: bool) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in UNWANTED}
    paths = [str(site), *filter(None, [env.get("PYTHONPATH")])]
    env |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "GPU_SCRATCH": str(scratch),
        "GPU_OUT": str(out or scratch),
        "GPU_SMOKE": str(int(smoke)),
        # Of this run: what is built here is built from this checkout, and the time to build is seen.
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        # A machine with a GPU may have no network: processes here find each other without one.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # bit-equal matrix products, whatever the stream
        "OMP_NUM_THREADS": "1" if smoke else "4",
    }
    if smoke:
        env["CUDA_VISIBLE_DEVICES"] = ""
        if name in ("compile", "kernels", "bandwidth"):
            env["TRITON_INTERPRET"] = "1"
    return env


class Child:
    """A section's process and all it starts: a process group that is ended as one."""

    def __init__(self, name: str, scratch: Path, site: Path, out: Path | None, smoke: bool):
        self.name, self.path, self.log = name, scratch / f"{name}.json", scratch / f"{name}.log"
        self.site, self.ended = site, False
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpu_sections.child", name, str(self.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=site,
                env=environment(scratch, site, out, name, smoke),
                start_new_session=True,
            )

    def run(self, limit: float) -> dict[str, Any]:
        """Lets it run, and returns what it recorded and how it ended."""
        start, late = time.perf_counter(), False
        with contextlib.suppress(BrokenPipeError):  # it is gone already, and its record says why
            assert self.process.stdin is not None
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
            self.process.send_signal(signal.SIGUSR1)  # where is it? faulthandler writes it into the log
            time.sleep(1.0)
        self.end()
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        found["seconds"] = round(time.perf_counter() - start, 1)
        code = self.process.returncode
        if late:
            found["error"] = f"killed after {limit:.0f} s"
        elif code < 0:
            found["error"] = f"died by {signal.Signals(-code).name}"
        elif code > 1 and "error" not in found:
            found["error"] = f"ended with exit code {code}"
        if "error" in found and "trace" not in found:
            found["trace"] = self.log.read_text(errors="replace").replace(f"{self.site}{os.sep}", "")[-4000:]
        found["outcome"] = outcome(found)
        return found

    def end(self) -> None:
        """Once: the number of a process group that is gone may be somebody else's by now."""
        if self.ended:
            return
        self.ended = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def outcome(found: dict[str, Any]) -> str:
    if "error" in found:
        return "broken"
    if any(not c["holds"] for c in found.get("checks", ())):
        return "failed"
    if "absent" in found:
        return "not here"
    return "passed" if found.get("checks") else "ran"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="sections, separated by commas: " + ",".join(SECTIONS))
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md (bench/results; with --smoke, none)")
    parser.add_argument("--budget", type=float, default=470.0, help="seconds for everything (%(default)s)")
    parser.add_argument("--limit", type=float, help="no section takes longer than these seconds")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny: does every section run?")
    parser.add_argument("--gate", action="store_true", help="a missed goal is a failure")
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only else list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown sections: {', '.join(unknown)}")
    if not options.smoke:
        names.append("compile")  # else the others would build kernels one by one, and run out of time
    names = [name for name in SECTIONS if name in names]  # in the order of their value
    out = options.out or (None if options.smoke else HERE / "results")
    if out is not None:
        out = out.resolve()
        out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the sections' processes are ended
    with tempfile.TemporaryDirectory(prefix="fused_dlam_gpu_", ignore_cleanup_errors=True) as scratch:
        return measure(names, out, Path(scratch).resolve(), options)


def measure(names: list[str], out: Path | None, scratch: Path, options: argparse.Namespace) -> int:
    start = time.perf_counter()
    lay_out(scratch / "site")
    record = previous(out)
    children: dict[str, Child] = {}
    # On a small machine two at a time: those that wait would take the time of the one that runs.
    ahead = len(names) if (os.cpu_count() or 1) >= 8 else 2
    this: dict[str, dict[str, Any]] = {}
    try:
        for i, name in enumerate(names):
            for following in names[i : i + ahead]:
                if following not in children:
                    children[following] = Child(following, scratch, scratch / "site", out, options.smoke)
            limit, rest = SECTIONS[name].limit, sum(SECTIONS[n].limit for n in names[i + 1 :])
            left = options.budget - (time.perf_counter() - start)
            allowed = min(max(limit, left - rest), 2 * limit, left, options.limit or left)
            if allowed < 3:
                this[name] = {"outcome": "broken", "error": "no time left", "seconds": 0.0}
            else:
                print(f"{name}: {SECTIONS[name].what} ({allowed:.0f} s at most)", flush=True)
                this[name] = children[name].run(allowed)
                print(f"{name}: {this[name]['outcome']} after {this[name]['seconds']} s", flush=True)
            record["machine"] |= this[name].get("machine", {})
            record["sections"][name] = {**this[name], "smoke": options.smoke}
            store(record, out)
    finally:
        for child in children.values():
            child.end()
    print(table(record, names))
    print(f"{time.perf_counter() - start:.0f} s in all" + (f", results in {out}" if out else ""))
    # What cannot be checked here is no failure, and the table says that it was not.
    bad = [n for n in names if this[n]["outcome"] not in ("passed", "ran", "not here")]
    missed = [g for n in names for g in this[n].get("goals", ()) if not g["holds"]]
    return 1 if bad or (options.gate and missed) else 0


def previous(out: Path | None) -> dict[str, Any]:
    """What an earlier run found, for the sections that do not run now."""
    record: dict[str, Any] = {"machine": {}, "sections": {}}
    path = None if out is None else out / "gpu.json"
    if path is not None and path.exists():
        with contextlib.suppress(ValueError):
            kept = json.loads(path.read_text())
            if isinstance(kept.get("sections"), dict):
                record["sections"] = kept["sections"]
    return record


def store(record: dict[str, Any], out: Path | None) -> None:
    if out is None:
        return
    ordered = {name: record["sections"][name] for name in SECTIONS if name in record["sections"]}
    record["sections"] = ordered
    for name, text in (("gpu.json", json.dumps(record, indent=1) + "\n"), ("gpu.md", markdown(record))):
        (out / f".{name}").write_text(text)
        os.replace(out / f".{name}", out / name)


if __name__ == "__main__":
    sys.exit(main())
