"""Promises of fused_dlam/rules/README.md: its tables say what the methods are and do, to the digits that they print."""

import math
import re
from pathlib import Path

import pytest

from fused_dlam import consensus_growth, rules, topology
from fused_dlam.theory.regression import Regression, limiting_bias

README = (Path(__file__).resolve().parents[2] / "fused_dlam" / "rules" / "README.md").read_text()


def table(header):
    """The rows of the table that begins with this header, the header included, as lists of cells."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip().strip("`*") for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def names(cell):
    return re.findall(r"[a-z0-9]+(?:[-_][a-z0-9]+)*", cell)


def test_every_method_with_its_messages_state_and_schedules():
    rows = {row[0]: row for row in table("| method | sends |")[1:]}
    assert set(rows) == set(rules.ALL)
    for name, (_, sends, _, messages, state, schedules, _) in rows.items():
        rule = rules.ALL[name]
        assert messages == ("" if rule.average == "gradient" else str(rule.messages)), name
        assert state == str(len(rule.state)), name
        try:
            awc = rule.under("awc")
        except ValueError:
            assert schedules == "atc", name
        else:
            own = {"midpoint": "midpoint, atc, awc", "atc": "atc, midpoint, awc", "awc": "awc"}[rule.schedule]
            assert schedules == own, name
            assert (sends == "x") == (awc is rule), name


def test_every_hyper_parameter_with_its_methods_and_default():
    rows = [(names(row[0])[0], *row[1:]) for row in table("| hyper-parameter |")[1:]]
    told = [(name, method) for name, methods, *_ in rows for method in names(methods)]
    assert sorted(told) == sorted((name, rule.name) for rule in rules.ALL.values() for name in rule.hyper)
    for name, methods, default, bounds in rows:
        for rule in map(rules.get, names(methods)):
            hyper = rule.hyper[name]
            assert default.startswith('"auto"') if callable(hyper.default) else float(default) == hyper.default
            assert bounds.count("<") + bounds.count("≤") + bounds.count("≥") == sum(
                bound is not None for bound in (hyper.at_least, hyper.above, hyper.at_most, hyper.below)
            )


def test_where_methods_are_stable():
    header, *rows = table("| graph, workers |")
    for row in rows:
        name, n = row[0].replace("`", "").split(" ")
        for cell, figure in zip(header[1:], row[1:], strict=True):
            for method in names(cell):
                assert f"{consensus_growth(method, topology.get(name, int(n))):.4f}" == figure, (row[0], method)
        for method in set(rules.ALL) - {method for cell in header[1:] for method in names(cell)}:
            assert consensus_growth(method, topology.get(name, int(n))) < 1 - 1e-9, (row[0], method)


def test_where_methods_with_local_steps_are_stable():
    header, *rows = table("| graph, workers | `d2-dmsgd` | `led` |")
    for row in rows:
        name, n = row[0].replace("`", "").split(" ")
        for cell, figure in zip(header[1:], row[1:], strict=True):
            for method in names(cell):
                hyper = {"probability": 0.25} if method == "proxskip" else {}
                growth = consensus_growth(method, topology.get(name, int(n)).every(4), **hyper)
                assert f"{growth:.4f}" == figure, (row[0], method)


def test_where_outer_methods_are_stable():
    """To the three digits of the table; bold is what the optimizer refuses. And the bound on random pairs."""
    header, *rows = table("| outer method, momentum |")
    lines = README[README.index("| outer method, momentum |") :].splitlines()[2:]
    for (cell, setting, *figures), line in zip(rows, lines, strict=False):
        method, momentum = cell.replace("`", "").split(", ")
        key, _, value = setting.partition("=")
        options = {key: value.strip('"') if '"' in value else float(value)} if key else {}
        for graph, figure in zip(header[2:], figures, strict=True):
            growth = consensus_growth(method, topology.get(graph, 8), float(momentum), **options)
            assert f"{growth:.3f}" == figure and (f"**{figure}**" in line) == (growth >= 1), (cell, setting, graph)
    for beta, n, limit in ((0.5, 8, "1.62"), (0.9, 8, "0.44"), (0.9, 10**6, "0.38")):
        assert f"{2 * (1 - beta**2) / (1 - beta / (n - 1)):.2f}" == limit and limit in README


def test_what_bias_is_left():
    problem = Regression(8)
    header, *rows = table("| | `dmsgd` |")
    for name, *figures in rows:
        graph = topology.get(name, 8)
        unit = limiting_bias("dsgd", graph, problem, lr=2e-3)
        for method, figure in zip(header[1:-1], figures[:-1], strict=True):
            ours = limiting_bias(method, graph, problem, lr=2e-3) / unit
            if figure in ("0", "diverges"):
                assert ours < 1e-14 if figure == "0" else ours == math.inf, (name, method)
            else:
                assert ours == pytest.approx(float(figure), rel=5e-3), (name, method)
        for method in ("gradient-tracking", "momentum-tracking", "psgd", "pmsgd"):
            assert figures[-1] == "0" and limiting_bias(method, graph, problem, lr=2e-3) / unit < 1e-14, method


def test_the_example_is_the_rule_of_the_tests():
    text = (Path(__file__).parent / "my_rule.py").read_text()
    assert text[text.index("from fused_dlam") :] == README.split("```python\n")[1].split("```")[0]
