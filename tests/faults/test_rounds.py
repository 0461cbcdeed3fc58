"""Promise, of rounds that take long and of calls of all workers in them:

- a worker that trains is thrown out by nobody, though its round takes longer than `timeout`: the others wait for it as
  long as it takes steps, and go on with it;
- a newcomer is let in, whatever calls the others make in between, also after every single step, and it costs few
  agreements; the members change after equally many steps on all of them, and all end with the same number of steps;
- where ways are averaged by all-reduce, all have equal parameters after each exchange from then on, bit for bit.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("rounds_script.py")


def run(folder, n, *arguments):
    command = [sys.executable, "-m", "fused_dlam", "run", "-n", n, "--restart", int(n == 3), SCRIPT, folder, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=150)
    print(done.stdout[-3000:], done.stderr[-6000:])
    assert done.returncode == 0
    return {i: torch.load(folder / f"{i}.pt") for i in range(n + 1) if (folder / f"{i}.pt").exists()}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["auto", "awc"])
def test_a_round_may_last_longer_than_the_timeout(tmp_path, schedule):
    ends = run(tmp_path, 4, "long", schedule, 8, 0)
    assert sorted(ends) == [1, 2, 3]
    for end in ends.values():
        assert end["members"] == (1, 2, 3) and end["taken"] == end["steps"] == 40
        assert {numbers for numbers, _ in end["told"]} == {(1, 2, 3)}
    assert len({str(end["told"]) for end in ends.values()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "every", "calls"),
    [("auto", 4, 4), ("awc", 4, 2), ("awc", 6, 5), ("auto", 4, 1), ("atc", 0, 1)],
    ids=["at-the-end", "within", "within-and-at-the-end", "in-each-step", "gossip-sgd-in-each-step"],
)
def test_a_call_keeps_no_newcomer_out(tmp_path, schedule, every, calls):
    ends = run(tmp_path, 3, "newcomer", schedule, every, calls)
    assert sorted(ends) == [1, 2, 3]
    came = {next(at for numbers, at in end["told"] if numbers == (1, 2, 3)) for end in ends.values()}
    assert len(came) == 1 and len({end["end"] for end in ends.values()}) == 1
    for end in ends.values():
        assert end["members"] == (1, 2, 3) and end["taken"] == end["steps"]
        assert len(end["events"]) <= 4, end["events"]
    if schedule == "auto":
        assert all(torch.equal(end["y"], ends[1]["y"]) for end in ends.values())
    shown = ends[3]["distances"]  # of calls that the newcomer has made, with the same result for all
    assert shown and all(end["distances"][-len(shown) :] == shown for end in ends.values())
