"""Promises of the command line:

- the demo trains with every method on real processes, says what was sent and draws every method;
- the topology command prints what the library computes, at 65,536 workers too;
- `fused-dlam` alone lists the commands; any other wrong call is one line; both end with exit code 2.
"""

import contextlib
import io
import math
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from fused_dlam import Topology, consensus_growth, rate_limit, rules, topology
from fused_dlam.theory.stability import growth
from fused_dlam.tools.cli import COMMANDS, main
from fused_dlam.tools.describe import load
from fused_dlam.tools.plain import bytes_text, spread, table
from fused_dlam.topology import Circulant


def call(*argv):
    """What the command prints; it must end with exit code 0."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(a) for a in argv]) == 0
    return out.getvalue()


def cells(text, name):
    """The cells of a table's row, which are at least two spaces apart."""
    (line,) = [line for line in text.splitlines() if re.match(re.escape(name) + r"  ", line)]
    return re.split(r"  +", line)[1:]


def assert_png(path):
    """A PNG of sane size that decodes and is not of one color."""
    image = pytest.importorskip("matplotlib.image").imread(path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert image.shape[:2] == (height, width) and 400 <= height <= 2000 and 400 <= width <= 3000
    assert image[..., :3].std() > 0.01


# -- the demo ----------------------------------------------------------------------------------------------------------

METHODS = ["all-reduce momentum SGD", "DmSGD, one-peer", "MI-DmSGD, one-peer", "DecentLaM, symmetric"]
WORKERS = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("demo") / "out.png"
    return call("demo", "--workers", WORKERS, "--steps", 6, "--seeds", 2, "--out", path), path


def test_demo_has_a_row_for_every_method_and_a_picture(demo):
    text, path = demo
    for name in METHODS:
        *accuracies, distance, _, _, seconds = cells(text, name)
        assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", a) and float(a.split()[0]) <= 100 for a in accuracies)
        assert math.isfinite(float(distance)) and float(seconds) >= 0
    assert str(path) in text
    assert_png(path)


def test_demo_keeps_workers_equal_only_where_averaging_is_exact(demo):
    distance = {name: float(cells(demo[0], name)[3]) for name in METHODS}
    assert distance[METHODS[0]] < 1e-5 and distance[METHODS[3]] < 1e-5  # three workers: all are neighbors of all
    assert distance[METHODS[1]] > 1e-3 and distance[METHODS[2]] > 1e-3


def test_demo_counts_the_bytes_of_the_training_alone(demo):
    sent = {name: int(cells(demo[0], name)[5].replace(",", "")) for name in METHODS}
    M = sent[METHODS[1]]  # one message to one peer: the parameters, and padding
    parameters = 64 * 64 + 64 + 64 * 10 + 10
    assert 4 * parameters <= M <= 4 * (parameters + 2048)
    all_reduce = 2 * (WORKERS - 1) / WORKERS * M
    assert sent == dict(zip(METHODS, [round(all_reduce), M, M, round(all_reduce)], strict=True))


def test_demo_says_why_decentlam_is_not_on_the_one_peer_graph():
    from fused_dlam.tools.demo import left_out

    assert left_out(3) == ""  # 0.949: it could be
    assert f"{consensus_growth('decentlam', topology.one_peer_exponential(8), 0.9):.3f}-fold" in left_out(8)


def test_demo_with_one_worker_is_one_method(tmp_path):
    pytest.importorskip("sklearn")
    text = call("demo", "--workers", 1, "--steps", 3, "--out", tmp_path / "one.png")
    rows = [cells(text, name)[:6] for name in METHODS]
    assert rows[0][5] == "0" and rows.count(rows[0]) == len(METHODS)
    assert "nobody to average with" in text and "1 processes" not in text
    assert_png(tmp_path / "one.png")


def test_the_demo_table_is_the_statistics_of_its_runs():
    from fused_dlam.tools.demo import Run, differences, summary

    def run(*accuracy, worst=(1.0, 5.0, 3.0)):
        return Run([10, 20, 30], list(accuracy), list(worst), [0.1, 0.4, 0.2], 8.0, 2.0)

    runs = {
        "exact": [run(80.0, 90.0, 92.0), run(91.5, 92.0, 94.0), run(70.0, 96.0, 96.0)],
        "gossip": [run(91.0, 91.0, 91.0), run(90.0, 92.0, 92.0), run(60.0, 94.0, 94.5)],
    }
    text = summary(runs)
    assert cells(text, "exact") == ["94.0 ± 2.0", "3.0 ± 0.0", "3.0 ± 0.0", "2.0e-01", "30", "8", "2.0"]
    assert cells(text, "gossip") == ["92.5 ± 1.8", "3.0 ± 0.0", "3.0 ± 0.0", "2.0e-01", "never", "8", "2.0"]
    assert differences(runs).strip() == "gossip -1.5 ± 0.5"


def test_the_demo_draws_every_method(tmp_path, monkeypatch):
    """One that coincides with all-reduce is a wider line under it; one below the third panel's axis is named there."""
    figure = pytest.importorskip("matplotlib.figure")
    from fused_dlam.tools.demo import LOWEST, Run, draw

    def run(distance):
        return Run([1, 2, 3], [50.0, 80.0, 90.0], [40.0, 70.0, 90.0], [distance] * 3, 8.0, 2.0)

    runs = {name: [run(d)] for name, d in zip(METHODS, (1e-7, 0.5, 0.1, 2e-7), strict=True)}
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    draw(runs, "a title", tmp_path / "out.png")
    first, _, third = drawn[0].axes
    dashed, *_, decentlam = first.get_lines()
    assert decentlam.get_linewidth() > 2 * dashed.get_linewidth() and decentlam.get_zorder() < dashed.get_zorder()
    (note,) = third.texts
    assert third.get_ylim()[0] == LOWEST and METHODS[0] in note.get_text() and METHODS[3] in note.get_text()
    assert METHODS[1] not in note.get_text()


# -- the topology command ----------------------------------------------------------------------------------------------

# One map without gradients each.
D2, HALVES, LAM = {"d2-dmsgd", "led"}, {"exact-diffusion", "nids", "extra", "proxskip"}, {"decentlam", "gasloc"}
GRAPHS = [
    ("one-peer-exponential", 8, 0.9, {*LAM, "noloco", *D2}),
    ("exponential", 16, 0.9, {*LAM, "noloco", *D2, *HALVES}),
    ("symmetric-exponential", 8, 0.9, set()),
    ("one-peer-exponential", 8, 0.5, D2),
    ("torus", 12, 0.95, D2),
    ("base-k", 8, 0.9, {*LAM, *D2}),
]


@pytest.mark.parametrize("name, n, momentum, unstable", GRAPHS)
def test_topology_prints_the_growth_that_the_library_computes(name, n, momentum, unstable):
    text = call("topology", name, "-n", n, "--momentum", momentum)
    graph = topology.get(name, n)
    for method, rule in rules.ALL.items():
        row = cells(text, method)
        if rule.average == "gradient":
            assert row == ["exact", f"{rate_limit(method, graph, momentum):.2f}", f"{2 * (n - 1) / n:.4g} M"]
            continue
        if "adam" in method:
            assert len(row) == 4  # no such limit
        else:
            assert row[3] == f"{rate_limit(method, graph, momentum):.2f}"
            assert (row[3] == "0.00") == (method in unstable)
        growth = consensus_growth(method, graph, momentum)
        assert row[0] == f"{growth:.4f}" and row[2] == ("unstable" if method in unstable else "stable")
        assert (growth >= 1) == (method in unstable) == (row[1] == "never")
        if 0 < growth < 1:
            steps = int(row[1].replace(",", ""))
            assert growth**steps <= 0.1 and (growth ** (steps - 1) > 0.1 or steps == graph.period)
    rate = rules.auto_correction_rate(momentum, graph.rho)
    assert re.search(rf"correction rate +[0-9.]+ for mi-dmsgd, {rate:.4g} for pc-dmsgd:", text)
    assert re.search(rf"period +{graph.period} step", text) and re.search(rf"degree +{graph.degree()}:", text)
    assert re.search(f"symmetric +{'yes' if graph.is_symmetric else 'no'}\n", text)


@pytest.mark.slow
def test_topology_prints_estimates_with_their_error():
    """Of a graph that never repeats."""
    text, graph = call("topology", "ou-equidyn", "-n", 9), topology.ou_equidyn(9)
    assert "none: drawn anew at every step" in text
    assert f"{graph.rho:.4f} ± {graph.contraction.error:.4f}: contraction per step" in text
    for method, verdict in (("pc-dmsgd", "stable"), ("dsgd", "stable"), ("decentlam", "unstable")):
        factor, error = growth(method, graph, 0.9)
        row = cells(text, method)
        assert row[0] == f"{factor:.4f} ± {error:.4f}" and row[2:4] == [verdict, "see rate_limit"], method
    text, graph = call("topology", "random-match", "-n", 4), topology.random_match(4)
    assert (
        f"sooner or later the drawn steps average exactly; contraction per step until then: {graph.slowest_rho:.4f}"
        in text
    )


@pytest.mark.slow
def test_topology_of_65536_workers_forms_no_matrix(monkeypatch):
    def dense(self):
        raise AssertionError("34 GB")

    monkeypatch.setattr(Circulant, "dense", dense)
    for name in ("one-peer-exponential", "full", "ring"):
        text = call("topology", name.replace("-", "_"), "-n", 65536)
        assert "65,536 workers" in text and cells(text, "dmsgd")[2:4] == ["stable", "too large to tell"]
        assert cells(text, "pmsgd")[1] == "3.80"
    assert cells(text, "pc-dmsgd")[2] == "too slow"  # the ring: the optimizer refuses growth 1 - 3e-11


def test_the_load_is_that_of_the_busiest_worker():
    assert load(topology.one_peer_exponential(8)) == (1, 1)
    assert load(topology.star(6)) == (5, 5)
    assert load(topology.full(4)) == (0, 1.5)  # by all-reduce
    assert load(topology.full(2)) == (1, 1)
    hub = np.array([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.5, 0.0, 0.0, 0.5], [0.5, 0.0, 0.5, 0.0]])
    with pytest.warns(UserWarning, match="doubly stochastic"):
        hub[0] = [0.0, 0.5, 0.25, 0.25]  # worker 0 hears from three and sends to three, the others to one or two
        graph = Topology([hub, np.eye(4)])
    assert load(graph) == (1.5, 1.5)


def test_topology_lists_the_family():
    for text in (call("topology"), call("topology", "list")):
        assert all(f"  {name} " in text for name in topology.FAMILY)


@pytest.mark.parametrize(
    "name, n", [("one-peer-exponential", 8), ("grid", 12), ("exponential", 64), ("ou-equidyn", 9), ("full", 1)]
)
def test_topology_draws(name, n, tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    path = tmp_path / "graph.png"
    assert str(path) in call("topology", name, "-n", n, "--plot", path)
    assert_png(path)


def test_one_worker_has_nobody_to_exchange_with():
    text = call("topology", "ring", "-n", 1)
    assert "nobody to exchange with" in text and text.count("\n") == 1


def test_numbers_as_text():
    assert (
        spread([1.0]) == "1.0" and spread([1.0, 3.0], "+") == "+2.0 ± 1.4" and spread([1, 3], digits=2) == "2.00 ± 1.41"
    )
    assert [bytes_text(b) for b in (12, 1_500, 100_000_000)] == ["12 B", "1.5 kB", "100 MB"]


def test_tables_are_aligned():
    assert table(("a", "long\nhead"), [("x", "1"), ("yyy", "22")]).splitlines() == [
        "     long",
        "a    head",
        "---  ----",
        "x       1",
        "yyy    22",
    ]


# -- wrong calls -------------------------------------------------------------------------------------------------------

WRONG = [
    ("topology moebius -n 8", "unknown topology 'moebius'; known: full, ring"),
    ("topology hypercube -n 6", "hypercube needs a power of two, not 6"),
    ("topology ring", "how many workers"),
    ("topology ring -n 0", "at least 1"),
    ("topology ring -n eight", "whole number"),
    ("topology ring -n 8 --momentum 1", "below 1"),
    ("topology grid -n 65536", "up to n = 1,024"),
    ("topology random-match -n 65536", "up to n = 16,384, for it is followed step by step"),
    ("topology ring -n 65 --plot graph.png", "up to 64 workers"),
    ("topology ring -n 8 --plot no/such/folder/graph.png", "no folder"),
    ("demo --workers 0", "at least 1"),
    ("demo --workers 1198", "1197 images"),
    ("demo --lr -1", "positive"),
    ("demo --out no/such/folder/out.png", "no folder"),
    ("demo --out out.txt", "ending in .png"),
    ("train", "invalid choice: 'train'"),
    ("bench", "invalid choice: 'bench'"),
    ("gate nosuch.py:mine", "gate: there is no file nosuch.py"),
]


@pytest.mark.parametrize("line, message", WRONG)
def test_a_wrong_call_is_one_line_and_exit_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(line.split())
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ""
    assert message in err and err.startswith("fused-dlam") and err.count("\n") == 1


def test_without_a_command_they_are_listed(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(re.search(rf"^ +{name} ", err, re.M) for name in COMMANDS)
    assert "argv" not in err and "module" not in err  # what they are for, not how they are made


@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib", "tqdm"])
def test_a_missing_package_is_named_with_the_remedy(module, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit:
        main(["demo"])
    assert exit.value.code == 2
    assert re.search(rf"{module} cannot be imported.*pip install 'fused-dlam\[demo\]'", capsys.readouterr().err)


def test_python_m_is_the_command():
    run = [sys.executable, "-m", "fused_dlam"]
    text = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^ +{name} ", text, re.M) for name in COMMANDS)
    run = subprocess.run([*run, "topology", "moebius"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
