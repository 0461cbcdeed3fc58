"""Every kernel through Triton's own launcher, without a GPU: on a driver that launches nothing (stub_driver.py).

Promises, under the oldest supported Triton and the newest:
- pack and combine of every rule build and launch, for 0 to 5 neighbors, four pairs of types, lengths of 1, within a
  block, over blocks and of whole blocks, and buffers that are not aligned; the launcher gets the buffers' addresses
  in the kernel's order, and the grid covers them;
- as many kernels are built as differ, none for another learning rate, and after `warm` none at all;
- buffers that do not fit are refused, also after those that do.

What a stub cannot show: that the kernels compute anything, wait for the right stream, or survive a real driver.

A driver is installed for a whole process, and so processes of their own call the functions here named `stub_...`.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import traceback
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import stub_driver
import torch

from fused_dlam import rules
from fused_dlam.rules.rule import Rule
from fused_dlam.rules.scalars import Scalars

triton = pytest.importorskip("triton")
tl = triton.language
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET=1 launches nothing", allow_module_level=True)
if shutil.which(os.environ.get("CC", "cc")) is None:
    pytest.skip("needs a C compiler, as Triton does", allow_module_level=True)

from fused_dlam.kernels import triton_kernels as kernels  # noqa: E402
from fused_dlam.kernels.triton_launch import Launcher  # noqa: E402
from fused_dlam.kernels.triton_passes import Fused  # noqa: E402

TYPES = list(product((torch.float32, torch.bfloat16), repeat=2))  # messages, gradients
DEGREES = range(6)
# Lengths, and whether the buffers start at odd elements. Triton tells lengths of 1, multiples of 16 and others apart,
# and whether addresses are multiples of 16.
FORMS = [(1, False), (127, False), (1025, False), (4096, False), (4096, True)]
RATES = (0, 0.0, 1, 1.0, 0.1, 1e-30, float("inf"))
WEIGHTS = (0.3, 0.2, 0.1, 0.1, 0.1)


# -- Processes with the stub -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    stub_driver.build(folder)
    return folder


def start(folder, *calls):
    """A process that calls functions of this file, (name, arguments), with the stub."""
    command = [sys.executable, __file__, folder, json.dumps(calls)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(process):
    """What the functions returned, in their order, or why one did not."""
    out, errors = process.communicate()
    assert process.returncode == 0, out[-2000:] + errors[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found(folder):
    """What all the short functions found: one process, for it takes seconds until Triton is there."""
    return dict(zip(SHORT, results(start(folder, *SHORT.values())), strict=True))


def main(folder, calls):
    stub, found = stub_driver.install(Path(folder)), []
    for function, *arguments in json.loads(calls):
        stub.forget(kernels._pack_kernel, kernels._combine_kernel)
        try:
            found.append(globals()[function](stub, *arguments))
        except Exception:
            found.append(traceback.format_exc())
    print(json.dumps(found))


def buffers(n, count, dtype=torch.float32, odd=False):
    """Flat ones that start at multiples of 64 bytes, as on a GPU, or one element behind them."""
    step = -(-(n + odd) * dtype.itemsize // 64) * 64
    pool = torch.zeros(count * step + 64, dtype=torch.uint8)
    start = -pool.data_ptr() % 64
    rows = pool[start : start + count * step].view(dtype).view(count, -1)
    return tuple(row[odd : odd + n] for row in rows)


class Passes:
    """A rule's passes over buffers of one kind, each launch checked."""

    def __init__(self, stub, rule, n, message=torch.float32, gradient=torch.float32, odd=False):
        self.stub, self.rule, self.n = stub, rule, n
        self.x, *state, self.copy = buffers(n, len(rule.state) + 2, odd=odd)
        self.state, (self.g,) = tuple(state), buffers(n, 1, gradient, odd)
        self.rows = buffers(n, 5 * rule.messages, message, odd)
        self.passes = Fused(rule, "cpu")
        self.set(5)

    def set(self, d, lr=0.1, **more):
        self.passes.set(Scalars(self.rule.scalars(lr, 0.9, 0.0, 0.5), WEIGHTS[:d], **more))

    def launched(self, run, rows, copies=()):
        """Runs a pass, which must launch once, over as many blocks as it takes, with the buffers' addresses."""
        tensors = (self.x, self.g, *self.state, *rows, *copies, self.passes._values)
        before = self.stub.launches
        given = self.stub.addresses(run, len(tensors))
        assert self.stub.launches == before + 1
        assert self.stub.grid == -(-self.n // kernels.BLOCK)
        assert given == [t.data_ptr() for t in tensors]

    def pack(self, messages=None):
        rows = self.rows[: self.rule.messages]
        messages = rows if messages is None else messages
        self.launched(lambda: self.passes.pack(self.x, self.g, self.state, messages), rows)

    def combine(self, d, received=None, copies=(), **more):
        self.set(d, **more)
        k = self.rule.messages
        rows = self.rows[: d * k]
        received = tuple(rows[i * k : i * k + k] for i in range(d)) if received is None else received
        run = lambda: self.passes.combine(self.x, self.g, self.state, received, copies)  # noqa: E731
        self.launched(run, rows, copies)


class Case(NamedTuple):
    """One launch of the matrix."""

    rule: Rule
    n: int
    odd: bool
    message: torch.dtype
    gradient: torch.dtype
    d: int | None  # None for pack
    # combine, once more with x in the messages' type: the next message, or a 16-bit parameter; without neighbors under
    # a loss scaler, where the kernel reads whether the gradients overflowed.
    copy: bool = False

    @property
    def kernel(self):
        """Equal where the same kernel serves: for rules with the same equations and scalars, too."""
        rule, length = self.rule, (self.n == 1, self.n % 16 == 0, self.odd)
        equations = (rule.send, rule.state, rule.H._fields, self.d is not None and rule.update)
        return equations, length, self.message if self.d != 0 or self.copy else None, *self[4:]


def cases(names, degrees, types):
    for name, i, (n, odd) in product(names, types, FORMS):
        case = Case(rules.ALL[name], n, odd, *TYPES[i], None)
        yield case
        for d in degrees:
            # A length of 1 and odd addresses: types alike where d is even, mixed where it is odd.
            if not (n == 1 or odd) or (case.message == case.gradient) == (d % 2 == 0):
                yield case._replace(d=d)
        if n == 4096 and not odd:
            yield from (case._replace(d=d, copy=True) for d in (0, 1))


def stub_matrix(stub, *arguments):
    """The launches, and the builds."""
    before = stub.launches, stub.kernels
    for case in cases(*arguments):
        p = Passes(stub, case.rule, case.n, case.message, case.gradient, case.odd)
        if case.d is None:
            p.pack()
        elif case.copy:
            copies = buffers(case.n, 1, case.message, case.odd)
            p.combine(case.d, copies=copies, skip=0.0 if case.d else torch.tensor(0.0))
        else:
            p.combine(case.d)
    return stub.launches - before[0], stub.kernels - before[1]


def expected(*arguments):
    return [len(list(cases(*arguments))), len({case.kernel for case in cases(*arguments)})]


def report(launches, builds):
    return f"triton {triton.__version__} torch {torch.__version__}: {launches} launches, {builds} builds"


@pytest.mark.slow
def test_every_rule_degree_type_and_length(folder, capsys):
    halves = [list(rules.ALL)[k::2] for k in range(2)]
    arguments = [(names, list(DEGREES), list(range(len(TYPES)))) for names in halves]
    processes = [start(folder, ("stub_matrix", *a)) for a in arguments]
    found = [results(p)[0] for p in processes]
    assert found == [expected(*a) for a in arguments]
    with capsys.disabled():
        print("\n" + report(*map(sum, zip(*found, strict=True))))


def test_a_subset(found, capsys):
    """A rule without state and one with two buffers and a division; two types at d = 0 and 3."""
    assert found["subset"] == expected(*SHORT["subset"][1:])
    with capsys.disabled():
        print("\n" + report(*found["subset"]))


# -- Builds ------------------------------------------------------------------------------------------------------------


def stub_rates(stub, constant):
    """Builds over seven learning rates. constant: with a pass that takes them as a constant of the kernel."""
    p, before = Passes(stub, rules.pc_dmsgd, 4096), stub.kernels
    for lr in RATES:
        if constant:
            p.passes._combining = Launcher(_kernel_with_a_rate, {"LR": lr}, kernels.BLOCK, kernels.OPTIONS, bool)
        p.combine(1, lr=lr)
        p.pack()
    return stub.kernels - before


@triton.jit
def _kernel_with_a_rate(x_ptr, g_ptr, s_ptrs, r_ptrs, copy_ptrs, scalars_ptr, n, BLOCK: tl.constexpr,
                        LR: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) - LR * tl.load(g_ptr + offsets))


def test_another_learning_rate_builds_nothing(found):
    assert found["rates"] == 2


def test_control_a_rate_as_a_constant_is_found(found):
    assert found["constant rates"] >= 1 + len(set(RATES))


def stub_warm(stub, guard):
    """(launches while warming, builds after it for buffers and degrees that it was told of, and for others)."""
    p = Passes(stub, rules.da_dmsgd, 8192, torch.bfloat16)
    copies, skip = buffers(p.n, 2, torch.bfloat16), {"skip": torch.tensor(0.0)} if guard else {}
    launched = stub.launches
    p.passes.warm(p.x, p.g, p.state, p.rows[:2], (p.rows[:2],), (0, 1, 3), copies, guard=guard)
    launched, before = stub.launches - launched, stub.builds
    for lo, hi in ((0, 8192), (0, 1024), (2048, 4096), (16, 32), (32, 1072), (4096, 4112)):
        q = Passes(stub, p.rule, hi - lo, torch.bfloat16)
        q.x, q.g, q.state = p.x[lo:hi], p.g[lo:hi], tuple(t[lo:hi] for t in p.state)
        q.rows = tuple(row[lo:hi] for row in p.rows)
        q.pack()
        for d in (0, 1, 3):
            q.combine(d, copies=tuple(t[lo:hi] for t in copies), **skip)
    after = stub.builds
    p.combine(2, copies=copies, **skip)
    return launched, after - before, stub.builds - after


@pytest.mark.parametrize("guard", [False, True])
def test_after_warm_nothing_is_built(found, guard):
    launched, built, other = found["guarded warm" if guard else "warm"]
    assert launched == 0 and built == 0
    assert other > 0, "d = 2 was not asked for: builds are seen"


@triton.jit
def _load_with_a_default(ptr, offsets, EVICT: tl.constexpr = ""):
    return tl.load(ptr + offsets, eviction_policy=EVICT)


@triton.jit
def _kernel_with_a_default(x_ptr, g_ptr, s_ptrs, y_ptrs, scalars_ptr, n, SEND: tl.constexpr, S: tl.constexpr,
                           H: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptrs[0] + offsets, _load_with_a_default(x_ptr, offsets))


def stub_default(stub):
    p = Passes(stub, rules.dsgd, 4096)
    p.passes._packing.kernel = _kernel_with_a_default
    p.pack()


@pytest.mark.skipif(triton.__version__ >= "3.7", reason="this version of Triton takes text as a default")
def test_control_text_as_a_default_is_found(found):
    assert "CompilationError" in found["default"]


def test_no_kernel_has_defaults():
    """What the control above shows only under the oldest version, seen under every one."""
    from fused_dlam.kernels.gate import controls as gate_controls

    functions = [f for m in (kernels, gate_controls) for f in vars(m).values() if isinstance(f, triton.JITFunction)]
    assert len(functions) >= 6
    assert not [f.__name__ for f in functions if any(p.has_default for p in f.params)]


# -- Buffers -----------------------------------------------------------------------------------------------------------


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
    """Events of a Fused that takes itself to be on GPU 1: set on stream a; passes on a, b, b, and c while captured."""

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


SHORT = {
    "subset": ("stub_matrix", ["dsgd", "adamw"], [0, 3], [1]),
    "rates": ("stub_rates", False),
    "constant rates": ("stub_rates", True),
    "warm": ("stub_warm", False),
    "guarded warm": ("stub_warm", True),
    "default": ("stub_default",),
    "addresses": ("stub_addresses",),
    "wrong": ("stub_wrong",),
    "streams": ("stub_streams",),  # the last one: it replaces functions of torch.cuda
}

if __name__ == "__main__":
    main(*sys.argv[1:])
