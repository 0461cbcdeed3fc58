"""Promises of `optimizer.close()`, for 2 and 4 gloo workers.

- Parameters stay as they are, bit for bit; step() and every other exchange raise RuntimeError at once, on all ranks.
- A new optimizer over the same parameters works, and goes on from the closed one's state_dict.
- Threads and files are given back, by close() and by deletion: after 8 optimizers there are as many as after 3.
"""

import functools

import join_workers as workers
import pytest
import torch
from workers import run_together

KINDS = [
    ("pc-dmsgd", {}),
    ("pc-dmsgd", {"schedule": "awc"}),
    ("pmsgd", {}),
    ("sgd", {}),
    ("sgd", {"schedule": "awc"}),
]
MACHINES = ("pc-dmsgd", {"hierarchical": True})
CASES = [(2, kind, ("close", "delete")[k % 2], options) for k, (kind, options) in enumerate(KINDS)]
CASES += [(4, *MACHINES[:1], how, MACHINES[1]) for how in ("close", "delete")]


@functools.cache
def results(n):
    calls = {f"{c[1:]}": (workers.in_a_row, *c[1:]) for c in CASES if c[0] == n}
    if n == 2:
        calls |= {f"{kind} {options}": (workers.closed, kind, options) for kind, options in KINDS}
    return run_together(n, calls, deadline=200)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_and_files_are_given_back(case):
    for after_3, after_8, x, _ in results(case[0])[f"{case[1:]}"]:
        assert x.isfinite().all()
        assert after_8[0] <= after_3[0] + 1 and after_8[1] <= after_3[1] + 1


@pytest.mark.parametrize("kind, options", KINDS, ids=str)
def test_a_closed_optimizer_is_closed_and_a_new_one_works(kind, options):
    for same, told, path in results(2)[f"{kind} {options}"]:
        assert same and path.isfinite().all()
        assert all("was closed" in text for text in told), told
        assert not torch.equal(path[0], path[-1])


def test_one_worker():
    optimizer = workers.build("dmsgd", [torch.nn.Parameter(torch.ones(2))], {})
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()
