"""The performance gate: every pass compiled for GPUs that need not be there, and its machine code held to the floor.

For each rule, degree and type, the bytes moved per parameter equal the floor traced from the rule's equations. Every
access is 128 bits wide (64 for bfloat16). There are no spills, no shared memory, no barriers, no loop, no atomics and
no FMA (which would round the own message differently in pack and combine). Registers stay under a ceiling. What the
gate cannot see is time.

    fused-dlam gate                     every built-in rule, four architectures
    fused-dlam gate --quick             a subset, for each commit
    fused-dlam gate my_rule.py:my_rule  a rule of your own
    fused-dlam gate --update            in a checkout: writes the table to bench/results/gate.txt, for `git diff`
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ... import rules
from ...rules.rule import Rule
from . import table
from .cases import ARCHITECTURES, DEGREES, TYPES, Case, cases
from .table import HEADER, show


def measure(case: Case, architectures: Sequence[str]) -> tuple[list[str], list[str]]:
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
    parser.add_argument("--update", action="store_true", help="write bench/results/gate.txt, or a built-in rule's part")
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
    if options.update:
        if options.quick or architectures != ARCHITECTURES or ":" in (options.rule or ""):
            parser.error("--update keeps built-in rules in full: leave out --quick and --archs")
        if not table.KEPT.exists():
            parser.error(f"--update is for a source checkout: there is no {table.KEPT}")
        if options.rule and table.kept()[0] != f"triton {triton.__version__}":
            parser.error(f"the kept table is from {table.kept()[0]}, this is {triton.__version__}: update all of it")
    try:
        chosen = [load_rule(options.rule)] if options.rule else list(rules.ALL.values())
    except (ImportError, OSError, AttributeError, TypeError, ValueError) as error:
        parser.error(str(error))
    degrees, types = ((1, 3), TYPES[::3]) if options.quick else (DEGREES, TYPES)
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache  # every build is a fresh one
        print(f"triton {triton.__version__}; under each architecture, registers")
        rows, failed = _run([case for rule in chosen for case in cases(rule, degrees, types)], architectures)
    if options.update and not failed:
        table.keep(triton.__version__, architectures, rows)
    return 1 if failed else 0


def _run(chosen: list[Case], architectures: Sequence[str]) -> tuple[list[list[str]], int]:
    """Prints the table as it grows; the rows, and how many of them fail."""
    start, rows, failed = time.perf_counter(), [], 0
    print(show((*HEADER, *architectures)))
    for case in chosen:
        row, failures = measure(case, architectures)
        rows.append(row)
        failed += bool(failures)
        print(show(row), *(f"    FAIL {failure}" for failure in failures), sep="\n", flush=True)
    print(f"{len(rows) * len(architectures)} builds, {failed} of {len(rows)} rows fail")
    print(f"\n{'FAIL' if failed else 'ok'}, {time.perf_counter() - start:.0f} s")
    return rows, failed
