"""The performance gate: every pass compiled for GPUs that need not be there, and its machine code held to the floor.

For each rule, degree and type: bytes moved per parameter equal the floor traced from the rule's equations; every
access is 128 bits wide (64 for bfloat16); no spills, no shared memory, no barriers, no loop, no atomics, no FMA (so
that the own message is rounded alike wherever it is computed); registers under a ceiling. What it cannot see is time.

    fused-dlam gate                     every built-in rule, four architectures
    fused-dlam gate --quick             a subset, for each commit
    fused-dlam gate my_rule.py:my_rule  a rule of your own

The table is kept in bench/results/gate.txt and the next run is compared with it: a change shows as a diff.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import rules
from .rule import Rule

KEPT = Path(__file__).resolve().parent.parent / "bench" / "results" / "gate.txt"  # there in a source checkout
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DEGREES = (1, 2, 3, 6)
TYPES = [(m, g) for m in ("fp32", "bf16") for g in ("fp32", "bf16")]
HEADER = ("rule", "schedule", "pass", "message", "gradient", "d", "B/param", "loads", "stores")
LINE = "{:14}{:9}{:8}{:8}{:9}{:>2}{:>8} {:>15}{:>12}"


def cases(rule: Rule, degrees, types) -> Iterator:
    """Every pass of a rule, under both schedules where it has both. Float32 messages that are x itself are not packed,
    nor emitted: x is sent as it lies."""
    from .gate_build import Case

    if rule.average == "gradient":  # the optimizer averages the gradient itself: it runs these with no neighbors too
        degrees = (0, *degrees)
    for m, g in types:
        yield Case(rule, "atc", "pack", m, g, 0)
        for d in degrees:
            yield Case(rule, "atc", "combine", m, g, d)
    try:
        awc = rule.adapt_while_communicating()
    except ValueError:
        return
    for m, g in types:
        for d in degrees:
            if awc is not rule:
                yield Case(awc, "awc", "combine", m, g, d)
            if m != "fp32":
                yield Case(awc, "awc", "emit", m, g, d)


def measure(case, architectures) -> tuple[list[str], list[str]]:
    """A case's row of the table, and what is wrong with it."""
    from .gate_build import build, judge

    verdicts = [judge(case, a, build(case, a)) for a in architectures]
    measured = [
        "/".join(sorted(set(column)))  # one entry where all architectures agree
        for column in ((f"{v.bytes:g}" for v in verdicts), (v.loads for v in verdicts), (v.stores for v in verdicts))
    ]
    row = [*case.key, *measured, *(str(v.code.registers) for v in verdicts)]
    return row, [f"{a}: {failure}" for a, v in zip(architectures, verdicts, strict=True) for failure in v.failures]


def show(row) -> str:
    return LINE.format(*row[: len(HEADER)]) + "".join(f"{r:>8}" for r in row[len(HEADER) :])


def compare(rows, architectures, triton_version: str, complete: bool) -> tuple[list[str], list[str]]:
    """Differences from the kept table: those that fail, and those that another version of Triton explains.

    Registers are ptxas's choice: they are held to the kept number only under the version that gave it.
    """
    if not KEPT.exists():
        return [], []
    kept_version, kept_header, *lines = KEPT.read_text().splitlines()
    columns = kept_header.split()
    kept = {}
    for line in lines:
        fields = dict(zip(columns, line.split(), strict=True))
        kept[tuple(fields[c] for c in HEADER[:6])] = [fields.get(c, "-") for c in (*HEADER, *architectures)]
    same = kept_version == f"triton {triton_version}"
    hard, soft = [], []
    for row in rows:
        old = kept.pop(tuple(row[:6]), None)
        if old is None:
            hard.append(f"+ {show(row)}")
        elif old != row:
            into = hard if same or old[: len(HEADER)] != row[: len(HEADER)] else soft
            into += [f"- {show(old)}", f"+ {show(row)}"]
    if complete:
        hard += [f"- {show(old)}" for old in kept.values()]
    return hard, soft


def load_rule(text: str) -> Rule:
    """A built-in rule by name, or `module:rule`, or `path/to/file.py:rule`."""
    where, colon, name = text.rpartition(":")
    if not colon:
        return rules.get(text)
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # Triton looks a function's module up there
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(where)
    rule = getattr(module, name)
    if not isinstance(rule, Rule):
        raise TypeError(f"{text} is a {type(rule).__name__}, not a fused_dlam.Rule")
    return rule


def main(argv: list[str] | None = None) -> int:
    """0 if everything is at its floor, 1 if not, 2 if the gate could not run."""
    parser = argparse.ArgumentParser(prog="fused-dlam gate", description=__doc__.split("\n\n")[0])
    parser.add_argument("rule", nargs="?", help="module:rule, file.py:rule or a built-in rule's name; all if left out")
    parser.add_argument("--archs", help=f"of {','.join(ARCHITECTURES)}; all of them, or sm_90 with --quick")
    parser.add_argument("--quick", action="store_true", help="d = 1 and 3, messages and gradients of one type")
    parser.add_argument("--update", action="store_true", help="keep this run's table as bench/results/gate.txt")
    options = parser.parse_args(argv)
    try:
        import triton

        from .triton_passes import _pack_kernel
    except ImportError as error:
        print(f"the gate compiles Triton kernels, and triton cannot be imported: {error}", file=sys.stderr)
        return 2
    if not isinstance(_pack_kernel, triton.JITFunction):
        print("the gate compiles what TRITON_INTERPRET=1 interprets: unset it for this process", file=sys.stderr)
        return 2
    architectures = tuple((options.archs or ("sm_90" if options.quick else ",".join(ARCHITECTURES))).split(","))
    if unknown := set(architectures) - set(ARCHITECTURES):
        parser.error(f"unknown architectures {', '.join(sorted(unknown))}; known: {', '.join(ARCHITECTURES)}")
    complete = options.rule is None and not options.quick and architectures == ARCHITECTURES
    if options.update and not complete:
        parser.error("--update keeps the whole table: leave out the rule, --quick and --archs")
    try:
        chosen = [load_rule(options.rule)] if options.rule else list(rules.ALL.values())
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache  # every build is a fresh one
        return _run(chosen, architectures, triton.__version__, options, complete)


def _run(chosen, architectures, triton_version, options, complete) -> int:
    from .gate_controls import CONTROLS, run

    start, rows, failed = time.perf_counter(), [], 0
    degrees, types = ((1, 3), TYPES[::3]) if options.quick else (DEGREES, TYPES)
    header = show((*HEADER, *architectures))
    print(f"triton {triton_version}; registers of each architecture\n{header}")
    for rule in chosen:
        for case in cases(rule, degrees, types):
            row, failures = measure(case, architectures)
            rows.append(row)
            failed += bool(failures)
            print(show(row), *(f"\n    FAIL {failure}" for failure in failures), flush=True)
    print(f"{len(rows) * len(architectures)} builds, {failed} of {len(rows)} rows fail")

    print("\nnegative controls, each of which must be refused:")
    for control in CONTROLS:
        for a in architectures:
            if control.nvidia_only and not a.startswith("sm_"):
                continue
            failures = run(control, a).failures
            caught = any(f.startswith(control.reason) for f in failures)
            failed += not caught
            verdict = "refused" if caught else "NOT REFUSED"
            print(f"  {control.what:38}{a:8}{verdict:13}{'; '.join(failures)}", flush=True)

    if options.update and not failed:
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        KEPT.write_text("\n".join((f"triton {triton_version}", header, *map(show, rows))) + "\n")
    elif not options.rule:
        hard, soft = compare(rows, architectures, triton_version, complete)
        if hard:
            print("\ndiffers from the kept table (if it is meant to, run `fused-dlam gate --update`):", *hard, sep="\n")
            failed += 1
        if soft:
            print("\nregisters differ from the kept table, made by another Triton:", *soft, sep="\n")
    print(f"\n{'FAIL' if failed else 'ok'}, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
