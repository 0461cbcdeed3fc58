"""Promises about topology/README.md: its table has every graph, with the messages, kind and period that the graph has;
its figures are the library's, and its example prints what it says."""

import contextlib
import io
import math
import re
from pathlib import Path

import pytest

from fused_dlam import consensus_growth, topology

PAGE = (Path(__file__).resolve().parents[2] / "fused_dlam" / "topology" / "README.md").read_text(encoding="utf-8")
SIZES = (5, 8, 12, 16, 64)


def rows(header):
    """{name: cells} of the table that begins with this header."""
    table = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    return {name: row for row in cells for name in re.findall(r"`([a-z0-9-]+)`", row[0])}


TABLE = rows("| topology | each worker hears from |")


def test_the_table_is_complete():
    assert set(TABLE) == set(topology.FAMILY)


@pytest.mark.parametrize("name", topology.FAMILY)
def test_a_row_is_the_graph(name):
    _, _, messages, kind, period, _ = TABLE[name]
    directed = []
    for n in SIZES:
        if "power of two" in TABLE[name][1] and n & (n - 1):
            with pytest.raises(ValueError, match="power of two"):
                topology.get(name, n)
            continue
        top, log = topology.get(name, n), math.ceil(math.log2(n))
        most, exactly = {
            "": (1, True), "1": (1, True), "2": (2, True), "up to 4": (4, False), "1 (worker 0: n − 1)": (n - 1, True),
            "log₂ n": (log, True), "⌈log₂ n⌉": (log, True), "up to 2 ⌈log₂ n⌉ − 1": (2 * log - 1, False),
            "up to M = ⌈log₂ n⌉": (log, False), "up to 2M": (2 * log, False), "k": (1, True),
        }[messages]  # fmt: skip
        assert top.most_messages == most if exactly else top.most_messages <= most, n
        directed.append(not top.is_symmetric)
        if period.startswith("up to"):
            assert top.period <= 2 * math.log2(n) + 2
        elif not period.startswith("see"):
            by_words = {"1": 1, "none": None, "⌈log₂ n⌉": log, "log₂ n": log, "2, or n for odd n": n if n % 2 else 2}
            assert top.period == by_words[period], n
        if "exact in a period" in TABLE[name][1] and not (TABLE[name][1].endswith("2^k") and n & (n - 1)):
            assert top.rho == 0, n
    assert any(directed) == (kind == "directed")


def test_the_figures_are_the_librarys():
    """16 workers, momentum 0.9. Twelve average exactly in 5 steps of base-k."""
    for name, (_, volume, rho, *verdicts) in rows("| | bytes sent per step | rho |").items():
        top = topology.get(name, 16)
        assert (volume, float(rho)) == (f"{top.most_messages} M", round(top.rho, 4)), name
        for method, verdict in zip(("decentlam", "mi-dmsgd"), verdicts, strict=True):
            assert ("stable" if consensus_growth(method, top, 0.9) < 1 else "unstable") == verdict, (name, method)
    assert "12 workers: 5 steps" in PAGE and (topology.base_k(12).period, topology.base_k(12).rho) == (5, 0)


def test_the_example_prints_what_the_page_says():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "print" in block]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    (said,) = re.findall(r"prints `([0-9.]+)`", PAGE)
    assert float(printed.getvalue()) == pytest.approx(float(said), abs=1e-12)


def test_with_two_workers_every_graph_is_symmetric():
    assert all(topology.get(name, 2).is_symmetric for name in topology.FAMILY)
