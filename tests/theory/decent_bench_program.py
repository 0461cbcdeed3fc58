"""Runs methods of decent-bench on given quadratics, through its public names, and prints every agent's x after every
iteration as JSON. A program of its own: python decent_bench_program.py < problem.json. It knows nothing of fused_dlam.

In: {"edges": [[i, j], ...], "A": [n, d, d], "b": [n, d], "x0": [n, d], "runs": [[name, arguments, iterations], ...]}
for f_i(x) = x A_i x / 2 + b_i x. Out: {"weights": [n, n], "paths": [[iterations + 1, n, d], ...], "version": ...}.
"""

import importlib.metadata
import json
import sys

import decent_array.interoperability as arrays
import networkx as nx
import numpy as np
from decent_bench.agents import Agent
from decent_bench.algorithms import p2p
from decent_bench.costs import QuadraticCost
from decent_bench.networks import P2PNetwork


def path(problem, name, arguments, iterations):
    A, b, x0 = (np.array(problem[key], dtype=np.float64) for key in ("A", "b", "x0"))
    graph = nx.Graph()
    graph.add_nodes_from(range(len(A)))
    graph.add_edges_from(problem["edges"])
    agents = [Agent(QuadraticCost(arrays.from_numpy(A[i]), arrays.from_numpy(b[i]))) for i in range(len(A))]
    network = P2PNetwork(graph, agents)
    starts = {agent: arrays.from_numpy(x0[i]) for i, agent in enumerate(network.agents())}
    out = [x0]

    def note(iteration):
        out.append(np.stack([np.array(arrays.to_numpy(agent.x)) for agent in network.agents()]))

    getattr(p2p, name)(x0=starts, **arguments).run(network, iterations, progress_callback=note)
    return np.array(arrays.to_numpy(network.weights)), np.stack(out)


def main():
    arrays.set_backend("numpy")
    problem = json.load(sys.stdin)
    results = [path(problem, *run) for run in problem["runs"]]
    json.dump(
        {
            "weights": results[0][0].tolist(),
            "paths": [x.tolist() for _, x in results],
            "version": importlib.metadata.version("decent-bench"),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
