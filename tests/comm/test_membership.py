"""Promises of comm/membership.py, workers that only agree, in processes that are killed and stopped:

- killed between any two operations of its agreement, and the one to decide: the others agree all the same, and who has
  arrived counts until the next time;
- of some that decide at once one wins, and all read the same; who is not in it is told so, and may come back;
- a slow worker that is accused stays, a stopped one goes; a machine goes as one; too few is an error;
- newcomers are let in, one or two; one that dies is not, or goes at the next change; who asks in vain ends in words;
- without its store an agreement ends in words.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from membership_scenarios import OPERATIONS

import fused_dlam

ROOT = Path(fused_dlam.__file__).parents[1]
# Arrives, looks, counts newcomers, decides, reads it, and raises two numbers that only grow.
ONE_AGREEMENT = ["append", "check", "get", "add", "add", "compare_set", "get", "add", "compare_set", "add", "add"]


@pytest.fixture(scope="module")
def told():
    """{scenario: {worker: what it came to}}."""
    script = [sys.executable, Path(__file__).with_name("membership_script.py")]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run(script, capture_output=True, text=True, timeout=300, env=env)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    out = {line["name"]: {int(i): t for i, t in line["told"].items()} for line in lines}
    assert "asks again" in out, run.stderr  # the last one
    for name, workers in out.items():
        assert not [i for i, t in workers.items() if t and t["outcome"] == "hangs"], (name, workers)
    return out


def members(worker):
    return [view[1] for view in worker["views"]]


def test_killed_between_any_two_operations(told):
    deaths = [told[f"killed after {done}"] for done in range(OPERATIONS)]
    needs = next(i for i, workers in enumerate(deaths) if workers[0])
    assert deaths[needs][0]["operations"] == ONE_AGREEMENT and needs == len(ONE_AGREEMENT)
    for done, workers in enumerate(deaths):
        assert workers[2] is None and workers[1]["outcome"] == "end", (done, workers)
        if done >= needs:
            assert members(workers[0]) == members(workers[1]) == [[0, 1]], (done, workers)
        else:  # whose line is there counts until the next time, unless it came just before the death was seen
            assert workers[0] is None
            assert members(workers[1]) in ([[[1]], [[0, 1], [1]]] if done else [[[1]]]), (done, workers)
        first = workers[1]["views"][0]
        assert first[0] == 1 and first[3] == (4 if 0 in first[1] else 3)  # the largest step of who is in


def test_several_deciders(told):
    zero, one, two = (told["deciders"][i] for i in range(3))
    assert zero["views"] == one["views"] and zero["outcome"] == one["outcome"] == "end"
    if members(zero) == [[0, 1]]:
        assert two["outcome"] == "Excluded"
    else:
        assert members(zero) == [[0, 1, 2]] and two["views"] == zero["views"]


def test_who_comes_late_is_told_and_may_come_back(told):
    for workers in (told["late"], told["late, comes back"]):
        assert members(workers[0])[0] == members(workers[1])[0] == [0, 1]
        assert "went on without worker 2" in workers[2]["excluded"]
    back = told["late, comes back"]
    assert back[0]["views"][1] == back[1]["views"][1] == back[2]["views"][0] == [2, [0, 1, 3], [3], 21]
    assert back[2]["me"] == 3
    assert told["late"][2]["left"] == [True] and back[2]["left"] == [True, False]


def test_accusations(told):
    false = told["false accusation"]
    assert [members(false[i]) for i in range(3)] == [[[0, 1, 2]]] * 3
    for name in ("stopped, accused", "stopped, not accused"):
        assert members(told[name][0]) == members(told[name][2]) == [[0, 2]]
    assert told["stopped, accused"][0]["views"][0][3] == 12


def test_a_machine_goes_as_one(told):
    workers = told["machine"]
    assert members(workers[0]) == members(workers[1]) == [[0, 1]]
    assert workers[2]["outcome"] == "Excluded" and "of its machine" in workers[2]["text"] and workers[3] is None


def test_too_few(told):
    assert told["too few"][0]["outcome"] == "RunEnded"
    assert told["too few"][0]["text"] == "1 worker is left, and min_workers is 2"


@pytest.mark.parametrize("when", ["before", "in it"])
def test_without_the_store(when, told):
    for worker in told[f"store dies {when}"].values():
        assert worker["outcome"] == "RunEnded", worker
        assert "the launcher, is gone" in worker["text"] and "Restart from a checkpoint" in worker["text"]


@pytest.mark.parametrize("name", ["newcomer", "two newcomers"])
def test_newcomers(name, told):
    workers = told[name]
    new = sorted(set(workers) - {0, 1})
    for i, worker in workers.items():
        assert worker["views"] == [[1, [0, 1, *new], new, 11]], (i, worker)
    assert sorted(workers[i]["me"] for i in new) == new
    assert workers[0]["asked"] is workers[1]["asked"] is False


def test_newcomers_that_die(told):
    for i in (0, 1):
        assert told["newcomer dies asking"][i]["views"] == [[1, [0, 1], [], 11]]
        assert members(told["newcomer dies admitted"][i]) == [[0, 1, 2], [0, 1]]


def test_newcomers_in_vain(told):
    vain, nobody = told["in vain"][1], told["nobody there"][0]
    assert vain["outcome"] == "RunEnded" and "and was not" in vain["text"]
    assert nobody["outcome"] == "RunEnded" and "nothing to join" in nobody["text"]


def test_a_newcomer_asks_again(told):
    workers = told["asks again"]
    number = workers[1]["me"]
    assert number >= 2 and workers[1]["views"] == [[1, [0, number], [number], 6]] == workers[0]["views"]
