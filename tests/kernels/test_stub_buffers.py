"""Buffers and streams of the launcher, on a driver that launches nothing (stub_driver.py).

Promises, under the oldest supported Triton and the newest: messages in one tensor or in rows anywhere reach the kernel;
buffers that do not fit are refused, also after those that do; a stream waits once for the scalars that another set.

The functions called `stub_...` run in processes with the stub (stub_process.py).
"""

import contextlib
from itertools import product

import stub_process
import torch

from fused_dlam import rules

stub_process.skip_unless_possible()

from stub_passes import Passes, buffers  # noqa: E402


def stub_addresses(stub):
    """Stacked messages, rows of them and parts of longer ones, at a second address too: what is kept is the form."""
    p, launched = Passes(stub, rules.da_dmsgd, 1040), 0
    for pad, shift in product((0, 1, 16), (0, 16, 48, 48)):
        stacked = torch.zeros(3, 2, p.n + pad + 48)[:, :, shift : shift + p.n]
        p.rows = tuple(row for r in stacked for row in r)
        p.pack(stacked[0])
        for received, d in product((stacked, tuple(stacked), [list(r) for r in stacked]), (3, 2)):
            p.combine(d, received)
            launched += 1
    return launched


def test_rows_anywhere_arrive(found):
    assert found["addresses"] == 3 * 3 * 2 * 4


def stub_low(stub):
    """A low parameter comes after the copies, or alone; the same buffers as copies are another launch."""
    p, low, other = Passes(stub, rules.dsgd, 1040), *buffers(1040, 2, torch.bfloat16)
    for d in (0, 1, 1):
        for copies, read in (((low,), None), ((), low), ((low,), low), ((p.copy, low), low), ((low, other), None)):
            p.pack(low=read)
            p.combine(d, copies=copies, low=read)
    return True


def test_low_parameters_arrive(found):
    assert found["low"] is True


def stub_wrong(stub):
    """Which of the wrong buffers are refused, and that the right ones still launch."""
    p, n = Passes(stub, rules.dmsgd, 1024), 1024
    p.pack()
    p.combine(2, copies=(p.copy,))
    x, g, s, rows = p.x, p.g, p.state, tuple((row,) for row in p.rows[:2])
    wide = torch.zeros(2 * n)
    wrong = {
        "type of x": (x.double(), g, s, rows, ()),
        "type of g": (x, g.double(), s, rows, ()),
        "type of a message": (x, g, s, (rows[0], (rows[1][0].half(),)), ()),
        "type of a copy": (x, g, s, rows, (x.int(),)),
        "length of x": (x[:-1], g, s, rows, ()),
        "length of g": (x, wide, s, rows, ()),
        "length of the state": (x, g, (wide,), rows, ()),
        "length of a message": (x, g, s, (rows[0], (wide,)), ()),
        "length of a copy": (x, g, s, rows, (p.copy[:-16],)),
        "stride": (x, wide[::2], s, rows, ()),
        "shape": (x, g[None], s, rows, ()),
        "no state": (x, g, (), rows, ()),
        "state too many": (x, g, (x, *s), rows, ()),
        "a message too few": (x, g, s, rows[:1], ()),
        "a message too many": (x, g, s, (rows[0], (x, x)), ()),
    }
    accepted, before = [], stub.launches
    for what, (*arguments, copies) in wrong.items():
        for _ in range(2):
            with contextlib.suppress(TypeError, ValueError):
                p.passes.combine(*arguments, copies)
                accepted.append(what)
    assert stub.launches == before
    p.combine(2, copies=(p.copy,))
    return accepted, len(wrong)


def test_wrong_buffers_are_refused_after_right_ones(found):
    assert found["wrong"] == [[], 15]


def stub_streams(stub):
    """Events of passes that think they are on GPU 1: set on stream a, then packs on a, b, b, and c while captured."""

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            told.append(f"{self.name} waits for {event}")

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            return f"values of {self.name}"

    @contextlib.contextmanager
    def device(index):
        told.append(f"on {index}")
        yield

    told, streams = [], {name: Stream(name) for name in "abc"}
    p = Passes(stub, rules.dsgd, 1024)
    p.passes.device, p.passes._index = torch.device("cuda", 1), 1
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda.device, torch.cuda.current_device = device, lambda: current
    torch.cuda.current_stream = lambda device: streams[name]
    torch.cuda.is_current_stream_capturing = lambda: name == "c"
    name, current = "a", 1
    p.set(1)
    p.pack()
    for name in "bb":  # noqa: B007 - read by torch.cuda.current_stream above
        p.pack()
    current, name = 0, "c"
    p.pack()
    name = "b"
    p.set(1, lr=0.2)
    p.pack()
    return told


def test_streams_wait_for_the_scalars_once(found):
    assert found["streams"] == [
        *["on 1", "b waits for values of a"],  # b's second pass does not wait again
        *["on 1", "on 1"],  # c is captured: no event may come from outside; and the launch is on the kernels' device
        *["b waits for a", "on 1"],  # its old values may still be read there
    ]
