"""Scripts that do odd things, drawn at random and run by real worker processes.

The promise that every configuration is held against:

    with the defaults a script's result equals the same script's with overlap=False, bit for bit on CPUs;
        overlap=True likewise (parameters, gradients, what state_dict() and averaged() show, at every step)
    one worker is torch.optim.SGD, up to roundings (pc-dmsgd, dmsgd, decentlam, pmsgd, dsgd, psgd, awc-dmsgd), and
        `Gossip` with one worker is its inner optimizer
    each step's parameters are those of the method's equations in float64 (fuzz_oracle.py), from what the script has
        made of parameters, gradients and momentum right before it
    steps without gradients leave the workers' mean as it is
    equal workers stay equal, and so do those that average gradients
    nothing hangs, and nothing is raised but what fuzz_run.py lists as refusals

A failure prints the configuration in one line, and comes again from its numbers:

    python tests/trust/fuzz_run.py --n 3 --seeds 17
    FUZZ_SEEDS=5000 pytest tests/trust -m slow -n0 -s
"""

import os

import pytest
from fuzz_run import run_many

SHORT = {1: range(0, 12), 2: range(0, 8), 3: range(0, 6), 4: range(0, 4)}
SHARE = {1: 0.3, 2: 0.25, 3: 0.2, 4: 0.15, 5: 0.1}  # of the configurations of the long form


def hold(n, seeds):
    print(f"n={n} seeds {seeds.start}:{seeds.stop}")
    counts, reports = run_many(n, list(seeds))
    print(counts)
    assert not reports, "\n" + "\n".join(reports)
    assert counts.get("ok", 0) > len(seeds) / 2, counts


@pytest.mark.parametrize("n", SHORT)
def test_a_few_scripts(n):
    hold(n, SHORT[n])


@pytest.mark.slow
@pytest.mark.parametrize("n", SHARE)
def test_many_scripts(n):
    count = int(int(os.environ.get("FUZZ_SEEDS", "100")) * SHARE[n])
    hold(n, range(1000, 1000 + count))
