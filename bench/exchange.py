"""How long one averaging step takes: all-reduce, one peer, a static exponential graph, a ring, for 1 kB to 100 MB.

    python bench/exchange.py --workers 4                                     # processes on this machine
    torchrun --nproc-per-node 4 bench/exchange.py                            # or on several machines
    sudo python bench/netlab.py --hosts 8 --rate 200mbit -- python bench/exchange.py --json exchange.json
    sudo python bench/netlab.py --hosts 4 --ranks-per-host 4 -- python bench/exchange.py --sizes 1e4,1e6,1e7

`all-reduce` is gloo's ring over one fused buffer (Horovod's algorithm); `raw one-peer` is a bare isend and irecv of
the same bytes with the same peer as `one-peer-exponential`, which is, like `exponential` and `ring`, this library's
exchange as its optimizer calls it. Where several ranks share a host there is `hierarchical one-peer` too: gradients
averaged inside the host, messages from host to host, gathered inside.

All operations take turns in each repetition and ratios are taken within it, so that what disturbs the machine for a
while disturbs them all. For small messages a repetition is a block of steps with no barrier in between. Results are
checked, and so are the library's counters, against the topology's formula. Under netlab each worker has a network
interface of its own, and what that sent is counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import launched
import torch
import torch.distributed as dist
from exchange_report import (
    ALL_REDUCE,
    HIERARCHICAL,
    LARGE,
    LIBRARY,
    ONE_PEER,
    OPERATIONS,
    RAW,
    SMALL,
    draw,
    failures,
    table,
)
from tqdm import tqdm

from fused_dlam import Topology, topology
from fused_dlam.comm.group import Alone, Group
from fused_dlam.comm.place import Place, layout
from fused_dlam.comm.transfer import Transfer
from fused_dlam.tools.plain import bytes_text

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
QUICK = (10_000, 1_000_000, 10_000_000)


class Plan(NamedTuple):
    sizes: tuple[int, ...] = SIZES  # bytes
    repeats: int = 3  # of 10 MB and more; twice as many of 1 MB, four times of the smaller ones
    buckets: int = 1  # messages into which the library's operations split each step's bytes
    deadline: float = 300.0  # seconds, of every wait

    def blocks(self, size: int, period: int) -> tuple[int, int]:
        """Repetitions, and steps in each: whole periods of the one-peer graph, except of the largest messages."""
        if size <= 100_000:
            return 4 * self.repeats, period * max(1, 12 // period)
        return self.repeats * (2 if size < LARGE else 1), period if size <= LARGE else 1


def measure(rank: int, plan: Plan) -> dict[str, Any]:
    """The figures, on every rank of the default process group. Importable: `run_workers(measure, 4, Plan())`."""
    bench = Bench(plan)
    total = sum(bench.blocks(size)[0] for size in plan.sizes)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=total, unit="repetition", disable=None if rank == 0 else True) as bar:
        rows = [row for size in plan.sizes for row in bench.measure(size, bar)]
    return {
        "workers": bench.n,
        "per_host": bench.per_host,
        "rate": int(os.environ.get("NETLAB_RATE", 0)) or None,  # bits/s of each host, where it is known
        "buckets": plan.buckets,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "rows": rows,
    }


class Bench:
    """One rank's part."""

    def __init__(self, plan: Plan):
        self.plan, self.flat = plan, Place(Group(timeout=plan.deadline), Alone())
        self.places: dict[str, Place] = {}  # of the operations in which a worker is not one rank
        self.rank, self.n = self.flat.workers.rank, self.flat.workers.size
        self.graphs = {name: topology.get(name, self.n) for name in LIBRARY}
        self.graphs[RAW] = self.graphs[ONE_PEER]
        self.operations: tuple[str, ...] = OPERATIONS[:-1]
        self.blocks = partial(plan.blocks, period=self.graphs[ONE_PEER].period)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.per_host = local if local < self.n else 1
        alone = "NETLAB_ADDR" in os.environ and self.per_host == 1
        self.interface = Path("/sys/class/net/eth0/statistics/tx_bytes") if alone else None
        if self.per_host > 1:
            where = layout(None, True)
            inside = Group(None, plan.deadline, where.local, parts=where.machines)
            across = Group(None, plan.deadline, where.across, parts=where.numbers)
            self.places[HIERARCHICAL] = Place(across, inside, splits=True, averages=True)
            self.graphs[HIERARCHICAL] = topology.get(ONE_PEER, across.size)
            self.operations = OPERATIONS

    def measure(self, size: int, bar: tqdm) -> list[dict[str, Any]]:
        """One row of figures for each operation, with messages of `size` bytes (less what is no whole shard)."""
        size = max(1, size // (4 * self.per_host)) * 4 * self.per_host
        degree = max(graph.degree(t) for graph in self.graphs.values() for t in range(graph.period))
        self.message = torch.full((size // 4,), self.rank + 1.0)
        self.reduced, self.received = torch.empty_like(self.message), torch.full((degree, size // 4), -1.0)
        width = self.per_host * -(-size // (4 * self.per_host * self.plan.buckets))  # of whole shards
        self.spans = [slice(at, at + width) for at in range(0, size // 4, width)]  # the buckets
        repeats, steps = self.blocks(size)
        if size < LARGE:  # else connecting and filling the pipes does not count
            for operation in self.operations:
                self.block(operation, 0, 1)
        blocks: dict[str, list[tuple]] = {operation: [] for operation in self.operations}
        for repeat in range(repeats):
            turn = repeat % len(self.operations)
            for operation in self.operations[turn:] + self.operations[:turn]:
                blocks[operation].append(self.block(operation, repeat * steps, steps))
            bar.set_description(bytes_text(size))
            bar.update()
        gathered: list[Any] = [None] * self.n
        dist.all_gather_object(gathered, blocks)
        # [rank, repetition, (seconds, payload, messages, wire)] for each operation
        figures = {o: torch.tensor([rank[o] for rank in gathered], dtype=torch.float64) for o in self.operations}
        return [self.row(operation, size, figures) for operation in self.operations]

    def block(self, operation: str, first: int, steps: int) -> tuple[float, ...]:
        """Runs `steps` steps and returns, per step, this rank's seconds, payload bytes, messages, bytes on the wire."""
        self.reduced.fill_(self.rank + 1)
        self.received[:, ::4096] = -1
        step = {ALL_REDUCE: self.all_reduce, RAW: self.raw}.get(operation, self.library)
        dist.barrier()
        before = self.counters()
        start = time.perf_counter()
        for t in range(first, first + steps):
            step(operation, t)
        seconds = time.perf_counter() - start
        dist.barrier()  # whoever leaves it knows that everything has arrived
        counted = [b - a for a, b in zip(before, self.counters(), strict=True)]
        self.check(operation, first + steps - 1, steps)
        return tuple(value / steps for value in (seconds, *counted))

    def all_reduce(self, _: str, t: int) -> None:
        dist.all_reduce(self.reduced)

    def raw(self, operation: str, t: int) -> None:
        peers = self.graphs[operation].peers(self.rank, t)
        works = [dist.irecv(self.received[k], j) for k, j in enumerate(peers.sources)]
        works += [dist.isend(self.message, j) for j in peers.destinations]
        for work in works:
            work.wait()

    def library(self, operation: str, t: int) -> None:
        """What the optimizer does in a step, less the arithmetic."""
        place, spans = self.places.get(operation, self.flat), self.spans
        peers = self.graphs[operation].peers(place.workers.rank, t)
        means = [place.inside.start_mean(self.reduced[s], t) for s in spans if place.averages]
        transfers = [
            Transfer(place.workers, [place.part(row[s]) for row in self.received[: len(peers.sources)]], peers, t, tag)
            for tag, s in enumerate(spans)
        ]
        for tag, (transfer, s) in enumerate(zip(transfers, spans, strict=True)):
            if means:
                means[tag].wait_received()  # the message depends on the gradient
            transfer.send(place.part(self.message[s]))
        for transfer, s in zip(transfers, spans, strict=True):
            transfer.wait_received()
            place.gather(self.received[0, s], t)
        for transfer in transfers:
            transfer.wait_sent()

    def counters(self) -> tuple[float, float, float]:
        """Payload and messages that the library's exchanges sent to other workers, or hosts; bytes on the wire."""
        groups = [place.workers for place in (self.flat, *self.places.values())]
        wire = int(self.interface.read_text()) if self.interface else 0
        return sum(g.bytes_sent for g in groups), sum(g.messages_sent for g in groups), wire

    def check(self, operation: str, step: int, steps: int) -> None:
        """That the last step brought what it had to."""
        if operation == ALL_REDUCE:
            got, expected = self.reduced[None], [self.n * (self.n + 1) / 2 * float(self.n) ** (steps - 1)]
        elif operation == HIERARCHICAL:  # each shard of each bucket is from another rank of the source
            (source,) = self.graphs[operation].peers(self.places[operation].workers.rank, step).sources
            shards = [self.received[0, s].tensor_split(self.per_host) for s in self.spans]
            got = torch.stack([torch.cat(same) for same in zip(*shards, strict=True)])
            expected = [source * self.per_host + k + 1.0 for k in range(self.per_host)]
        else:
            sources = self.graphs[operation].peers(self.rank, step).sources
            got, expected = self.received[: len(sources)], [j + 1.0 for j in sources]
        got = got[:, ::4096]
        if not torch.allclose(got, torch.tensor(expected)[:, None].expand_as(got)):
            raise RuntimeError(f"rank {self.rank}: {operation} brought {got} at step {step}, not {expected}")

    def row(self, operation: str, size: int, figures: dict[str, torch.Tensor]) -> dict[str, Any]:
        repeats, steps = self.blocks(size)
        seconds = {o: f[:, :, 0].amax(0).tolist() for o, f in figures.items()}  # the slowest rank's
        payload, messages, wire = figures[operation][:, :, 1:].mean((0, 1)).tolist()
        if operation == ALL_REDUCE:  # a ring's
            expected, messages = 2 * (self.n - 1) / self.n * size, 2 * (self.n - 1)
            card = expected
        else:
            graph, together = self.graphs[operation], self.per_host if operation == HIERARCHICAL else 1
            expected = size / together * statistics.fmean(graph.degree(t) for t in range(repeats * steps))
            card = size * card_load(graph, self.per_host // together)
        if operation not in (ALL_REDUCE, RAW) and abs(payload - expected) > 1e-6 * expected:
            raise RuntimeError(f"{operation}: counted {payload} bytes per step, but the topology says {expected}")
        mine = seconds[operation]
        return {
            "operation": operation,
            "size": size,
            "seconds": statistics.median(mine),  # per step: median over repetitions of the slowest rank
            "least": min(mine),
            "most": max(mine),
            "median_rank": figures[operation][:, :, 0].quantile(0.5, 0).median().item(),
            "repeats": repeats,
            "steps": steps,
            "payload": expected,  # bytes per step and rank
            "messages": messages if operation != RAW else 1,
            "wire": wire if self.interface else None,  # bytes per step and interface, with one barrier per block
            "card": card,  # bytes per step that a network card has to send
            "to_all_reduce": statistics.median(a / b for a, b in zip(mine, seconds[ALL_REDUCE], strict=True)),
            "to_raw": statistics.median(a / b for a, b in zip(mine, seconds[RAW], strict=True)),
        }


def card_load(graph: Topology, per_host: int) -> float:
    """Messages per step that leave the busiest host, where `per_host` ranks share a network card."""

    def leaving(host: int, t: int) -> int:
        ranks = range(host * per_host, (host + 1) * per_host)
        return sum(j not in ranks for i in ranks for j in graph.peers(i, t).destinations)

    hosts = range(graph.n // per_host)
    return statistics.fmean(max(leaving(host, t) for host in hosts) for t in range(graph.period))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workers", type=int, help="start this many processes here (default: the ranks that a launcher started)")
    add("--sizes", type=lambda text: tuple(int(float(s)) for s in text.split(",")), help="bytes, such as 1e4,1e6")
    add("--repeats", type=int, help="repetitions from 10 MB on (default 3); smaller ones get more")
    add("--quick", action="store_true", help="10 kB, 1 MB and 10 MB, and one repetition")
    add("--buckets", type=int, default=1, help="split the library's steps into this many messages")
    add("--timeout", type=float, default=300.0, help="seconds that a wait may take")
    add("--json", metavar="FILE")
    add("--picture", metavar="FILE", help="time over message size (needs matplotlib)")
    add("--gate", action="store_true", help="exit with 1 if a ratio exceeds its margin; for 8 hosts, or 4 of 4 ranks")
    options = parser.parse_args(argv)
    options.sizes = options.sizes or (QUICK if options.quick else SIZES)
    options.repeats = options.repeats or (1 if options.quick else 3)
    if min(options.sizes) < 4 or options.repeats < 1 or options.buckets < 1:
        parser.error("sizes are at least 4 bytes; repeats and buckets at least 1")
    launched.check(parser, options.workers)
    if options.gate and (SMALL not in options.sizes or max(options.sizes) < LARGE):
        parser.error(f"--gate needs the sizes {SMALL} and at least {LARGE}")
    if options.gate and (options.workers or int(os.environ["WORLD_SIZE"]) < 8 or "NETLAB_RATE" not in os.environ):
        parser.error("--gate is for 8 ranks or more at a limited rate: bench/netlab.py --hosts 8 --rate 200mbit")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    plan = Plan(options.sizes, options.repeats, options.buckets, options.timeout)
    rank, _, result = launched.run(measure, options.workers, plan, timeout=options.timeout)
    if rank:
        return 0
    print(table(result), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.picture:
        draw(result, options.picture)
    failed = failures(result) if options.gate else []
    for line in failed:
        print(f"GATE {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
