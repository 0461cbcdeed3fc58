"""`fused-dlam compare`: which method gets how near to the optimum, and how fast, on full-batch linear regression.

Every worker's data have another solution, the case in which momentum and gossip part ways: DmSGD is faster than DSGD
and more biased; DecentLaM is as fast as DmSGD and as accurate as DSGD, on symmetric graphs; MI-DmSGD and PC-DmSGD on
directed and one-peer ones too. Every method of the optimizer can be compared. Adam's start is slow in this picture: it
moves each parameter by at most about the learning rate per step, whatever the gradient is.

With --loss, --participation, --delay and --noise messages are lost or late, workers absent: see theory/schemes.py. The
growth that is printed is then that of `verdict`. All-reduce, the yardstick, is without.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import rules
from .. import topology as topologies
from ..rules.rule import SCHEDULES
from ..theory.regression import Regression
from ..theory.schemes import Schemes
from ..theory.simulator import simulate
from ..theory.verdict import verdict
from ..topology import Topology
from .cli import Parser, count, need, picture
from .plain import BLACK, BLUE, GREEN, OLIVE, ORANGE, PINK, RED, SKY, table

METHODS = ("dsgd", "dmsgd", "decentlam", "pc-dmsgd", "mi-dmsgd")
GRAPHS = ("symmetric-exponential", "one-peer-exponential")
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
YARDSTICK = "pmsgd"  # all-reduce momentum SGD: in every panel
COLORS = (RED, ORANGE, GREEN, BLUE, PINK, SKY, OLIVE)
DASHES = ("-", "-.", ":")  # for the methods after the first seven


class Run(NamedTuple):
    method: str
    graph: str
    growth: str  # of disagreement per step, without gradients
    error: np.ndarray  # after every step, from 1 on; inf from where it overflows

    @property
    def final(self) -> float:
        """The mean over the last steps, for on a time-varying graph the workers go in circles."""
        return float(self.error[-64:].mean())


def run(
    method: str, graph: Topology, problem: Regression, steps: int, lr: float, momentum: float, schedule: str,
    schemes: dict[str, Any],
) -> Run:  # fmt: skip
    exact = rules.get(method).average == "gradient"
    of, schemes = ("auto", {}) if exact else (schedule, schemes)
    with np.errstate(all="ignore"):
        x = simulate(
            method, graph, lambda k, x: problem.grad(x), np.zeros((problem.n, problem.d)), steps, lr, momentum,
            schedule=of, **schemes,
        )  # fmt: skip
        error = problem.error(x)
    bad = ~np.isfinite(error) | (error > 1e6)
    error[np.logical_or.accumulate(bad)] = np.inf
    known = {name: value for name, value in schemes.items() if name != "noise"}
    growth, scatter = verdict(method, graph, momentum, schedule=of, **known)
    return Run(method, graph.name, f"{growth:.3f}" + (f" ± {scatter:.3f}" if scatter else ""), error)


def summary(runs: Sequence[Run]) -> str:
    """One row per run: steps to each target, and where it ends."""
    rows = []
    dsgd = {r.graph: r.final for r in runs if r.method == "dsgd"}
    for r in runs:
        steps = [str(int((r.error < t).argmax())) if (r.error < t).any() else "never" for t in TARGETS]
        base = dsgd.get(r.graph)
        ratio = f"{r.final / base:.3g}" if base and math.isfinite(r.final) and r.method != YARDSTICK else ""
        end = f"{r.final:.1e}" if math.isfinite(r.final) else "diverges"
        rows.append((r.method, r.graph if r.method != YARDSTICK else "all-reduce", r.growth, *steps, end, ratio))
    header = (
        "method", "topology", "growth of\ndisagreement", *(f"steps to\n{t:g}" for t in TARGETS), "error at\nthe end",
        "over DSGD's\non the graph",
    )  # fmt: skip
    return table(header, rows)


def draw(runs: Sequence[Run], title: str, path: Path) -> None:
    """One panel per graph: distance to the optimum over the steps."""
    from matplotlib.figure import Figure

    graphs = list(dict.fromkeys(r.graph for r in runs if r.method != YARDSTICK))
    methods = list(dict.fromkeys(r.method for r in runs if r.method != YARDSTICK))
    figure = Figure(figsize=(max(8.0, 1.5 + 5.2 * len(graphs)), 4.8), layout="constrained")
    figure.suptitle(title)
    lowest = max(1e-12, 0.3 * min(r.error[np.isfinite(r.error)].min() for r in runs))
    handles: dict[str, Any] = {}
    for axes, graph in zip(np.atleast_1d(figure.subplots(1, len(graphs), sharey=True)), graphs, strict=True):
        shown = [r for r in runs if r.method == YARDSTICK or r.graph == graph]
        for r in shown:
            label = "all-reduce momentum SGD" if r.method == YARDSTICK else r.method
            (line,) = axes.plot(np.where(np.isfinite(r.error), r.error, np.nan), **_style(r.method, methods))
            handles.setdefault(label, line)
        lost = [r.method for r in shown if not math.isfinite(r.final)]
        for k, method in enumerate(lost):
            color = _style(method, methods)["color"]
            axes.text(
                0.98, 0.94 - 0.06 * k, f"{method} diverges", transform=axes.transAxes, ha="right", color=color
            )  # fmt: skip
        axes.set(title=graph, xlabel="step", xscale="log", yscale="log")
        axes.set_xlim(left=3)
        axes.set_ylim(lowest, 30)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean squared distance to the optimum, relative")
    columns = min(4 if len(graphs) == 1 else 6, len(handles))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=110)


def _style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    if method == YARDSTICK:
        return {"color": BLACK, "linestyle": "--", "linewidth": 1.4, "zorder": 3}
    k = methods.index(method)
    return {"color": COLORS[k % len(COLORS)], "linestyle": DASHES[k // len(COLORS) % len(DASHES)], "linewidth": 2.0}


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    options, graphs = parse(argv)
    problem = Regression(options.n, spread=options.spread, seed=options.seed)
    print(
        f"Full-batch linear regression, {options.n} worker{'s' * (options.n > 1)}, d = {problem.d}, gradients of the"
        f" workers at the optimum: b^2 = {problem.heterogeneity:.3g}.\n"
        f"Momentum {options.momentum:g}, learning rate {options.lr:g}, {options.steps} steps, {options.schedule}."
        f"{said(options)}\n"
    )
    settings = (options.steps, options.lr, options.momentum, options.schedule, schemes_of(options))
    runs = [run(YARDSTICK, graphs[0], problem, *settings)]
    runs += [run(m, graph, problem, *settings) for graph in graphs for m in options.methods if m != YARDSTICK]
    print(summary(runs))
    title = f"{options.n} workers, momentum {options.momentum:g}, learning rate {options.lr:g}"
    draw(runs, f"Linear regression with heterogeneous data: {title}", options.out)
    print(f"\nPicture: {options.out.resolve()}")
    return 0


def schemes_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("loss", "loss_of", "participation", "delay", "noise", "seed")}


def said(options: argparse.Namespace) -> str:
    """A line of the schemes in words; nothing if there are none."""
    parts = [
        f"{100 * options.loss:.4g} % of the {options.loss_of} lost" if options.loss else "",
        f"{100 - 100 * options.participation:.4g} % of the workers absent" if options.participation < 1 else "",
        f"messages {options.delay} step{'s' * (options.delay > 1)} late" if options.delay else "",
        f"noise {options.noise:g} on messages" if options.noise else "",
    ]
    parts = [part for part in parts if part]
    return f"\nGossip, not all-reduce, has {', '.join(parts)}." if parts else ""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Topology]]:
    """The options, all checked, and the graphs."""
    parser = Parser(
        "fused-dlam compare", description=__doc__.split("\n\n")[0].split(": ", 1)[1],
        epilog=f"methods: {', '.join(rules.ALL)}",
    )  # fmt: skip
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"one or more methods ({' '.join(METHODS)})")
    parser.add_argument("--topology", nargs="+", metavar="NAME", help=f"one or more graphs ({' '.join(GRAPHS)})")
    parser.add_argument("-n", type=count, default=8, help="workers (8)")
    parser.add_argument("--steps", type=count, default=8000, help="steps of each method (8000)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate, constant (2e-3)")
    parser.add_argument("--momentum", type=float, default=0.9, help="beta (0.9)")
    parser.add_argument("--schedule", choices=("auto", *SCHEDULES), default="auto", help="each method's own (auto)")
    parser.add_argument("--spread", type=float, default=1.0, help="how far apart the workers' solutions are (1)")
    parser.add_argument("--loss", type=float, default=0.0, help="share of messages that are lost (0)")
    parser.add_argument("--loss-of", choices=("messages", "pairs"), default="messages", help="lost together (messages)")
    parser.add_argument(
        "--participation", type=float, default=1.0, help="share of workers that take part in a step (1)"
    )
    parser.add_argument("--delay", type=int, default=0, help="steps that all messages are late (0)")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the noise of messages (0)")
    parser.add_argument("--seed", type=int, default=3, help="of the data and of all chances (3)")
    parser.add_argument("--out", type=picture, default="fused-dlam-compare.png", help="the picture's file")
    options = parser.parse_args(argv)
    need(parser, "matplotlib")
    if not 0 < options.lr < math.inf:
        parser.error(f"--lr must be a positive number, not {options.lr:g}")
    if not 0 <= options.momentum < 1:
        parser.error(f"--momentum must be from 0 to below 1, not {options.momentum:g}")
    options.methods = options.methods or list(METHODS)
    unknown = [m for m in options.methods if m not in rules.ALL]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; known: {', '.join(rules.ALL)}")
    try:
        Schemes(options.n, **schemes_of(options))
        for rule in map(rules.get, options.methods):
            if rule.average == "neighbors":
                rule.under(options.schedule)
        names = options.topology or GRAPHS
        return options, [topologies.get(name.replace("_", "-"), options.n) for name in names]
    except ValueError as error:
        parser.error(str(error))
