"""The passes against float64 and against torch's, at every length and type, and where numbers end."""

from __future__ import annotations

import torch

from fused_dlam import rules
from fused_dlam.kernels.torch_passes import TorchPasses
from fused_dlam.kernels.triton_passes import TritonPasses
from fused_dlam.rules.scalars import Scalars

from .device import DEVICE, SMOKE, free
from .record import Record
from .trial import Case, Trial, cases


def run(record: Record) -> None:
    against_float64(record)
    own_message(record)
    copies(record)
    ends_of_numbers(record)
    if not SMOKE:
        graph(record)
        beyond_32_bits(record)


def against_float64(record: Record) -> None:
    worst: dict[str, tuple[float, float]] = {}
    count = faults = 0
    for case in list(cases())[:: 17 if SMOKE else 1]:
        for n, offset in case.lengths():
            if SMOKE and n > 2000:  # the interpreter runs a program in 10 ms
                continue
            count += 1
            trial = Trial(case, n, offset)
            message, result, untouched = trial.errors()
            kept = worst.get(case.wire, (0.0, 0.0))
            worst[case.wire] = max(kept[0], message), max(kept[1], result)
            if not (message <= 1 and result <= 1 and untouched):  # NaN fails
                faults += 1
                detail = f"message {message:.3g}, result {result:.3g} of the limit, untouched {untouched}"
                record.check(f"{' '.join(map(str, case))}, length {n} at {offset}", False, detail)
    record.check("all trials are within their roundings of float64", not faults, f"{faults} of {count} are not")
    for wire, (message, result) in worst.items():
        record.row("largest error, as a share of the limit", messages=wire, message=message, result=result)
    record.line(
        f"{count} trials; largest error as a share of the limit, message and result: "
        + ", ".join(f"{wire} {m:.2f} {r:.2f}" for wire, (m, r) in worst.items())
    )


def own_message(record: Record) -> None:
    """Neighbors that send what a worker sends pull nothing, bit for bit: combine recomputes the message of pack."""
    names = (*rules.ALL, "pc-dmsgd awc", "mix", "mix-ahead")
    for name in names[::5] if SMOKE else names:
        for wire in ("float32", "bfloat16"):
            case = Case(name, 2, "float32", wire)
            alone, pulled = Trial(case, 4096), Trial(case, 4096)
            pulled.pack()
            pulled.received = (pulled.messages, pulled.messages)
            pulled.combine()
            alone.fused.set(alone.scalars._replace(weights=()))
            alone.received = ()
            alone.combine()
            same = all(map(torch.equal, (alone.x, *alone.state), (pulled.x, *pulled.state)))
            record.check(f"own message of {name} in {wire} is bit-equal", same)


def copies(record: Record) -> None:
    """What combine writes beside x is x, rounded once."""
    for wire, step in (("float32", 0.0), ("bfloat16", 2.0**-7 if SMOKE else 0.0)):
        for n in (4096, 1025):
            trial = Trial(Case("pc-dmsgd awc", 1, "float32", wire), n)
            copy = trial.draw(getattr(torch, wire))
            trial.combine(copies=(copy,))
            off = (copy.float() - trial.x.to(copy.dtype).float()).abs() - step * trial.x.abs()
            record.check(f"the copy of x in {wire}, length {n}", float(off.max()) <= 0, float(off.max()))


def ends_of_numbers(record: Record) -> None:
    """NaN, infinities and denormals go where torch's passes take them."""
    ends = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-42, -1e-39, 3e38, -3e38], device=DEVICE)
    for name in ("pc-dmsgd", "decentlam", "adamw", "da-dmsgd"):
        for place in ("x", "g", "received"):
            ours, theirs = (Trial(Case(name, 1, "float32", "float32"), 1025) for _ in range(2))
            theirs.fused = TorchPasses(theirs.rule)
            theirs.fused.set(theirs.scalars)
            for trial in (ours, theirs):
                {"x": trial.x, "g": trial.g, "received": trial.received[0][0]}[place][: len(ends)] = ends
                trial.pack()
                trial.combine()
            pairs = list(
                zip((*ours.messages, ours.x, *ours.state), (*theirs.messages, theirs.x, *theirs.state), strict=True)
            )
            nan = all(torch.equal(a.isnan(), b.isnan()) for a, b in pairs)
            inf = all(
                torch.equal(a.isinf() * a.sign().nan_to_num(), b.isinf() * b.sign().nan_to_num()) for a, b in pairs
            )
            record.check(f"{name}: NaN and infinity in {place} as in torch", nan and inf, f"NaN {nan}, infinity {inf}")
    # A denormal that is flushed would make equal workers differ from torch's, and a message from its parameter.
    rule = rules.dsgd
    x = torch.full((1025,), 1e-40, device=DEVICE)
    g, message = torch.zeros_like(x), torch.zeros(1, 1025, device=DEVICE)
    fused = TritonPasses(rule, DEVICE)
    fused.set(Scalars(rule.scalars(0.1, 0.9, 0.0, 0.5), (0.5,)))
    fused.pack(x, g, (), message)
    before = x.clone()
    fused.combine(x, g, (), message[None])
    record.check("denormals are sent and kept", torch.equal(message[0], before) and torch.equal(x, before))
    # What a narrower type cannot hold becomes an infinity, as torch's conversion has it.
    for wire in (torch.float16,) if SMOKE else (torch.float16, torch.bfloat16):
        x = torch.tensor([1e6, -1e6, 65519.0, 3.4e38, -3.4e38, 6e-8, 1.0], device=DEVICE)
        g, message = torch.zeros_like(x), torch.zeros(1, len(x), dtype=wire, device=DEVICE)
        fused.pack(x, g, (), message)
        record.check(f"conversion to {wire}", torch.equal(message[0], x.to(wire)), message[0].tolist())


def graph(record: Record) -> None:
    """A captured graph of the passes takes another learning rate from the scalars' tensor at its next replay."""
    eager, replayed = (Trial(Case("pc-dmsgd", 1, "float32", "float32"), 1 << 16) for _ in range(2))
    other = eager.scalars._replace(h=eager.rule.scalars(0.25, 0.9, 0.01, 0.5))
    kept = [t.clone() for t in (replayed.x, *replayed.state)]
    replayed.pack()
    replayed.combine()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        replayed.pack()
        replayed.combine()
    for t, k in zip((replayed.x, *replayed.state), kept, strict=True):
        t.copy_(k)
    replayed.fused.set(other)
    captured.replay()
    eager.fused.set(other)
    eager.pack()
    eager.combine()
    same = all(map(torch.equal, (eager.x, *eager.state), (replayed.x, *replayed.state)))
    record.check("passes captured in a CUDA graph follow the learning rate", same)


def beyond_32_bits(record: Record, n: int = (1 << 31) + 2048) -> None:
    """DSGD over 2^31 + 2048 parameters, about 22 GB: the last ones are those that a 32-bit offset would miss."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        record.line("beyond 2^31 elements: not enough memory")
        return
    rule, half = rules.dsgd, torch.bfloat16
    x = torch.empty(n, device=DEVICE).normal_()
    g = torch.empty(n, dtype=half, device=DEVICE).normal_()
    received = torch.empty(n, dtype=half, device=DEVICE).normal_()
    message = torch.empty(n, dtype=half, device=DEVICE)
    fused = TritonPasses(rule, DEVICE)
    fused.set(Scalars(rule.scalars(0.125, 0.9, 0.0, 0.5), (0.5,)))
    for length in (n, n - 5):  # the last block full, and masked
        windows = [slice(a, a + 2048) for a in (0, n // 2, n - 4096, length - 2048)]
        before = [x[w].clone() for w in windows]
        message.zero_()
        fused.pack(x[:length], g[:length], (), message[None, :length])
        fused.combine(x[:length], g[:length], (), received[None, None, :length])
        right = True
        for window, old in zip(windows, before, strict=True):
            sent = old - 0.125 * g[window].float()
            q = sent.to(half)
            new = sent + 0.5 * (received[window].float() - q.float())
            right &= torch.equal(message[window], q) and bool((x[window] - new).abs().max() < 1e-5)
        record.check(f"{length:,} elements", right)
    record.check("nothing behind the masked end", bool((message[n - 5 :] == 0).all()))
    del x, g, received, message
    free()
