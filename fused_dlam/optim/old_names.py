"""Options that have got another form. For one release they work, with a FutureWarning that says the new one."""

from __future__ import annotations

from typing import Any

from .. import rules
from .. import topology as topologies
from ..layers.old_names import from_old_names, warn
from ..rules.rule import Rule
from ..rules.scalars import among
from ..topology import Topology, TopologyLike


def translate(options: dict[str, Any], topology: TopologyLike, method: str | Rule = "", layers: Any = ()):
    """Takes the old names out of `options`. Returns topology, method and layers in their new form.

    Raises ValueError or TypeError for values that the old names did not take.
    """
    rule = rules.get(method) if method else None  # Gossip has neither rule nor layers
    # A rule may have a hyper-parameter of an old name.
    kept = {name: options.pop(name) for name in (rule.hyper if rule else ()) if name in options}
    every, global_every = options.pop("communicate_every", None), options.pop("global_average_every", None)
    old = [f"{name}={value}" for name, value in (("communicate_every", every), ("global_average_every", global_every))
           if value is not None]  # fmt: skip
    if old:
        change = f".every({every})" * (not among(every, (None, 1))) + f".with_global_average({global_every})" * (
            global_every is not None
        )
        warn(", ".join(old), _new_topology(topology, change))
        topology = _changed(topology, every, global_every)
    if rule is None:
        return topology, method, layers
    if "nesterov" in options:
        nesterov, name = options.pop("nesterov"), rule.name
        if not among(nesterov, (True, False, None)):
            raise TypeError(f"nesterov must be True or False, not {nesterov!r}")
        warn(f"nesterov={nesterov}", f"method={'nesterov-' * bool(nesterov) + name!r}")
        if nesterov and f"nesterov-{name}" not in rules.ALL:
            known = ", ".join(other.removeprefix("nesterov-") for other in rules.ALL if other.startswith("nesterov-"))
            raise ValueError(f"method {name!r} has no Nesterov form; these have: {known}")
        method = f"nesterov-{name}" if nesterov else method
    layers = from_old_names(options, layers)
    options.update(kept)
    return topology, method, layers


def _changed(topology: TopologyLike, every: int | None, global_every: int | None) -> TopologyLike:
    def graph(n: int) -> Topology:
        graph = topologies.get(topology, n).every(1 if every is None else every)
        return graph if global_every is None else graph.with_global_average(global_every)

    return graph


def _new_topology(topology: TopologyLike, change: str) -> str:
    if not change:
        return "nothing in its place"
    if isinstance(topology, str):
        return f"topology=lambda n: fused_dlam.topology.get({topology!r}, n){change}"
    return (
        f"topology=graph{change}, graph being the {type(topology).__name__} that you pass or that your function returns"
    )
