"""How the bias of a method grows with the learning rate, the momentum and the graph, beside what the theorems say.

    python bench/bias_exponents.py                       # DSGD, DmSGD and DecentLaM, 8 workers: 4 seconds
    python bench/bias_exponents.py decentlam --topology ring -n 16 --momentum 0.8

Full-batch linear regression in which every worker's data have another solution. The bias is solved for as the fixed
point of a step, not waited for. It is measured against one quantity, the other two held, on log-log axes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fused_dlam import Topology, topology
from fused_dlam.theory.regression import Regression, limiting_bias
from fused_dlam.tools.cli import Parser, count, need, picture
from fused_dlam.tools.plain import GREEN, ORANGE, RED, table

# The theorems' limiting bias: DSGD and DecentLaM O(lr^2 b^2 / (1 - rho)^2), DmSGD that over (1 - beta)^2 more
# (Yuan et al., ICCV 2021, propositions 2 and 3 and theorem 1). Exponents in lr, 1 - beta and 1 - rho.
THEOREMS = {"dsgd": (2, 0, -2), "dmsgd": (2, -2, -2), "decentlam": (2, 0, -2)}
STYLES = {
    "dsgd": {"color": RED, "marker": "o"},
    "dmsgd": {"color": ORANGE, "marker": "s"},
    "decentlam": {"color": GREEN, "marker": "x", "linestyle": "--"},
}
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


def summary(sweeps: Sequence[Sweep]) -> str:
    rows = []
    for method in dict.fromkeys(s.method for s in sweeps):
        own = [s for s in sweeps if s.method == method]
        rows.append((method, *(f"{s.exponent:+.3f} ({s.theorem:+d})" for s in own)))
    text = table(("exponent measured\n(the theorem's)", "in lr", "in 1 - beta", "in 1 - rho"), rows)
    of = {s.method: dict(zip(s.values, s.bias, strict=True)) for s in sweeps if s.quantity == "1 - beta"}
    if {"dmsgd", "decentlam"} <= set(of):
        ratios = [(f"{1 - v:g}", f"{of['dmsgd'][v] / of['decentlam'][v]:.2f}", f"{v**-2:.2f}") for v in of["dmsgd"]]
        text += "\n\n" + table(("momentum", "DmSGD's bias over\nDecentLaM's", "1/(1 - beta)^2"), ratios)
    return text


def draw(sweeps: Sequence[Sweep], title: str, path: Path) -> None:
    """Three panels: the bias over each quantity, log-log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(title)
    names = {"lr": "learning rate", "1 - beta": "1 - momentum", "1 - rho": "1 - rho"}
    for axes, quantity in zip(figure.subplots(1, 3), names, strict=True):
        for s in (s for s in sweeps if s.quantity == quantity):
            label = f"{s.method}: slope {s.exponent:+.2f}, theorem {s.theorem:+d}"
            axes.loglog(s.values, s.bias, linewidth=1.8, label=label, **STYLES[s.method])
        if quantity != "lr":  # less than a decade or two: the values themselves say more than powers of ten
            axes.set_xticks(s.values, [f"{v:.2g}" for v in s.values])
            axes.minorticks_off()
        axes.set(xlabel=names[quantity])
        axes.margins(y=0.3)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left" if quantity == "lr" else "upper right")
    figure.axes[0].set_ylabel("limiting bias: mean squared distance\nto the optimum, relative")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("bias_exponents.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(THEOREMS)} (all)")
    parser.add_argument("--topology", default="symmetric-exponential", metavar="NAME", help="static and symmetric")
    parser.add_argument("-n", type=count, default=8, help="workers, 3 or more (8)")
    parser.add_argument("--momentum", type=float, default=0.9, help="where the others are swept (0.9)")
    parser.add_argument("--seed", type=int, default=3, help="of the data (3)")
    parser.add_argument("--out", type=picture, help="a picture's file")
    options = parser.parse_args(argv)
    methods = options.methods or list(THEOREMS)
    if unknown := [m for m in methods if m not in THEOREMS]:
        parser.error(f"there are theorems for {', '.join(THEOREMS)}, not for {', '.join(unknown)}")
    if not 0 <= options.momentum < 1:
        parser.error(f"--momentum must be from 0 to below 1, not {options.momentum:g}")
    try:
        graph = topology.get(options.topology.replace("_", "-"), options.n)
    except ValueError as error:
        parser.error(str(error))
    if graph.period != 1 or not graph.is_symmetric or graph.n < 3:
        parser.error("a static, symmetric graph of at least 3 workers is needed: DecentLaM's theorem is for those")
    if options.out:
        need(parser, "matplotlib")
    problem = Regression(options.n, seed=options.seed)
    sweeps = [s for m in methods for s in sweep(m, graph, problem, options.momentum)]
    print(
        f"Limiting bias on {graph.name}, {graph.n} workers. lr from {LRS[0]:g} to {LRS[-1]:g}; momentum"
        f" {', '.join(f'{b:g}' for b in MOMENTA)};\n1 - rho of (1 - t) I + t W, t from {LAZINESS[-1]:g} to"
        f" {LAZINESS[0]:g}. Held meanwhile: momentum {options.momentum:g}, lr {SWEPT_LR:g}.\n\n{summary(sweeps)}"
    )
    if options.out:
        draw(sweeps, f"Limiting bias, {graph.n} workers, {graph.name}", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
