"""The Triton kernels on one GPU, in under four minutes: correct first, then how fast, against copy and torch's own.

    python bench/gpu.py --json bench/results/gpu.json
    TRITON_INTERPRET=1 python bench/gpu.py --device cpu --sizes 5000      # the same program without a GPU: no times

1. every rule's pack and combine against float64, and the message that combine recomputes against the one pack wrote
2. device-to-device copy (the roof) and torch's fused SGD interleaved with pack and combine, at 25.5M, 300M and 1B
   parameters: GB/s by the bytes a pass must move, and the share of the copy's rate
3. the step (pack + combine) against well-written in-place torch
4. block, warps and eviction hints
5. host time per step of five buckets, eager and as a CUDA graph

--gate exits with 1 if combine is below 90% of the copy at the smallest size or the step less than twice as fast as
in-place torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from fused_dlam.kernels import rules
from fused_dlam.kernels.backend import Scalars
from fused_dlam.kernels.triton_passes import BLOCK, WARPS, Fused

SHOWN = ("decentlam", "pc-dmsgd")
TYPES = (torch.float32, torch.bfloat16)


class Buffers:
    """Flat buffers of one bucket with d received messages."""

    def __init__(self, rule, n: int, d: int, wire=torch.float32, device="cuda", seed=0):
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(*shape, dtype=torch.float32):
            return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

        self.n, self.d, self.rule = n, d, rule
        self.x, self.g = draw(n), draw(n)
        self.state = tuple(draw(n) for _ in rule.state)
        self.messages = torch.zeros(rule.messages, n, dtype=wire, device=device)
        self.received = draw(d, rule.messages, n, dtype=wire)
        h = rule.scalars(0.01, 0.9, 1e-4, 0.5)
        self.scalars = Scalars(h, tuple(1 / (d + 1) for _ in range(d)))

    def passes(self, fused: Fused) -> tuple[Callable, Callable]:
        fused.set(self.scalars)
        return (
            lambda: fused.pack(self.x, self.g, self.state, self.messages),
            lambda: fused.combine(self.x, self.g, self.state, self.received),
        )

    def floor(self) -> tuple[int, int]:
        """Bytes per parameter that pack and combine must move: what the rule's equations use, once."""
        from fused_dlam.kernels.gate_floor import combine_floor, pack_floor

        wire = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.messages.dtype]
        return pack_floor(self.rule, "fp32", wire).bytes, combine_floor(self.rule, "fp32", wire, self.d).bytes


def check(device: str, n: int = 40_003) -> float:
    """The largest error against float64 of all rules, relative; AssertionError if one is beyond a few roundings."""
    worst = 0.0
    for rule in rules.ALL.values():
        for d in (1, 3):
            for wire in TYPES:
                b = Buffers(rule, n, d, wire, device)
                pack, combine = b.passes(Fused(rule, device))
                x, g, r = b.x.double(), b.g.double(), b.received.double()
                s = rule.State(*(t.double() for t in b.state))
                own = rule.send.fn(x, g, s, b.scalars.h)
                pack()
                for k, y in enumerate(own):
                    torch.testing.assert_close(b.messages[k], y.to(wire), rtol=2**-7 if wire in TYPES[1:] else 1e-5,
                                               atol=1e-5)  # fmt: skip
                q = [b.messages[k].double() for k in range(len(own))]
                weights = b.scalars.weights
                pull = tuple(sum(w * (r[j, k] - q[k]) for j, w in enumerate(weights)) for k in range(len(own)))
                new_x, new_s = rule.update.fn(x, g, s, pull, b.scalars.h)
                combine()
                for got, wanted in zip((b.x, *b.state), (new_x, *new_s), strict=True):
                    error = (got.double() - wanted).abs().max().item() / wanted.abs().max().item()
                    # A message recomputed with another rounding would show as a bfloat16 step, 2^-9.
                    assert error < 5e-6, (rule.name, d, wire, error)
                    worst = max(worst, error)
    return worst


def in_place_torch(b: Buffers) -> Callable[[], None]:
    """DecentLaM as one would write it in torch with care: in place, alpha=, on flat buffers; d = 1."""
    h, (w,) = b.scalars.h, b.scalars.weights
    x, g, (m,), r, y = b.x, b.g, b.state, b.received[0, 0], b.messages[0]
    pull = torch.empty_like(x)

    def step():
        torch.add(g, x, alpha=h.weight_decay, out=pull)
        m.mul_(h.momentum).add_(pull)
        torch.add(x, pull, alpha=-h.lr, out=y)
        torch.sub(r, y, out=pull).mul_(w)
        x.add_(m, alpha=-h.lr).add_(pull)
        m.add_(pull, alpha=-h.inverse_lr)

    return step


def timed(ways: dict[str, Callable], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of each, all in turn in every round; the L2 cache is flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 3):
        for name, run in ways.items():
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


def measure(n: int) -> list[dict]:
    """Copy, torch's fused SGD and the passes at one size, d = 1 and 3, both message types."""
    rows = []
    for method in SHOWN:
        rule = rules.ALL[method]
        for d, wire in ((1, torch.float32), (3, torch.float32), (1, torch.bfloat16)):
            if n * 4 * (6 + d) > 0.8 * torch.cuda.mem_get_info()[0]:
                print(f"  {method}, d = {d}, {wire}: not enough memory for {n:,} parameters")
                continue
            b = Buffers(rule, n, d, wire)
            pack, combine = b.passes(Fused(rule))
            other = torch.empty_like(b.x)
            m = torch.zeros_like(b.x)

            def sgd(b=b, m=m):
                torch._fused_sgd_([b.x], [b.g], [m], weight_decay=1e-4, momentum=0.9, lr=0.01, dampening=0.0,
                                  nesterov=False, maximize=False, is_first_step=False)  # fmt: skip

            ways = {
                "copy": lambda b=b, o=other: o.copy_(b.x),
                "torch SGD fused": sgd,
                "pack": pack,
                "combine": combine,
                "step": lambda p=pack, c=combine: (p(), c()),
            }
            if method == "decentlam" and d == 1 and wire == torch.float32:
                ways["in-place torch"] = in_place_torch(b)
            floor = dict(zip(("pack", "combine"), b.floor(), strict=True))
            bytes_ = {"copy": 8, "torch SGD fused": 20, **floor, "step": sum(floor.values())}
            ms = timed(ways)
            roof = 8 * n / ms["copy"]
            for name, t in ms.items():
                rate = bytes_.get(name, 0) * n / t
                rows.append({"n": n, "rule": method, "d": d, "messages": str(wire), "what": name, "ms": t,
                             "GB/s": rate / 1e6, "share of copy": rate / roof})  # fmt: skip
            del b, other, m, ways, pack, combine
            torch.cuda.empty_cache()
    return rows


def sweep(n: int) -> list[dict]:
    """combine of PC-DmSGD, d = 1, by block, warps and eviction hint."""
    rule = rules.pc_dmsgd
    b = Buffers(rule, n, 1)
    shapes = ((512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8))
    settings = [(block, warps, evict) for block, warps in shapes for evict in ("", "evict_first")]
    ways = {s: b.passes(Fused(rule, block=s[0], warps=s[1], evict=s[2]))[1] for s in settings}
    return [{"block": s[0], "warps": s[1], "evict": s[2], "ms": t} for s, t in timed(ways).items()]


def host(n: int, count: int = 5) -> dict[str, float]:
    """Microseconds of host time per step of five buckets, eager and replayed; the replay's parameters must agree."""
    rule = rules.pc_dmsgd
    fused = Fused(rule)
    several = [Buffers(rule, n // count // BLOCK * BLOCK, 1, seed=k) for k in range(count)]

    def step():
        for b in several:
            fused.pack(b.x, b.g, b.state, b.messages)
        for b in several:
            fused.combine(b.x, b.g, b.state, b.received)

    fused.set(several[0].scalars)
    step()
    torch.cuda.synchronize()
    kept = [t.clone() for b in several for t in (b.x, *b.state)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for t, k in zip((t for b in several for t in (b.x, *b.state)), kept, strict=True):
        t.copy_(k)
    # Another learning rate reaches a captured graph through the scalars' tensor.
    fused.set(several[0].scalars._replace(h=rule.scalars(0.02, 0.9, 1e-4, 0.5)))
    graph.replay()
    replayed = [b.x.clone() for b in several]
    for t, k in zip((t for b in several for t in (b.x, *b.state)), kept, strict=True):
        t.copy_(k)
    step()
    assert all(torch.equal(b.x, r) for b, r in zip(several, replayed, strict=True)), "the graph computes otherwise"
    out = {}
    for name, run in (("eager", step), ("graph", graph.replay)):
        times = []
        for _ in range(50):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        out[name] = 1e6 * statistics.median(times)
    return out


def table(rows: list[dict]) -> None:
    for row in rows:
        print("  " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v!s:<15}" for k, v in row.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", type=float, nargs="+", default=[25_554_944, 300e6, 1e9])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gate", action="store_true")
    options = parser.parse_args(argv)
    sizes = [int(n) // BLOCK * BLOCK or BLOCK for n in options.sizes]
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU, interpreted"
    record: dict = {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "block": BLOCK,
        "warps": WARPS,
    }
    print(", ".join(f"{k} {v}" for k, v in record.items()))
    start = time.perf_counter()
    record["error"] = check(options.device, 40_003 if options.device == "cuda" else sizes[0] + 3)
    print(f"correct: every rule within {record['error']:.1e} of float64 ({time.perf_counter() - start:.0f} s)")
    if options.device != "cuda":
        return 0
    record["passes"] = []
    for n in sizes:
        print(f"{n:,} parameters ({time.perf_counter() - start:.0f} s)")
        rows = measure(n)
        table(rows)
        record["passes"] += rows
    record["sweep"], record["host_us"] = sweep(sizes[0]), host(sizes[0])
    print("sweep")
    table(record["sweep"])
    print(f"host time per step of 5 buckets, us: {record['host_us']}")
    first = {(r["rule"], r["d"], r["messages"], r["what"]): r for r in record["passes"] if r["n"] == sizes[0]}
    key = ("decentlam", 1, "torch.float32")
    share = min(r["share of copy"] for k, r in first.items() if k[3] == "combine")
    faster = first[(*key, "in-place torch")]["ms"] / first[(*key, "step")]["ms"]
    verdicts = [(share >= 0.9, f"combine at {share:.2f} of the copy's rate, at least 0.90"),
                (faster >= 2.0, f"step {faster:.2f} times as fast as in-place torch, at least 2.00")]  # fmt: skip
    for holds, text in verdicts:
        print(f"{'holds' if holds else 'FAILS'}  {text}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if options.gate and not all(holds for holds, _ in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
