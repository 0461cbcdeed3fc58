"""`fused-dlam topology`: what a graph costs per step, which methods are stable on it, and a drawing of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .. import rules
from .. import topology as topologies
from ..rules.rule import Rule
from ..theory.stability import REFUSED, lyapunov
from ..topology.drawn import RandomTopology
from ..topology.matrix import Circulant
from ..topology.topology import Topology
from .cli import Parser, count, need, picture

LARGEST = 1 << 20  # workers, of circulant graphs: half a minute
LARGEST_DENSE = 1024  # of the others, whose [n, n] matrices are formed and decomposed
LARGEST_MAP = 256  # of those without common eigenvectors: the whole map of x and state is decomposed
LARGEST_RANDOM = 16384  # of random ones, whose workers are followed through thousands of steps
LARGEST_DRAWN = 64


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns of plain text, the first to the left and the others to the right; a header may have two lines."""
    heads = [h.split("\n") for h in header]
    height = max(map(len, heads))
    lines = [list(line) for line in zip(*([""] * (height - len(h)) + h for h in heads), strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, *rows, strict=True)]
    lines += [["-" * w for w in widths], *map(list, rows)]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(align, line, widths, strict=True)).rstrip() for line in lines)


# -- what it costs and whether it is stable ----------------------------------------------------------------------------


def all_reduce(n: int) -> float:
    """What a ring all-reduce of M bytes makes every worker send, in M."""
    return 2 * (n - 1) / n


def load(topology: Topology) -> tuple[float, float]:
    """Messages per step that the busiest worker sends, and bytes per step in M, both as means over a period.

    Of a random graph as means over its first steps. A step whose matrix is exact averaging is done by all-reduce, as
    the optimizer does it: no messages.
    """
    messages = volume = 0.0
    for phase in topology.phases:
        if topology.n > 2 and phase.averages():
            volume += all_reduce(topology.n)
        else:
            sent = phase.degrees()[1]
            messages, volume = messages + sent, volume + sent
    return messages / len(topology.phases), volume / len(topology.phases)


def describe(topology: Topology, momentum: float) -> str:
    """All that is printed about a topology."""
    n, period = topology.n, topology.period
    messages, volume = load(topology)
    degrees = [phase.degrees()[0] for phase in topology.phases]
    low, high = min(degrees), max(degrees)
    rate = rules.auto_correction_rate(momentum, topology.slowest_rho)
    facts = {
        "period": f"{period} step{'s' * (period > 1)}" if period else "none: drawn anew at every step",
        "degree": (f"{low}" if low == high else f"{low} to {high}") + ": whom a worker hears from in one step",
        "rho": _contraction(topology),
        "symmetric": "yes" if topology.is_symmetric else "no",
        "doubly stochastic": "yes" if topology.is_doubly_stochastic else "no",
        "messages": "none, by all-reduce" if messages == 0 < volume else f"{messages:g} per worker and step",
        "bytes sent": f"{volume:.4g} M per worker and step (M: all parameters); ring all-reduce {all_reduce(n):.4g} M",
        "correction rate": f"{rate:.4g}: what 'auto' takes for pc-dmsgd",
    }
    lines = [f"{topology.name} over {n:,} worker{'s' * (n > 1)}, momentum {momentum:g}"]
    lines += [f"  {name:<18} {value}" for name, value in facts.items()]
    header = ("method", "growth of disagree-\nment per step", "steps to\na tenth", "", "bytes sent\nper step")
    rows = [verdict(rule, topology, momentum, volume) for rule in rules.ALL.values()]
    return "\n".join([*lines, "", table(header, rows)])


def _contraction(topology: Topology) -> str:
    if topology.rho > 0:
        error = f" ± {topology.contraction.error:.4f}" if isinstance(topology, RandomTopology) else ""
        return f"{_near_one(topology.rho)}{error}: contraction per step"
    if isinstance(topology, RandomTopology) and topology.n > 1:
        return f"0: averages exactly sooner or later; {topology.slowest_rho:.4f} until then"
    return "0: averages exactly within a period"


def verdict(rule: Rule, topology: Topology, momentum: float, volume: float) -> tuple[str, ...]:
    """One method's row of the table."""
    if rule.average == "gradient":
        return rule.name, "exact", "", "", f"{all_reduce(topology.n):.4g} M"
    cost = f"{rule.messages * volume:.4g} M"
    random = topology.period is None
    if not random and topology.n > LARGEST_MAP and topology.modes is None:
        return rule.name, "too large to tell", "", "", cost
    growth, error = lyapunov(rule, topology, momentum)
    figure = _near_one(growth) + (f" ± {error:.4f}" if random else "")
    if growth + 2 * error >= REFUSED:
        # The optimizer refuses all three; a graph may also be so slow that nothing is forgotten in a lifetime.
        why = "unstable" if growth > 2 - REFUSED else "too near to tell" if error else "too slow"
        return rule.name, figure, "never", why, cost
    per_step = growth or (topology.slowest_rho if random else 0.0)
    tenth = max(topology.period or 1, math.ceil(math.log(0.1) / math.log(per_step)) if per_step > 0 else 1)
    return rule.name, figure, f"{tenth:,}", "stable", cost


def _near_one(value: float) -> str:
    return f"1 - {1 - value:.1e}" if 0 < 1 - value < 1e-4 else f"{value:.4f}"


# -- the drawing -------------------------------------------------------------------------------------------------------


def draw(topology: Topology, path: Path) -> None:
    """The edges of all phases, one color per phase; an arrow j -> i says that i hears from j, a line both."""
    import networkx as nx
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # Of a random graph the first steps: with more nothing could be told apart.
    n, period = topology.n, topology.period or min(6, len(topology.phases))
    graphs = [topology.to_networkx(t) for t in range(period)]
    union = nx.compose_all(graphs)
    union.remove_edges_from(list(nx.selfloop_edges(union)))
    if all(isinstance(phase, Circulant) for phase in topology.phases):  # worker 0 on top, then clockwise
        place = {i: (math.sin(2 * math.pi * i / n), math.cos(2 * math.pi * i / n)) for i in range(n)}
    else:
        place = nx.kamada_kawai_layout(union.to_undirected(), weight=None)
    colors = [colormaps["tab10"](t) if period <= 10 else colormaps["viridis"](t / (period - 1)) for t in range(period)]
    figure = Figure(figsize=(7, 7.4), layout="constrained")
    axes = figure.subplots()
    node = 420 if n <= 16 else 420 * 16 / n
    faint = max(0.25, min(1.0, 200 / max(1, union.number_of_edges())))
    for graph, color in zip(graphs, colors, strict=True):
        edges = [(j, i) for j, i in graph.edges if i != j]
        mutual = [(j, i) for j, i in edges if graph.has_edge(i, j)]
        kinds = (
            # Bent, so that j -> i in one phase and i -> j in another are two lines.
            ([e for e in edges if e not in set(mutual)], "-|>", "arc3,rad=-0.12"),
            ([(j, i) for j, i in mutual if j < i], "-" if topology.is_symmetric else "<|-|>", "arc3"),
        )
        for some, arrow, bend in kinds:
            nx.draw_networkx_edges(
                union, place, some, ax=axes, edge_color=[color], alpha=faint, width=1.4, arrows=True,
                arrowstyle=arrow, arrowsize=14 if n <= 16 else 9, connectionstyle=bend, node_size=node,
            )  # fmt: skip
    nx.draw_networkx_nodes(union, place, ax=axes, node_size=node, node_color="white", edgecolors="#333333")
    nx.draw_networkx_labels(union, place, ax=axes, font_size=10 if n <= 16 else 7)
    legend = "a line: both hear each other" if topology.is_symmetric else "an arrow points to the worker that hears"
    axes.set_title(f"{topology.name} over {n} worker{'s' * (n > 1)}\n({legend})")
    axes.set_aspect("equal")
    axes.margins(0.08)
    axes.axis("off")
    if 1 < period <= 10:
        lines = [Line2D([], [], color=c, linewidth=2) for c in colors]
        names = [
            f"steps {t}, {t + period}, {t + 2 * period}, ..." if topology.period else f"step {t}" for t in range(period)
        ]
        figure.legend(lines, names, loc="outside lower center", ncols=min(3, period), frameon=False)
    figure.savefig(path, dpi=120)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = Parser("fused-dlam topology", description=__doc__.split(": ", 1)[1])
    parser.add_argument("name", nargs="?", default="list", help="a known name; without one they are listed")
    parser.add_argument("-n", type=count, help="the number of workers")
    parser.add_argument("--momentum", type=float, default=0.9, help="beta, from 0 to below 1 (0.9)")
    parser.add_argument("--plot", type=picture, metavar="FILE", help=f"draw it (up to {LARGEST_DRAWN} workers)")
    options = parser.parse_args(argv)
    name, n = options.name.replace("_", "-"), options.n
    if name == "list":
        print("fused-dlam topology NAME -n N, where NAME is one of\n")
        for known, build in topologies.FAMILY.items():
            print(f"  {known:<25}{(build.__doc__ or '').splitlines()[0]}")
        return 0
    if name not in topologies.FAMILY:
        parser.error(f"unknown topology {options.name!r}; known: {', '.join(topologies.FAMILY)}")
    if n is None:
        parser.error(f"how many workers? For example: fused-dlam topology {name} -n 8")
    if not 0 <= options.momentum < 1:
        parser.error(f"--momentum must be from 0 to below 1, not {options.momentum:g}")
    build = topologies.FAMILY[name]
    try:
        # A small one tells whether a large one would be built from dense matrices: 65,536 workers would take 34 GB.
        small = build(4)
        if small.period is None:
            largest, why = LARGEST_RANDOM, ", for it is followed step by step"
        elif all(isinstance(phase, Circulant) for phase in small.phases):
            largest, why = LARGEST, ""
        else:
            largest, why = LARGEST_DENSE, ", for its matrices are dense"
        if n > largest:
            parser.error(f"{name} is analyzed up to n = {largest:,}{why}")
        topology = build(n)
    except ValueError as error:
        parser.error(str(error))
    if options.plot is not None:
        if n > LARGEST_DRAWN:
            parser.error(f"--plot draws up to {LARGEST_DRAWN} workers; {n:,} would be a black disk")
        need(parser, "matplotlib", "scipy")
    print(describe(topology, options.momentum))
    if options.plot is not None:
        draw(topology, options.plot)
        print(f"\nDrawing: {options.plot.resolve()}")
    return 0
