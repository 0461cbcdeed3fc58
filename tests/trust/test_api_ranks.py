"""Promises about two ranks that do not do the same, drawn at random and run by real processes:

- what the ranks must share and do not is a ValueError on both, in the same words, from the constructor,
  `add_param_group` and `load_state_dict`; afterwards the next optimizer works;
- what is bad on one rank alone is a ValueError or TypeError there, and on the other one too, or an ExchangeError when
  its timeout is over;
- what both do alike works on both. Nothing hangs.

    FUZZ_EXAMPLES=100000 pytest tests/trust/test_api_ranks.py -m slow -n0
"""

import pytest
from api_examples import TOTAL
from api_workers import BAD, TIMEOUT, drawn, run_drawn

from fused_dlam.tools.launch import run_workers

#: What may be the same by two names: "auto" is "atc" for most methods. `Gossip` has not all of these options.
OWN = {"schedule"}


def hold(seeds):
    zero, one = run_workers(run_drawn, 2, seeds, deadline=60 + 8.0 * len(seeds))
    wrong = []
    for seed in seeds:
        options, differ, bad, _ = drawn(seed)
        for ours, theirs in zip(zero[seed], one[seed], strict=False):
            (name, kind, text, took), (_, other, their_text, their_time) = ours, theirs
            where = f"seed {seed} {options} differ in {differ!r}, bad {bad!r}: {ours} against {theirs}"
            if max(took, their_time) > TIMEOUT + 6:
                wrong.append(f"too long: {where}")
            if bad and name == "constructor":
                fine = {kind, other} <= {"ValueError", "TypeError", "ExchangeError"}
                if not fine and options[0].get("kind") != "Gossip":
                    wrong.append(where)
            elif kind != other or kind not in ("", "ValueError"):
                wrong.append(where)
            elif kind and text != their_text and name != "load another" and differ != "kind":  # each has its own advice
                wrong.append(f"in other words: {where}")
        names = [said[0] for said in zero[seed]]
        if len(zero[seed]) != len(one[seed]):
            wrong.append(f"seed {seed}: {names} against {[said[0] for said in one[seed]]}")
        for name, kind, _, _ in zero[seed]:
            if name in ("add another", "load another") and not kind:
                wrong.append(f"seed {seed}: {name} was taken")
        if differ and differ not in OWN and "Gossip" not in {o.get("kind") for o in options} and not zero[seed][0][1]:
            wrong.append(f"seed {seed}: the constructor took {options}, which differ in {differ}")
    assert not wrong, "\n".join(wrong[:20]) + f"\n({len(wrong)} in all)"


def test_a_few():
    assert set(BAD) <= set(drawn.__globals__["CHOICES"])
    hold(range(1, 26))


@pytest.mark.slow
def test_many():
    count = max(25, TOTAL // 50)
    for first in range(100, 100 + count, 100):
        hold(range(first, min(first + 100, 100 + count)))
