"""The Base-(k+1) graph (Takezawa et al. 2023): exact averaging in few steps, for any n, with k neighbors at most.

It is built from three graphs:

hyper-hypercube   n = f_1 f_2 ... f_L, where no factor exceeds k+1. Write a worker's number with digits in the bases
                  f_1, f_2, ...; in step l, workers that differ only in digit l average, f_l at a time.
simple            n = sum of a_l (k+1)^p_l, the digits of n. The workers form groups V_1, V_2, ... of these sizes.
  1. Every group averages, as a hyper-hypercube.
  2. For l = 1, 2, ...: each worker of the later groups exchanges with one worker of each of the a_l parts of V_l.
     The mean of every part becomes the mean of all, and so does the mean of the later groups together.
  3. Each part of V_l averages, as a hyper-hypercube.
base              n = q d, where d has a hyper-hypercube: d simple graphs over q workers each, side by side, then the
                  hyper-hypercube across them. The shortest graph of all such d is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

from .matrix import check_count, check_workers, sparse
from .topology import Topology

Workers = Sequence[int]
Step = dict[tuple[int, int], float]  # W[i, j] = W[j, i] for pairs i, j. A worker keeps the rest of its row


def base_k(n: int, k: int = 1) -> Topology:
    """An exact average within a period, for any n, with at most k neighbors per step. Symmetric."""
    n, k = check_workers(n), check_count("the number of neighbors k", k)
    graphs = (base(range(n), d, k) for d in range(1, n + 1) if n % d == 0 and factors(d, k) is not None)
    shortest = min(graphs, key=len)
    phases = []
    for step in shortest or [{}]:
        pairs, weights = [*step, *((j, i) for i, j in step)], [*step.values()] * 2
        phases.append(sparse(n, [i for i, _ in pairs], [j for _, j in pairs], weights))
    return Topology(phases, "base-k" if k == 1 else f"base-k, k = {k}")


@cache
def factors(n: int, k: int) -> tuple[int, ...] | None:
    """The fewest factors of n that do not exceed k+1. None if n has a larger prime factor."""
    if n == 1:
        return ()
    found = [(f, *rest) for f in range(2, k + 2) if n % f == 0 and (rest := factors(n // f, k)) is not None]
    return min(found, key=len, default=None)


def hyper_hypercube(workers: Workers, k: int) -> list[Step]:
    """The steps in which these workers average exactly. Their number must have factors up to k+1 only."""
    steps, stride = [], 1
    for f in factors(len(workers), k) or ():
        step: Step = {}
        for start in range(len(workers)):
            if start // stride % f == 0:
                _average([workers[start + m * stride] for m in range(f)], step)
        steps.append(step)
        stride *= f
    return steps


def simple(workers: Workers, k: int) -> list[Step]:
    """The steps in which any number of workers average exactly."""
    n = len(workers)
    if factors(n, k) is not None:
        return hyper_hypercube(workers, k)
    groups: list[list[Workers]] = []  # each group's parts, of (k+1)^p workers each
    rest = workers
    while rest:
        part = (k + 1) ** max(p for p in range(n) if (k + 1) ** p <= len(rest))
        groups.append([rest[start : start + part] for start in range(0, len(rest) - part + 1, part)])
        rest = rest[part * len(groups[-1]) :]
    wholes = [list(itertools.chain(*parts)) for parts in groups]
    first = [hyper_hypercube(whole, k) for whole in wholes]
    steps = [_side_by_side(first, t) for t in range(len(first[0]))]
    last = [[_side_by_side(cubes, t) for t in range(len(cubes[0]))]
            for cubes in ([hyper_hypercube(part, k) for part in parts] for parts in groups)]  # fmt: skip
    for t in range(1 + len(last[0])):
        step: Step = {}
        if t < len(groups) - 1:
            later = list(itertools.chain(*wholes[t + 1 :]))
            share = len(groups[t][0]) / (len(wholes[t]) + len(later))
            for m, i in enumerate(later):
                step.update({(i, part[m]): share for part in groups[t]})
            idle = [i for part in groups[t] for i in part[len(later) :]]  # averaging them too helps training
            for start in range(0, len(idle), k + 1):
                _average(idle[start : start + k + 1], step)
        for l in range(min(t, len(groups))):
            step.update(_side_by_side([last[l]], t - l - 1))
        steps.append(step)
    return steps


def base(workers: Workers, d: int, k: int) -> list[Step]:
    """d simple graphs side by side, then a hyper-hypercube across them."""
    q = len(workers) // d
    inside = [simple(workers[start * q : (start + 1) * q], k) for start in range(d)]
    across = [hyper_hypercube(workers[start::q], k) for start in range(q)]
    return [_side_by_side(graphs, t) for graphs in (inside, across) for t in range(len(graphs[0]))]


def _average(workers: Workers, step: Step) -> None:
    """Lets these workers average in this step."""
    step.update({pair: 1 / len(workers) for pair in itertools.combinations(workers, 2)})


def _side_by_side(graphs: list[list[Step]], t: int) -> Step:
    """Step t of several graphs over different workers. A graph that has ended begins again, which helps training."""
    return {pair: weight for steps in graphs if steps for pair, weight in steps[t % len(steps)].items()}
