"""Promises about the building of groups, with real processes over gloo:

- without a process group a rank that a launcher started among others is refused, and an optimizer that was built too
  early is known for that;
- a rank that does not build is named, with those that did; what differs between ranks is a ValueError on all of them
  that names two ranks and both values. After either the next attempt works, in the same processes;
- machines may list their ranks in any order.
"""

import os

import beginning_workers
import pytest
from workers import run_together

MESHES = [[[1, 0], [3, 2]], [[2, 3], [0, 1]], [[3, 0], [1, 2]], [[0, 2], [3, 1]]]


@pytest.fixture(scope="module")
def fours():
    calls = {name: (getattr(beginning_workers, name),) for name in ("missing", "one_is_refused", "differences")}
    calls |= {str(rows): (beginning_workers.unsorted, rows, "dsgd") for rows in MESHES}
    return run_together(4, calls)


def test_a_missing_rank_is_named(fours):
    for rank, (first, built, again, rebuilt) in enumerate(fours["missing"]):
        assert built == rebuilt == 0.0
        for error in (first, again) if rank != 1 else ():
            kind, text = error
            assert kind == "ExchangeError" and text.startswith("rank 1 has not built its"), text
            assert "ranks 0, 2, 3 have" in text and "2 s" in text


def test_who_gave_up_waiting_is_not_named_as_missing():
    for rank, (told, met) in enumerate(run_together(3, {"x": (beginning_workers.meeting,)})["x"]):
        assert met == [0, 1, 2]
        if rank != 1:
            assert "for rank 1, which has not called it" in told[1], told


def test_a_rank_may_correct_its_mistake_while_others_wait(fours):
    assert fours["one_is_refused"] == [0.0] * 4


def test_differences_are_told_to_all(fours):
    for errors in fours["differences"]:
        assert errors == fours["differences"][0]
        for name, said in (("hierarchical", "False"), ("machines", "[[0, 1], [2, 3]]"), ("timeout", "30")):
            kind, text = errors[name]
            assert kind == "ValueError" and "rank 0 has" in text and "rank 2 has" in text and said in text, text


def test_other_ranks_are_told_to_both():
    for first, again in run_together(3, {"x": (beginning_workers.other_ranks,)})["x"][:2]:
        assert first[0] == "ValueError" and "do not agree on group=" in first[1]
        assert "ranks 0, 1" in first[1] and "ranks 0, 1, 2" in first[1] and again[0] == "none"


@pytest.mark.parametrize("rows", MESHES, ids=str)
def test_machines_in_any_order(fours, rows):
    assert max(fours[str(rows)]) < 1e-5


def test_before_there_is_a_process_group(tmp_path):
    calls = {"early": (beginning_workers.too_early, str(tmp_path))}
    for refused, early in run_together(2, calls)["early"]:
        for kind, text in refused:
            assert kind == "RuntimeError" and "init_process_group" in text and "unset WORLD_SIZE" in text
        assert early == [False, True, False]
    assert "WORLD_SIZE" not in os.environ


def test_every_kind_of_store(tmp_path):
    assert run_together(2, {"stores": (beginning_workers.stores, str(tmp_path))})["stores"] == [[0.5] * 3] * 2
