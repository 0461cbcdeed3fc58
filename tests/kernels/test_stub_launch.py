"""Every kernel through Triton's own launcher, without a GPU: on a driver that launches nothing (stub_driver.py).

Promise, under the oldest supported Triton and the newest: pack and combine of every rule build and launch, for 0 to 5
neighbors, four pairs of types, lengths of 1, within a block, over blocks and of whole blocks, and buffers that are not
aligned (with each rule every two of these, not every three; of them every second one where LAUNCHES is 6); the
launcher gets the buffers' addresses in the kernel's order, and the grid covers them; as many kernels are built as
differ.

What a stub cannot show: that the kernels compute anything, wait for the right stream, or survive a real driver.

The functions called `stub_...` run in processes with the stub (stub_process.py).
"""

import os
from itertools import product
from typing import NamedTuple

import pytest
import stub_process
import torch
from stub_process import SHORT, results, start

from fused_dlam import rules
from fused_dlam.rules.rule import Rule

stub_process.skip_unless_possible()

import triton  # noqa: E402
from stub_passes import Passes, buffers  # noqa: E402

TYPES = list(product((torch.float32, torch.bfloat16), repeat=2))  # messages, gradients
DEGREES = range(6)
EVERY = int(os.environ.get("LAUNCHES", "3"))  # the part of the degrees that each type and length has
# Lengths, and whether the buffers start at odd elements. Triton tells lengths of 1, multiples of 16 and others apart,
# and whether addresses are multiples of 16.
FORMS = [(1, False), (127, False), (1025, False), (4096, False), (4096, True)]


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
        equations = (
            rule.whole,
            rule.halfway,
            rule.state,
            rule.H._fields,
            rule.traveled,
            self.d is not None and rule.update,
        )
        return equations, length, self.message if self.d != 0 or self.copy else None, *self[4:]


def cases(names, degrees, types, every=1):
    """every: 3 takes a third of the numbers of neighbors with each type and length, others with the next ones."""
    for name, i, (k, (n, odd)) in product(names, types, enumerate(FORMS)):
        case = Case(rules.ALL[name], n, odd, *TYPES[i], None)
        yield case
        yield from (case._replace(d=d) for d in degrees if (d + i + k + len(name)) % every == 0)
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
def test_every_rule_degree_type_and_length(stub_folder, capsys):
    halves = [list(rules.ALL)[k::2] for k in range(2)]
    arguments = [(names, list(DEGREES), list(range(len(TYPES))), EVERY) for names in halves]
    processes = [start(stub_folder, ("test_stub_launch", "stub_matrix", *a)) for a in arguments]
    found = [results(p)[0] for p in processes]
    assert found == [expected(*a) for a in arguments]
    with capsys.disabled():
        print("\n" + report(*map(sum, zip(*found, strict=True))))


def test_a_subset(found, capsys):
    """A rule without state and one with two buffers and a division; two types at d = 0 and 3."""
    assert found["subset"] == expected(*SHORT["subset"][2:])
    with capsys.disabled():
        print("\n" + report(*found["subset"]))
