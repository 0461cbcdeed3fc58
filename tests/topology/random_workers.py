"""What worker processes run in the tests of random topologies: importable by name, as processes need."""

import workers

import fused_dlam
from fused_dlam import topology


def drawn(rank, graphs, steps):
    """The matrices that this process draws, of graphs by name and of those it was sent."""
    n = 5
    return [[topology.get(graph, n).weights(step) for step in range(steps)] for graph in graphs]


def refused(rank, graph, cases):
    """What building an optimizer says, for each of the cases' options."""
    said = []
    for options in cases:
        try:
            fused_dlam.GossipSGD(workers.Tied().parameters(), lr=0.1, topology=graph, **options)
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("no error")
    return said


def refused_seeds(rank):
    return refused(rank, topology.random_match(2, seed=rank), [{}])[0]
