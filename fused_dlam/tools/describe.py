"""`fused-dlam topology`: what a graph costs per step, which methods are stable on it, and a drawing of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .. import rules
from .. import topology as topologies
from ..rules.rule import Rule
from ..theory.limits import rate_limit
from ..theory.stability import REFUSED, growth, rows_for
from ..topology import Circulant, Topology
from .cli import Parser, count, need, picture
from .plain import table

LARGEST = 1 << 20  # workers, of circulant graphs: half a minute
LARGEST_DENSE = 1024  # of the others, whose [n, n] matrices are formed and decomposed
LARGEST_MAP = 256  # of those without common eigenvectors: the whole map of x and state is decomposed
LARGEST_RANDOM = 16384  # of random ones, whose workers are followed through thousands of steps
LARGEST_LIMIT = (1024, 24)  # whose rate limits are computed, with common eigenvectors and without: a second a method
LARGEST_DRAWN = 64
ALONE = topologies.ring(1)


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
    if n == 1:
        return f"{topology.name} over 1 worker: nobody to exchange with. Every method takes its own steps, alone."
    messages, volume = load(topology)
    degrees = [phase.degrees()[0] for phase in topology.phases]
    low, high = min(degrees), max(degrees)
    rate = rules.auto_correction_rate(momentum, topology.slowest_rho)
    ours = rules.auto_displacement_rate(momentum, topology.slowest_rho, topology.is_static)
    facts = {
        "period": f"{period} step{'s' * (period > 1)}" if period else "none: drawn anew at every step",
        "degree": (f"{low}" if low == high else f"{low} to {high}") + ": whom a worker hears from in one step",
        "rho": _contraction(topology),
        "symmetric": "yes" if topology.is_symmetric else "no",
        "doubly stochastic": "yes" if topology.is_doubly_stochastic else f"no, {topology.sums} sum to one",
        **_masses(topology),
        "messages": "none, by all-reduce" if messages == 0 < volume else f"{messages:g} per worker and step",
        "bytes sent": f"{volume:.4g} M per worker and step (M: all parameters); ring all-reduce {all_reduce(n):.4g} M",
        "correction rate": f"{ours:.4g} for mi-dmsgd, {rate:.4g} for pc-dmsgd: what 'auto' takes",
    }
    lines = [f"{topology.name} over {n:,} workers, momentum {momentum:g}"]
    lines += [f"  {name:<18} {value}" for name, value in facts.items()]
    header = ("method", "growth of disagree-\nment per step", "steps to\na tenth", "", "largest lr\nx curvature",
              "bytes sent\nper step")  # fmt: skip
    rows = [verdict(rule, topology, momentum, volume) for rule in rules.ALL.values()]
    return "\n".join([*lines, "", table(header, rows)])


def _masses(topology: Topology) -> dict[str, str]:
    """Of the first steps, if the graph never repeats."""
    if topology.is_doubly_stochastic:
        return {}
    w = [topology.mass(t) for t in range(len(topology.phases))]
    return {"masses": f"{min(v.min() for v in w):.4g} to {max(v.max() for v in w):.4g}, one on average"}


def _contraction(topology: Topology) -> str:
    if topology.rho > 0:
        error = f" ± {topology.contraction.error:.4f}" if topology.period is None else ""
        return f"{_near_one(topology.rho)}{error}: contraction per step"
    if topology.period is None:
        slow = topology.slowest_rho
        return f"0: sooner or later the drawn steps average exactly; contraction per step until then: {slow:.4f}"
    return "0: averages exactly within a period"


def verdict(rule: Rule, topology: Topology, momentum: float, volume: float) -> tuple[str, ...]:
    """One method's row of the table."""
    try:
        rows_for(rule, topology)
    except ValueError:
        return rule.name, "knows no masses", "", "refused", "", ""
    limit = largest_rate(rule, topology, momentum)
    if rule.average == "gradient":
        return rule.name, "exact", "", "", limit, f"{all_reduce(topology.n):.4g} M"
    cost = f"{rule.messages * volume:.4g} M"
    random = topology.period is None
    if not random and topology.n > LARGEST_MAP and not _has_modes(rule, topology):
        return rule.name, "too large to tell", "", "", limit, cost
    factor, error = growth(rule, topology, momentum)
    figure = _near_one(factor) + (f" ± {error:.4f}" if random else "")
    if factor + 2 * error >= REFUSED:
        # The optimizer refuses all three; a graph may also be so slow that nothing is forgotten in a lifetime.
        why = "unstable" if factor > 2 - REFUSED else "too near to tell" if error else "too slow"
        return rule.name, figure, "never", why, limit, cost
    per_step = factor or (topology.slowest_rho if random else 0.0)
    tenth = max(topology.period or 1, math.ceil(math.log(0.1) / math.log(per_step)) if per_step > 0 else 1)
    return rule.name, figure, f"{tenth:,}", "stable", limit, cost


def largest_rate(rule: Rule, topology: Topology, momentum: float) -> str:
    """The limit of lr times curvature, where every worker has the same; blank for rules that are not linear."""
    try:
        if rule.average == "gradient":
            return f"{rate_limit(rule, topology, momentum):.2f}"
        rate_limit(rule, ALONE, momentum)  # takes no time, and tells whether the rule is linear
    except ValueError:
        return ""
    if topology.period is None:
        return "see rate_limit"  # which takes seconds for each method
    if topology.n > LARGEST_LIMIT[not _has_modes(rule, topology)]:
        return "too large to tell"
    return f"{rate_limit(rule, topology, momentum):.2f}"


def _has_modes(rule: Rule, topology: Topology) -> bool:
    """Whether a method acts on the workers' common eigenvectors one by one: not where each has a mass of its own."""
    return topology.modes is not None and (topology.is_doubly_stochastic or not rule.mass)


def _near_one(value: float) -> str:
    return f"1 - {1 - value:.1e}" if 0 < 1 - value < 1e-4 else f"{value:.4f}"


# -- the drawing -------------------------------------------------------------------------------------------------------


def draw(topology: Topology, path: Path) -> None:
    """The edges of all phases, one color per phase; an arrow j -> i says that i hears from j, a line both."""
    import networkx as nx
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    # Of a random graph the first steps: with more nothing could be told apart.
    n, period = topology.n, topology.period or min(6, len(topology.phases))
    graphs = [topology.to_networkx(t) for t in range(period)]
    union = nx.compose_all(graphs)
    union.remove_edges_from(list(nx.selfloop_edges(union)))
    place = _place(topology, union)
    colors = [colormaps["tab10"](t) if period <= 10 else colormaps["viridis"](t / (period - 1)) for t in range(period)]
    figure = Figure(figsize=(7, 7.4), layout="constrained")
    axes = figure.subplots()
    node = 420 if n <= 16 else 420 * 16 / n
    for graph, color in zip(graphs, colors, strict=True):
        _draw_edges(axes, topology, union, graph, place, color, node)
    nx.draw_networkx_nodes(union, place, ax=axes, node_size=node, node_color="white", edgecolors="#333333")
    nx.draw_networkx_labels(union, place, ax=axes, font_size=10 if n <= 16 else 7)
    legend = "a line: both hear each other" if topology.is_symmetric else "an arrow points to the worker that hears"
    axes.set_title(f"{topology.name} over {n} worker{'s' * (n > 1)}\n({legend})")
    axes.set_aspect("equal")
    axes.margins(0.08)
    axes.axis("off")
    if 1 < period <= 10:
        _name_the_steps(figure, topology, colors)
    figure.savefig(path, dpi=120)


def _place(topology: Topology, union) -> dict[int, tuple[float, float]]:
    """Where each worker is drawn: on a circle where the graph looks the same from all, worker 0 on top."""
    import networkx as nx

    if all(isinstance(phase, Circulant) for phase in topology.phases):
        turn = 2 * math.pi / topology.n
        return {i: (math.sin(turn * i), math.cos(turn * i)) for i in range(topology.n)}
    return nx.kamada_kawai_layout(union.to_undirected(), weight=None)


def _draw_edges(axes, topology: Topology, union, graph, place, color, node: float) -> None:
    import networkx as nx

    edges = [(j, i) for j, i in graph.edges if i != j]
    mutual = {(j, i) for j, i in edges if graph.has_edge(i, j)}
    kinds = (
        # Bent, so that j -> i in one phase and i -> j in another are two lines.
        ([e for e in edges if e not in mutual], "-|>", "arc3,rad=-0.12"),
        ([(j, i) for j, i in mutual if j < i], "-" if topology.is_symmetric else "<|-|>", "arc3"),
    )
    faint = max(0.25, min(1.0, 200 / max(1, union.number_of_edges())))
    for some, arrow, bend in kinds:
        nx.draw_networkx_edges(
            union, place, some, ax=axes, edge_color=[color], alpha=faint, width=1.4, arrows=True,
            arrowstyle=arrow, arrowsize=14 if topology.n <= 16 else 9, connectionstyle=bend, node_size=node,
        )  # fmt: skip


def _name_the_steps(figure, topology: Topology, colors: Sequence) -> None:
    from matplotlib.lines import Line2D

    shown, period = len(colors), topology.period
    lines = [Line2D([], [], color=c, linewidth=2) for c in colors]
    names = [f"steps {t}, {t + period}, {t + 2 * period}, ..." if period else f"step {t}" for t in range(shown)]
    figure.legend(lines, names, loc="outside lower center", ncols=min(3, shown), frameon=False)


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
    try:
        topology = build_if_small_enough(name, n)
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


def build_if_small_enough(name: str, n: int) -> Topology:
    """Raises ValueError for more workers than can be analyzed, before any memory is taken."""
    build = topologies.FAMILY[name]
    # A graph of 4 tells how a large one would be built: with dense matrices 65,536 workers would take 34 GB.
    small = build(4)
    if small.period is None:
        largest, why = LARGEST_RANDOM, ", for it is followed step by step"
    elif all(isinstance(phase, Circulant) for phase in small.phases):
        largest, why = LARGEST, ""
    else:
        largest, why = LARGEST_DENSE, ", for its matrices are dense"
    if n > largest:
        raise ValueError(f"{name} is analyzed up to n = {largest:,}{why}")
    return build(n)
