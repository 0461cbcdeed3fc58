"""The performance gate: every pass compiled for GPUs that need not be there, and its machine code held to the floor.

For each rule, degree and type: bytes moved per parameter equal the floor traced from the rule's equations; every
access is 128 bits wide (64 for bfloat16); no spills, no shared memory, no barriers, no loop, no atomics, no FMA (so
that the own message is rounded alike wherever it is computed); registers under a ceiling. What it cannot see is time.

    fused-dlam gate                     every built-in rule, four architectures
    fused-dlam gate --quick             a subset, for each commit
    fused-dlam gate my_rule.py:my_rule  a rule of your own
    fused-dlam gate --update            keeps the table as bench/results/gate.txt, for the next run to be compared with
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

from ... import rules
from ...rules.rule import Rule
from . import table
from .table import HEADER, KEY, show

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DEGREES = (1, 2, 3, 6)
TYPES = [(message, gradient) for message in ("fp32", "bf16") for gradient in ("fp32", "bf16")]


def cases(rule: Rule, degrees=DEGREES, types=TYPES) -> Iterator:
    """Every pass of a rule, under both schedules where it has both. Where x itself is the message and of its type, it
    is sent as it lies: neither packed nor emitted."""
    from .build import Case

    if rule.average == "gradient":  # the optimizer averages gradients itself and combines with no neighbors
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
    from .build import build, judge

    verdicts = [judge(case, a, build(case, a)) for a in architectures]
    measured = [
        "/".join(sorted(set(column)))  # one entry where all architectures agree
        for column in ([f"{v.bytes:g}" for v in verdicts], [v.loads for v in verdicts], [v.stores for v in verdicts])
    ]
    row = [*case.key, *measured, *(str(v.code.registers) for v in verdicts)]
    return row, [f"{a}: {failure}" for a, v in zip(architectures, verdicts, strict=True) for failure in v.failures]


def load_rule(text: str) -> Rule:
    """A built-in rule by name, or `module:rule`, or `path/to/file.py:rule`."""
    where, colon, name = text.rpartition(":")
    if not colon:
        return rules.get(text)
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(f"gated_{Path(where).stem}", where)
        assert spec is not None and spec.loader is not None
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
    parser = argparse.ArgumentParser(prog="fused-dlam gate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("rule", nargs="?", help="module:rule, file.py:rule or a built-in rule's name; all if left out")
    parser.add_argument("--archs", help=f"of {','.join(ARCHITECTURES)}; all of them, or sm_90 with --quick")
    parser.add_argument("--quick", action="store_true", help="d = 1 and 3, messages and gradients of one type")
    parser.add_argument("--update", action="store_true", help="keep the table, or one built-in rule's part of it")
    options = parser.parse_args(argv)
    try:
        import triton

        from ..triton_kernels import INTERPRETED
    except ImportError as error:
        print(f"the gate compiles Triton kernels, and triton cannot be imported: {error}", file=sys.stderr)
        return 2
    if INTERPRETED:
        print("the gate compiles what TRITON_INTERPRET=1 interprets: unset it for this process", file=sys.stderr)
        return 2
    architectures = tuple((options.archs or ("sm_90" if options.quick else ",".join(ARCHITECTURES))).split(","))
    if unknown := set(architectures) - set(ARCHITECTURES):
        parser.error(f"unknown architectures {', '.join(sorted(unknown))}; known: {', '.join(ARCHITECTURES)}")
    if options.update and (options.quick or architectures != ARCHITECTURES or ":" in (options.rule or "")):
        parser.error("--update keeps built-in rules in full: leave out --quick and --archs")
    try:
        chosen = [load_rule(options.rule)] if options.rule else list(rules.ALL.values())
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache  # every build is a fresh one
        return _run(chosen, architectures, triton.__version__, options)


def _run(chosen: list[Rule], architectures, version: str, options) -> int:
    start, rows, failed = time.perf_counter(), [], 0
    degrees, types = ((1, 3), TYPES[::3]) if options.quick else (DEGREES, TYPES)
    print(f"triton {version}; under each architecture, registers", show((*HEADER, *architectures)), sep="\n")
    for rule in chosen:
        for case in cases(rule, degrees, types):
            row, failures = measure(case, architectures)
            rows.append(row)
            failed += bool(failures)
            print(show(row), *(f"    FAIL {failure}" for failure in failures), sep="\n", flush=True)
    print(f"{len(rows) * len(architectures)} builds, {failed} of {len(rows)} rows fail")
    failed += _controls(architectures)

    if options.update and not failed:
        kept_version, kept = table.read(architectures)
        if kept_version != version:  # one table, one version: what is not measured anew goes
            kept = {}
        kept.update((tuple(row[: len(KEY)]), row) for row in rows)
        keys = [case.key for rule in rules.ALL.values() for case in cases(rule)]
        table.write([kept[key] for key in keys if key in kept], architectures, version)
    elif all(rule is rules.ALL.get(rule.name) for rule in chosen):
        complete = not (options.rule or options.quick)
        hard, soft = table.compare(rows, architectures, version, complete)
        if hard:
            print("\ndiffers from the kept table (if it is meant to: fused-dlam gate --update):", *hard, sep="\n")
        if soft:
            print("\nregisters differ from those in the table kept from another triton:", *soft, sep="\n")
        failed += bool(hard)
    print(f"\n{'FAIL' if failed else 'ok'}, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


def _controls(architectures) -> int:
    """How many negative controls pass the gate."""
    from .controls import CONTROLS, run

    print("\nnegative controls, each of which must be refused:")
    passed = 0
    for control in CONTROLS:
        for a in architectures:
            if control.nvidia_only and not a.startswith("sm_"):
                continue
            failures = run(control, a).failures
            caught = any(failure.startswith(control.reason) for failure in failures)
            passed += not caught
            verdict = "refused" if caught else "NOT REFUSED"
            print(f"  {control.what:38}{a:8}{verdict:13}{'; '.join(failures)}", flush=True)
    return passed


if __name__ == "__main__":
    sys.exit(main())
