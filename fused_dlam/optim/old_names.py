"""Options that have got another form. For one release they work, with a FutureWarning that says the new one."""

from __future__ import annotations

from typing import Any

from .. import rules
from .. import topology as topologies
from ..layers.old_names import from_old_names, warn
from ..rules.rule import Rule
from ..topology import TopologyLike


def translate(options: dict[str, Any], topology: TopologyLike, method: str | Rule = "", layers: Any = ()):
    """Takes the old names out of `options`. Returns topology, method and layers in their new form.

    Raises ValueError or TypeError for values that the old names did not take.
    """
    own = rules.get(method).hyper if method else {}  # a rule may have a hyper-parameter of an old name
    kept = {name: options.pop(name) for name in own if name in options}
    every, global_every = options.pop("communicate_every", None), options.pop("global_average_every", None)
    if every is not None:
        warn(f"communicate_every={every}", f"topology=lambda n: {_text(topology)}.every({every})")
        topology = _changed(topology, lambda graph: graph.every(every))
    if global_every is not None:
        new = f"topology=lambda n: {_text(topology)}.with_global_average({global_every})"
        warn(f"global_average_every={global_every}", new)
        topology = _changed(topology, lambda graph: graph.with_global_average(global_every))
    if not method:  # Gossip has no rule and no layers
        return topology, method, layers
    if "nesterov" in options:
        nesterov, name = options.pop("nesterov"), rules.get(method).name
        warn(f"nesterov={nesterov}", f"method={'nesterov-' * bool(nesterov) + name!r}")
        if nesterov and f"nesterov-{name}" not in rules.ALL:
            known = ", ".join(other.removeprefix("nesterov-") for other in rules.ALL if other.startswith("nesterov-"))
            raise ValueError(f"method {name!r} has no Nesterov form; these have: {known}")
        method = f"nesterov-{name}" if nesterov else method
    layers = from_old_names(options, layers)
    options.update(kept)
    return topology, method, layers


def _changed(topology: TopologyLike, change) -> TopologyLike:
    return lambda n: change(topologies.get(topology, n))


def _text(topology: TopologyLike) -> str:
    return f"fused_dlam.topology.get({topology!r}, n)" if isinstance(topology, str) else "..."
