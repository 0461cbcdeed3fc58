"""The CPU update of 25.5M parameters: ours, naive torch, torch's SGD and the memory, interleaved in one run.

    python bench/cpu_update.py [--threads 1 2] [--n 25554944] [--rounds 15] [--quick] [--json FILE] [--gate]

Every round runs every contender once, so that a busy spell of the machine meets all of them; minimum and median are
kept, and ratios are between figures of the same run. One thread is timed by its own processor time, several by the
clock. GB/s counts the bytes that the update must move (reads x g m r*d, writes x m: 4 (5 + d) bytes per parameter for
DecentLaM's combine, 12 for its pack, 20 for SGD with momentum), whatever a contender really moves; the roof is
`x.add_(y, alpha=a)` over the flat buffers, 12 bytes. Where the memory has writes to spare, reading is what bounds one
core: `torch.dot` shows how fast it can read. --gate: exit status 1 if a ratio in GATES leaves its margin.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from fused_dlam import rules
from fused_dlam.kernels import numba_passes
from fused_dlam.kernels.torch_passes import TorchPasses
from fused_dlam.rules.scalars import Scalars

LR, MOMENTUM, DECAY = 0.01, 0.9, 1e-4

# (what, contender, yardstick, quantity, promise, margin): rate is bytes per second over the yardstick's, reads the same
# of bytes read, speed the yardstick's time over the contender's. The promise is what the package set out to reach; the
# margin is what --gate holds it to, below the lowest of a dozen runs (axpy itself moved from 37 to 51 GB/s between
# them) and above what a broken pass gives: plain stores 0.55 for pack, a loop not vectorized or unrolled 0.4.
GATES = [
    ("numba combine, of the roof", "numba combine", "axpy", "rate", 0.95, 0.75),
    ("numba combine's reads, of dot", "numba combine", "dot", "reads", 0.90, 0.80),
    ("numba combine, of fused SGD", "numba combine", "SGD fused", "rate", 1 / 1.35, 1 / 1.35),
    ("numba pack, of the roof", "numba pack", "axpy", "rate", 0.80, 0.70),
    ("torch combine over naive combine", "torch combine", "naive combine", "speed", 3.0, 1.4),
    ("torch combine over naive update", "torch combine", "naive both", "speed", 3.0, 1.8),
]


def resnet50_sizes(n: int) -> list[int]:
    """The sizes of ResNet-50's 161 parameters, scaled to n in all."""
    sizes, width_in = [64 * 3 * 49, 64, 64], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [width_in * width, width, width, width * width * 9, width, width]
            sizes += [width * width * 4, width * 4, width * 4]
            if block == 0:
                sizes += [width_in * width * 4, width * 4, width * 4]
            width_in = width * 4
    sizes += [2048 * 1000, 1000]
    scaled = [max(1, size * n // sum(sizes)) for size in sizes]
    scaled[-2] += n - sum(scaled)
    return scaled


class Naive:
    """DecentLaM on separate tensors, as papers' code writes it."""

    def __init__(self, sizes, d):
        self.p, self.m, self.y = ([torch.randn(k) * 0.01 for k in sizes] for _ in range(3))
        self.g = [torch.randn(k) * 0.01 for k in sizes]
        self.r = [[torch.randn(k) * 0.01 for k in sizes] for _ in range(d)]

    def pack(self, d):
        for i, (p, g) in enumerate(zip(self.p, self.g, strict=True)):
            self.y[i] = p - LR * (g + DECAY * p)

    def combine(self, d):
        w = 1 / (d + 1)
        for i, p in enumerate(self.p):
            mixed = w * self.y[i]
            for r in self.r[:d]:
                mixed = mixed + w * r[i]
            gradient = (p - mixed) / LR
            self.m[i] = MOMENTUM * self.m[i] + gradient
            p.copy_(p - LR * self.m[i])


class Foreach(Naive):
    """The same by torch._foreach, in place where that is possible."""

    def pack(self, d):
        self.y = torch._foreach_add(self.g, self.p, alpha=DECAY)
        torch._foreach_mul_(self.y, -LR)
        torch._foreach_add_(self.y, self.p)

    def combine(self, d):
        w = 1 / (d + 1)
        mixed = torch._foreach_mul(self.y, w)
        for r in self.r[:d]:
            torch._foreach_add_(mixed, r, alpha=w)
        gradient = torch._foreach_sub(self.p, mixed)
        torch._foreach_div_(gradient, LR)
        torch._foreach_mul_(self.m, MOMENTUM)
        torch._foreach_add_(self.m, gradient)
        torch._foreach_add_(self.p, self.m, alpha=-LR)


class Ours:
    """A rule's passes over flat buffers."""

    def __init__(self, backend, rule, flat, received):
        self.passes, self.rule = backend(rule), rule
        self.x, self.g, *state, self.messages = flat
        self.state, self.received = tuple(state[: len(rule.state)]), received

    def set(self, d):
        h = self.rule.scalars(LR, MOMENTUM, DECAY, rho=0.5)
        self.passes.set(Scalars(h, (1 / (d + 1),) * d))

    def pack(self, d):
        self.set(d)
        self.passes.pack(self.x, self.g, self.state, self.messages[None])

    def combine(self, d):
        self.set(d)
        self.passes.combine(self.x, self.g, self.state, self.received[:d])


def contenders(n: int, degrees) -> dict[tuple, tuple]:
    """(name, d) -> (function, bytes that the update must read and write per parameter)."""
    flat = [torch.randn(n) * 0.01 for _ in range(5)]
    received = (torch.randn(max(degrees), n) * 0.01)[:, None]
    sizes = resnet50_sizes(n)
    found: dict[tuple, tuple] = {
        ("axpy", None): (lambda: flat[0].add_(flat[1], alpha=1e-6), 8, 4),
        ("dot", None): (lambda: torch.dot(flat[0], flat[1]), 8, 0),
    }
    for name, choice in (("fused", {"fused": True}), ("foreach", {"foreach": True}), ("for-loop", {"foreach": False})):
        parameters = [torch.nn.Parameter(torch.randn(k) * 0.01) for k in sizes]
        for p in parameters:
            p.grad = torch.randn_like(p) * 0.01
        sgd = torch.optim.SGD(parameters, lr=1e-3, momentum=MOMENTUM, weight_decay=DECAY, **choice)
        found[f"SGD {name}", None] = (sgd.step, 12, 8)
    ours = {"torch": (TorchPasses, rules.decentlam)}
    if numba_passes.available():
        ours["numba"] = (numba_passes.NumbaPasses, rules.decentlam)
        ours["numba pc-dmsgd"] = (numba_passes.NumbaPasses, rules.pc_dmsgd)
    kinds = {name: Ours(*what, flat, received) for name, what in ours.items()}
    kinds.update({"naive": Naive(sizes, max(degrees)), "foreach": Foreach(sizes, max(degrees))})
    for name, kind in kinds.items():
        more = 4 if "pc-dmsgd" in name else 0  # one buffer more, and pack reads the momentum
        found[f"{name} pack", None] = (lambda kind=kind: kind.pack(1), 8 + more, 4)
        for d in degrees:
            both = lambda kind=kind, d=d: (kind.pack(d), kind.combine(d))  # noqa: E731
            found[f"{name} combine", d] = (lambda kind=kind, d=d: kind.combine(d), 12 + 4 * d + more, 8 + more)
            found[f"{name} both", d] = (both, 20 + 4 * d + 2 * more, 12 + more)
    return found


def measure(n: int, threads, degrees, rounds: int) -> list[dict]:
    found = contenders(n, degrees)
    times: dict[tuple, list[float]] = {}
    for i in range(rounds + 1):  # the first compiles and warms up
        for count in threads:
            torch.set_num_threads(count)
            clock = time.thread_time if count == 1 else time.perf_counter
            for (name, d), (function, _, _) in found.items():
                start = clock()
                function()
                if i:
                    times.setdefault((count, name, d), []).append(clock() - start)
    rows = []
    for (count, name, d), seconds in times.items():
        _, reads, writes = found[name, d]
        rate = (reads + writes) * n / min(seconds)
        rows.append(
            {
                "threads": count,
                "name": name,
                "d": d,
                "bytes_per_parameter": reads + writes,
                "min_ms": min(seconds) * 1e3,
                "median_ms": statistics.median(seconds) * 1e3,
                "gb_per_s": rate / 1e9,
                "gb_read_per_s": reads * n / min(seconds) / 1e9,
                "of_roof": rate / (12 * n / min(times[count, "axpy", None])),
            }
        )
    return rows


def gates(rows: list[dict]) -> list[dict]:
    """The ratios of GATES, by minima, on one thread; those of a backend that is not there are left out."""
    one = [row for row in rows if row["threads"] == 1]
    found = []
    for what, contender, yardstick, quantity, promise, margin in GATES:
        for row in (row for row in one if row["name"] == contender):
            other = next(other for other in one if other["name"] == yardstick and other["d"] in (None, row["d"]))
            by = {
                "rate": row["gb_per_s"] / other["gb_per_s"],
                "reads": row["gb_read_per_s"] / other["gb_read_per_s"],
                "speed": other["min_ms"] / row["min_ms"],
            }
            found.append({"what": what, "d": row["d"], "ratio": by[quantity], "promise": promise, "margin": margin})
    return found


def surroundings() -> dict:
    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "numba", "numpy")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--n", type=int, default=25_554_944)
    parser.add_argument("--d", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="4M parameters, 5 rounds: does it run; not for figures")
    parser.add_argument("--json")
    parser.add_argument("--gate", action="store_true")
    options = parser.parse_args()
    if options.quick and options.gate:
        parser.error("--gate needs the full size: smaller buffers stay in the cache")
    if options.quick:
        options.n, options.rounds = 1 << 22, 5

    before = surroundings()
    rows = measure(options.n, options.threads, options.d, options.rounds)
    held = gates(rows)
    print(", ".join(f"{key} {value}" for key, value in before.items()))
    for count in options.threads:
        print(f"\n{options.n:,} parameters, {count} thread{'s' * (count > 1)}")
        print(f"{'':28}{'d':>3}{'min ms':>9}{'median':>9}{'GB/s':>8}{'of roof':>9}")
        for row in rows:
            if row["threads"] == count:
                d = "" if row["d"] is None else row["d"]
                print(f"{row['name']:28}{d:>3}{row['min_ms']:9.1f}{row['median_ms']:9.1f}", end="")
                print(f"{row['gb_per_s']:8.1f}{row['of_roof']:9.0%}")
    print()
    for gate in held:
        what = gate["what"] + ("" if gate["d"] is None else f", d = {gate['d']}")
        kept = "kept" if gate["ratio"] >= gate["promise"] else "missed"
        fails = "  FAILS" if gate["ratio"] < gate["margin"] else ""
        print(f"{what}: {gate['ratio']:.2f}, promise {gate['promise']:.2f} {kept}, margin {gate['margin']:.2f}{fails}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"machine": before, "n": options.n, "rounds": options.rounds, "rows": rows, "gates": held},
                file,
                indent=1,
            )
            file.write("\n")
    return int(options.gate and any(gate["ratio"] < gate["margin"] for gate in held))


if __name__ == "__main__":
    sys.exit(main())
