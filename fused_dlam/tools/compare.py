"""`fused-dlam compare`: which method gets how near to the optimum, and how fast, on full-batch linear regression.

Every worker's data have another solution, the case in which momentum and gossip part ways: DmSGD is faster than DSGD
and more biased; DecentLaM is as fast as DmSGD and as accurate as DSGD, on symmetric graphs; PC-DmSGD on directed and
one-peer ones too. `--sweep` measures how the bias grows with the learning rate, the momentum and the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import rules
from .. import topology as topologies
from ..theory.regression import Regression, limiting_bias
from ..theory.simulator import simulate
from ..theory.stability import consensus_growth
from ..topology.topology import Topology
from .cli import Parser, count, need, picture
from .describe import table

METHODS = ("dsgd", "dmsgd", "decentlam", "pc-dmsgd")
GRAPHS = ("symmetric-exponential", "one-peer-exponential")
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
YARDSTICK = "pmsgd"  # all-reduce momentum SGD: in every panel
# Distinguishable with any color vision (Okabe and Ito), then by dashes.
COLORS = ("#d55e00", "#e69f00", "#009e73", "#0072b2", "#cc79a7", "#56b4e9", "#8a8a00")


class Run(NamedTuple):
    method: str
    graph: str
    growth: float  # of disagreement per step, without gradients
    error: np.ndarray  # after every step, from 1 on; inf from where it overflows

    @property
    def final(self) -> float:
        """The mean over the last steps, for on a time-varying graph the workers go in circles."""
        return float(self.error[-64:].mean())


def run(
    method: str, graph: Topology, problem: Regression, steps: int, lr: float, momentum: float, schedule: str
) -> Run:
    with np.errstate(all="ignore"):
        x = simulate(
            method, graph, lambda k, x: problem.grad(x), np.zeros((problem.n, problem.d)), steps, lr, momentum,
            schedule="atc" if rules.get(method).average == "gradient" else schedule,
        )  # fmt: skip
        error = problem.error(x)
    bad = ~np.isfinite(error) | (error > 1e6)
    error[np.logical_or.accumulate(bad)] = np.inf
    return Run(method, graph.name, consensus_growth(method, graph, momentum), error)


def summary(runs: Sequence[Run]) -> str:
    """One row per run: steps to each target, and where it ends."""
    rows = []
    dsgd = {r.graph: r.final for r in runs if r.method == "dsgd"}
    for r in runs:
        steps = [str(int((r.error < t).argmax())) if (r.error < t).any() else "never" for t in TARGETS]
        base = dsgd.get(r.graph)
        ratio = f"{r.final / base:.3g}" if base and math.isfinite(r.final) and r.method != YARDSTICK else ""
        end = f"{r.final:.1e}" if math.isfinite(r.final) else "diverges"
        rows.append(
            (r.method, r.graph if r.method != YARDSTICK else "all-reduce", f"{r.growth:.3f}", *steps, end, ratio)
        )
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
    handles: dict[str, Any] = {}
    for axes, graph in zip(np.atleast_1d(figure.subplots(1, len(graphs), sharey=True)), graphs, strict=True):
        for r in runs:
            if r.method == YARDSTICK:
                style = {"color": "#000000", "linestyle": "--", "linewidth": 1.4, "zorder": 3}
            elif r.graph == graph:
                k = methods.index(r.method)
                style = {"color": COLORS[k % len(COLORS)], "linestyle": ("-", "-.", ":")[k // len(COLORS) % 3]}
            else:
                continue
            shown = np.where(np.isfinite(r.error), r.error, np.nan)
            (line,) = axes.plot(shown, linewidth=style.pop("linewidth", 2.0), **style)
            handles.setdefault("all-reduce momentum SGD" if r.method == YARDSTICK else r.method, line)
            if not math.isfinite(r.final):
                axes.text(
                    0.98, 0.94, f"{r.method} diverges", transform=axes.transAxes, ha="right", color=style["color"]
                )
        axes.set(title=graph, xlabel="step", xscale="log", yscale="log")
        axes.set_xlim(left=3)
        axes.set_ylim(max(1e-12, 0.3 * min(r.error[np.isfinite(r.error)].min() for r in runs)), 30)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean squared distance to the optimum, relative")
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(4 if len(graphs) == 1 else 6, len(handles)),
        frameon=False,
    )
    figure.savefig(path, dpi=110)


# -- the sweep ---------------------------------------------------------------------------------------------------------

# The theorems' limiting bias: DSGD and DecentLaM O(lr^2 b^2 / (1 - rho)^2), DmSGD that over (1 - beta)^2 more
# (Yuan et al., ICCV 2021, propositions 2 and 3 and theorem 1).
THEOREMS = {"dsgd": (2, 0, -2), "dmsgd": (2, -2, -2), "decentlam": (2, 0, -2)}
LRS = tuple(np.geomspace(1e-5, 1e-3, 5))
MOMENTA = (0.5, 0.8, 0.9, 0.95)
LAZINESS = tuple(2.0**-k for k in range(3, 8))  # (1 - t) I + t W has the 1 - rho of W, times t
SWEPT_LR = 1e-5  # lr / (1 - beta) must be small against 1 / |H| for the leading order to show


class Sweep(NamedTuple):
    """How one method's bias changes with one quantity."""

    method: str
    quantity: str  # "lr", "1 - beta", "1 - rho"
    values: tuple[float, ...]
    bias: tuple[float, ...]
    theorem: int

    @property
    def exponent(self) -> float:
        """Slope on log-log axes, least squares."""
        return float(np.polyfit(np.log(self.values), np.log(self.bias), 1)[0])


def lazier(graph: Topology, t: float) -> Topology:
    return Topology([(1 - t) * np.eye(graph.n) + t * phase.dense() for phase in graph.phases], f"lazy {graph.name}")


def sweep(method: str, graph: Topology, problem: Regression, momentum: float) -> list[Sweep]:
    """The bias of a method against lr, 1 - beta and 1 - rho, the other two held."""
    graphs = [lazier(graph, t) for t in LAZINESS]
    cases: dict[str, tuple[Sequence[float], Callable[[int], float]]] = {
        "lr": (LRS, lambda k: limiting_bias(method, graph, problem, LRS[k], momentum)),
        "1 - beta": (
            [1 - b for b in MOMENTA],
            lambda k: limiting_bias(method, graph, problem, SWEPT_LR, MOMENTA[k]),
        ),
        "1 - rho": (
            [1 - g.rho for g in graphs],
            lambda k: limiting_bias(method, graphs[k], problem, SWEPT_LR, momentum),
        ),
    }
    return [
        Sweep(method, quantity, tuple(values), tuple(bias(k) for k in range(len(values))), theorem)
        for (quantity, (values, bias)), theorem in zip(cases.items(), THEOREMS[method], strict=True)
    ]


def sweep_summary(sweeps: Sequence[Sweep]) -> str:
    rows = []
    for method in dict.fromkeys(s.method for s in sweeps):
        own = [s for s in sweeps if s.method == method]
        rows.append((method, *(f"{s.exponent:+.3f} ({s.theorem:+d})" for s in own)))
    lines = [table(("exponent measured\n(the theorem's)", "in lr", "in 1 - beta", "in 1 - rho"), rows)]
    of = {s.method: dict(zip(s.values, s.bias, strict=True)) for s in sweeps if s.quantity == "1 - beta"}
    if {"dmsgd", "decentlam"} <= set(of):
        ratios = [(f"{1 - v:g}", f"{of['dmsgd'][v] / of['decentlam'][v]:.2f}", f"{v**-2:.2f}") for v in of["dmsgd"]]
        lines += ["", table(("momentum", "DmSGD's bias over\nDecentLaM's", "1/(1 - beta)^2"), ratios)]
    return "\n".join(lines)


def draw_sweep(sweeps: Sequence[Sweep], title: str, path: Path) -> None:
    """Three panels: the bias over each quantity, log-log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(title)
    names = {"lr": "learning rate", "1 - beta": "1 - momentum", "1 - rho": "1 - rho"}
    for axes, quantity in zip(figure.subplots(1, 3), names, strict=True):
        for s in (s for s in sweeps if s.quantity == quantity):
            k = list(THEOREMS).index(s.method)
            style = {"color": COLORS[k], "marker": "osx"[k], "linestyle": "--" if s.method == "decentlam" else "-"}
            label = f"{s.method}: slope {s.exponent:+.2f}, theorem {s.theorem:+d}"
            axes.loglog(s.values, s.bias, linewidth=1.8, label=label, **style)
        if quantity != "lr":  # less than a decade or two: the values themselves say more than powers of ten
            axes.set_xticks(s.values, [f"{v:.2g}" for v in s.values])
            axes.minorticks_off()
        axes.set(xlabel=names[quantity])
        axes.margins(y=0.3)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left" if quantity == "lr" else "upper right")
    figure.axes[0].set_ylabel("limiting bias: mean squared distance\nto the optimum, relative")
    figure.savefig(path, dpi=110)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser("fused-dlam compare", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of fused_dlam.rules ({' '.join(METHODS)})")
    parser.add_argument("--topology", nargs="+", metavar="NAME", help=f"one or more graphs ({' '.join(GRAPHS)})")
    parser.add_argument("-n", type=count, default=8, help="workers (8)")
    parser.add_argument("--steps", type=count, default=8000, help="steps of each method (8000)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate, constant (2e-3)")
    parser.add_argument("--momentum", type=float, default=0.9, help="beta (0.9)")
    parser.add_argument("--schedule", choices=("atc", "awc"), default="atc", help="of the gossip methods (atc)")
    parser.add_argument("--spread", type=float, default=1.0, help="how far apart the workers' solutions are (1)")
    parser.add_argument("--seed", type=int, default=3, help="of the data (3)")
    parser.add_argument("--sweep", action="store_true", help="measure the bias's exponents instead")
    parser.add_argument("--out", type=picture, help="the picture's file (fused-dlam-compare.png, ...-sweep.png)")
    options = parser.parse_args(argv)
    need(parser, "matplotlib")
    methods = options.methods or (THEOREMS if options.sweep else METHODS)
    names = options.topology or (GRAPHS[:1] if options.sweep else GRAPHS)
    ignored = [name for name in ("steps", "lr", "schedule") if getattr(options, name) != parser.get_default(name)]
    if options.sweep and ignored:
        parser.error(f"--sweep has learning rates of its own, takes no steps, and is of atc: leave out --{ignored[0]}")
    if not 0 < options.lr < math.inf:
        parser.error(f"--lr must be a positive number, not {options.lr:g}")
    if not 0 <= options.momentum < 1:
        parser.error(f"--momentum must be from 0 to below 1, not {options.momentum:g}")
    try:
        graphs = [topologies.get(name.replace("_", "-"), options.n) for name in names]
        for method in methods:
            if options.schedule == "awc" and rules.get(method).average == "neighbors":
                rules.get(method).adapt_while_communicating()
            rules.get(method)
    except ValueError as error:
        parser.error(str(error))
    problem = Regression(options.n, spread=options.spread, seed=options.seed)
    print(
        f"Full-batch linear regression, {options.n} worker{'s' * (options.n > 1)}, d = {problem.d}, gradients of the"
        f" workers at the optimum: b^2 = {problem.heterogeneity:.3g}."
    )
    if options.sweep:
        return _sweep(parser, options, methods, graphs, problem)
    print(f"Momentum {options.momentum:g}, learning rate {options.lr:g}, {options.steps} steps, {options.schedule}.\n")
    settings = (options.steps, options.lr, options.momentum, options.schedule)
    runs = [run(YARDSTICK, graphs[0], problem, *settings)]
    runs += [run(m, graph, problem, *settings) for graph in graphs for m in methods if m != YARDSTICK]
    print(summary(runs))
    path = options.out or Path("fused-dlam-compare.png")
    title = f"{options.n} workers, momentum {options.momentum:g}, learning rate {options.lr:g}"
    draw(runs, f"Linear regression with heterogeneous data: {title}", path)
    print(f"\nPicture: {path.resolve()}")
    return 0


def _sweep(parser: Parser, options, methods, graphs, problem) -> int:
    if unknown := [m for m in methods if m not in THEOREMS]:
        parser.error(f"--sweep has theorems for {', '.join(THEOREMS)}, not for {', '.join(unknown)}")
    if len(graphs) > 1 or graphs[0].period != 1 or not graphs[0].is_symmetric or graphs[0].n < 3:
        parser.error(
            "--sweep needs one static, symmetric graph of at least 3 workers: DecentLaM's theorem is for those"
        )
    graph = graphs[0]
    sweeps = [s for m in methods for s in sweep(m, graph, problem, options.momentum)]
    print(
        f"Limiting bias on {graph.name}, solved for, not waited for; lr from {LRS[0]:g} to {LRS[-1]:g}; momentum"
        f" {', '.join(f'{b:g}' for b in MOMENTA)};\n1 - rho of (1 - t) I + t W, t from {LAZINESS[-1]:g} to"
        f" {LAZINESS[0]:g}. Held meanwhile: momentum {options.momentum:g}, lr {SWEPT_LR:g}.\n"
    )
    print(sweep_summary(sweeps))
    path = options.out or Path("fused-dlam-compare-sweep.png")
    draw_sweep(sweeps, f"Limiting bias, {graph.n} workers, {graph.name}", path)
    print(f"\nPicture: {path.resolve()}")
    return 0
