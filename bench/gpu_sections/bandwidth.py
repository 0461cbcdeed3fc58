"""How fast the passes move memory, against a device-to-device copy of the same size in the same minute.

Bytes are the floor: what the equations must read and write, once. Every round runs all ways in turn, so that a clock
that sinks sinks for all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fused_dlam import rules
from fused_dlam.kernels.gate.floor import combine_floor, pack_floor
from fused_dlam.kernels.triton_passes import TritonPasses
from fused_dlam.rules.rule import Rule
from fused_dlam.rules.scalars import Scalars

from . import in_place
from .compile import SHAPES
from .device import DEVICE, SMOKE, device_ms, free, host_us
from .record import Record

SIZES = (2048,) if SMOKE else (25_554_944, 300_000_256, 1_000_000_512)
ROUNDS = {25_554_944: 20, 300_000_256: 12}
DEGREES = (0, 1, 2, 3, 5)
COPY, STEP, AWC = 0.92, 2.1, 3.1  # what is to be reached
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Flat:
    """One bucket's buffers at the largest number of neighbors that fits; passes of all rules share them."""

    def __init__(self, n: int):
        generator = torch.Generator(device=DEVICE).manual_seed(0)

        def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
            return torch.empty(*shape, device=DEVICE, dtype=dtype).normal_(generator=generator)

        self.n, self.degrees = n, list(DEGREES)
        if not SMOKE:  # bytes: x, g, a temporary, two states and torch's momentum in float32, a message in each type
            room = 0.93 * torch.cuda.mem_get_info()[0] / n - (6 * 4 + 4 + 2)
            self.degrees = [d for d in DEGREES if 6 * d <= room]
        most = max(self.degrees)
        self.x, self.g, self.other = draw(n), draw(n), draw(n)
        self.state = (draw(n), draw(n))
        types = (torch.float32, torch.bfloat16)
        self.messages = {t: draw(1, n, dtype=t) for t in types}
        self.received = {t: draw(most, 1, n, dtype=t) for t in types}

    def passes(
        self, rule: Rule, d: int, wire: torch.dtype, copies: bool = False, **shape
    ) -> dict[str, Callable[[], None]]:
        fused = TritonPasses(rule, DEVICE, **shape)
        fused.set(scalars(rule, d))
        state, message, received = self.state[: len(rule.state)], self.messages[wire], self.received[wire]
        out = {"copies": (message[0],)} if copies else {}

        def step() -> None:
            fused.pack(self.x, self.g, state, message)
            fused.combine(self.x, self.g, state, received)

        return {
            "pack": lambda: fused.pack(self.x, self.g, state, message),
            "combine": lambda: fused.combine(self.x, self.g, state, received, **out),
            "step": step,
        }


def scalars(rule: Rule, d: int) -> Scalars:
    return Scalars(rule.scalars(1e-3, 0.9, 1e-4, 0.5), (1 / (d + 1),) * d)


def measure(record: Record, n: int) -> None:
    b = Flat(n)
    left_out = [d for d in DEGREES if d not in b.degrees]
    if left_out:
        record.line(f"{n:,} parameters: no memory for d = {', '.join(map(str, left_out))}")
    ways: dict[tuple, tuple[Callable[[], None], float]] = {}  # (what, rule, d, messages) -> (run, bytes per parameter)
    ways["copy", "", 0, ""] = (lambda: b.other.copy_(b.x), 8)
    p = torch.nn.Parameter(b.x)
    p.grad = b.g
    sgd = torch.optim.SGD([p], lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    ways["torch SGD fused", "", 0, ""] = (sgd.step, 20)
    lam = rules.decentlam
    h, full = scalars(lam, 1).h, torch.float32
    r, y = b.received[full][0, 0], b.messages[full][0]
    for few in (False, True):
        name = "in-place torch" + (", fewest words" if few else "")
        ways[name, "decentlam", 1, "fp32"] = (
            in_place.atc(b.x, b.g, b.state[0], r, y, b.other, h, 0.5, few),
            84 if few else 92,
        )
        ways[f"{name}, awc", "decentlam", 1, "fp32"] = (
            in_place.awc(b.x, b.g, b.state[0], r, y, b.other, h, 0.5, few), 72 if few else 80
        )  # fmt: skip
    for rule in (lam, rules.pc_dmsgd):
        for d in b.degrees:
            for wire, short in SHORT.items():
                if rule is lam and (d, short) not in ((1, "fp32"), (3, "fp32"), (1, "bf16")):
                    continue
                pack = pack_floor(rule, "fp32", short).bytes
                combine = combine_floor(rule, "fp32", short, d).bytes
                floors = {"pack": pack, "combine": combine, "step": pack + combine}
                for what, run in b.passes(rule, d, wire).items():
                    if what == "combine" or d == 1:
                        ways[what, rule.name, d, short] = (run, floors[what])
        if 1 in b.degrees:
            ahead = rule.under("awc")
            floor = combine_floor(ahead, "fp32", "fp32", 1).bytes
            ways["awc", rule.name, 1, "fp32"] = (b.passes(ahead, 1, full)["combine"], floor)
            floor = combine_floor(ahead, "fp32", "bf16", 1).bytes + 2
            run = b.passes(ahead, 1, torch.bfloat16, copies=True)["combine"]
            ways["awc with the next message", rule.name, 1, "bf16"] = (run, floor)
    ms = device_ms({k: run for k, (run, _) in ways.items()}, ROUNDS.get(n, 8))  # type: ignore[misc]
    report(record, n, ways, ms)  # type: ignore[arg-type]


def report(record: Record, n: int, ways: dict, ms: dict[tuple, float | None]) -> None:
    copy = ms["copy", "", 0, ""]
    if copy is None:
        return
    share = {}
    for key, (_, moved) in ways.items():
        what, rule, d, messages = key
        t = ms[key]
        share[key] = (moved / t) / (8 / copy)
        record.row(
            f"{n:,} parameters",
            what=what, rule=rule, d=d, messages=messages, ms=t, gb_per_s=moved * n / t / 1e6, of_copy=share[key],
        )  # fmt: skip
    combines = {k: v for k, v in share.items() if k[0] == "combine"}
    worst = min(combines, key=lambda k: combines[k])
    size = f"{n / 1e6:,.0f}M"
    record.goal(f"{size}: combine, share of copy (worst: {worst[1]} d {worst[2]} {worst[3]})", combines[worst], COPY)

    def of(what: str) -> tuple:
        return what, "decentlam", 1, "fp32"

    def faster(few: str) -> tuple[float, float]:
        return ms[of(f"in-place torch{few}")] / ms[of("step")], ms[of(f"in-place torch{few}, awc")] / ms[of("awc")]

    step, awc = faster("")
    record.goal(f"{size}: step, times as fast as in-place torch", step, STEP)
    record.goal(f"{size}: AWC's one pass, times as fast as in-place torch", awc, AWC)
    step, awc = faster(", fewest words")
    record.line(
        f"{size}: copy {8 * n / copy / 1e6:,.0f} GB/s; share of it: pack {share[of('pack')]:.2f},"
        f" combine {share[of('combine')]:.2f}, awc {share[of('awc')]:.2f},"
        f" torch SGD {share['torch SGD fused', '', 0, '']:.2f};"
        f" torch in fewest words is {step:.2f}, {awc:.2f} times slower"
    )


def sweep(record: Record, n: int) -> None:
    """combine of PC-DmSGD with one neighbor, by block and warps."""
    b = Flat(n)
    shapes = SHAPES[:2] if SMOKE else SHAPES
    ways = {s: b.passes(rules.pc_dmsgd, 1, torch.float32, block=s[0], warps=s[1])["combine"] for s in shapes}
    times = device_ms(ways, 15)  # type: ignore[arg-type]
    if SMOKE:
        return
    for (block, warps), t in times.items():
        record.row("block and warps", block=block, warps=warps, ms=t)
    best, used = min(times, key=lambda s: times[s]), (1024, 4)
    record.line(
        f"best of {len(times)} launch shapes: block {best[0]}, {best[1]} warps,"
        f" {times[used] / times[best]:.3f} times as fast as the one used"
    )
    passes = b.passes(rules.pc_dmsgd, 1, torch.float32)
    us = {name: host_us(run) for name, run in passes.items()}
    record.row("host time of a launch, us", **us)


def baselines_agree(record: Record) -> None:
    """In-place torch computes what the passes do."""
    n, rule = 2048, rules.decentlam
    for schedule in ("atc", "awc"):
        for few in (False, True):
            ours, theirs = Flat(n), Flat(n)
            h, t = scalars(rule, 1).h, theirs
            r = t.received[torch.float32][0, 0]
            if schedule == "atc":
                ours.passes(rule, 1, torch.float32)["step"]()
                in_place.atc(t.x, t.g, t.state[0], r, t.messages[torch.float32][0], t.other, h, 0.5, few)()
            else:
                ours.passes(rule.under("awc"), 1, torch.float32)["combine"]()
                in_place.awc(t.x, t.g, t.state[0], r, t.messages[torch.float32][0], t.other, h, 0.5, few)()
            pairs = ((ours.x, t.x), (ours.state[0], t.state[0]))
            off = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            record.check(
                f"in-place torch, {schedule}{', fewest words' if few else ''}, is the passes'", off < 1e-5, off
            )


def run(record: Record) -> None:
    baselines_agree(record)
    sweep(record, SIZES[0])
    for n in SIZES:
        free()
        try:
            measure(record, n)
        except torch.cuda.OutOfMemoryError as error:
            record.line(f"{n:,} parameters: {str(error)[:120]}")
        free()
