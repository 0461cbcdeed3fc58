"""Promises about the functions of a user's own loop when a rank fails, with three real processes over gloo:

- a rank that dies, or comes after the deadline, is an ExchangeError in every rank that waits for it, which names the
  call, this rank and one to look at; nobody waits for longer than `timeout` and what the error takes;
- a rank that comes late, but within it, changes nothing;
- after it the same function works again, at the latest when the ranks that had not noticed have called it twice;
- what ranks are not asked about (check=False, a shape that all have passed before) is a deadline, and no crash;
- a handle that fails while nobody waits for it fails nobody's later calls.
"""

import piece_faults as faults
import pytest
from workers import run_together

SOME, ALL = ["exchange"], list(faults.CALLS)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [SOME, slow(ALL)])
def test_ranks_that_come_after_the_deadline(names):
    ranks = run_together(faults.N, {"x": (faults.all_late, names)}, deadline=300)["x"]
    for name in names:
        _, answer, call = faults.CALLS[name]
        for rank, out in enumerate(ranks):
            error, after = out[name]
            assert after == answer(rank), (name, after)
            if rank == faults.CULPRIT or (name, rank) == ("pair", 2):
                continue  # the culprit may find a new group right away
            words, peer, at = error
            assert words.startswith(f"rank {rank} in {call}") and at == call, (name, words)
            assert peer != rank and "rank" in words.split("failed:")[1], words


@pytest.mark.parametrize("names", [slow(ALL)])
def test_ranks_that_come_late(names):
    for rank, out in enumerate(run_together(faults.N, {"x": (faults.slow, names)})["x"]):
        assert out == {name: [faults.CALLS[name][1](rank)] * faults.N for name in names}


@pytest.mark.parametrize("name", ["async", *(slow(name) for name in ALL)])
def test_a_rank_that_dies(name, tmp_path):
    call = faults.CALLS[name][2]
    for rank, (first, second) in zip((0, 2), faults.run(faults.dies, name, tmp_path), strict=True):
        if (name, rank) == ("pair", 2):
            assert first is None
            continue
        if name == "backward":  # it does not come to its forward pass
            call = "neighbor_allreduce()"
        words, peer, at = first
        assert words.startswith(f"rank {rank} in {call}") and at == call, words
        assert peer in (0, 1, 2) and peer != rank
        assert second is not None and "rank 1" in second[0], second
        if rank == 2 or name == "pair":  # these wait for the one that died
            assert "rank 1" in words, words


@pytest.mark.slow
def test_a_rank_that_dies_while_handles_are_under_way(tmp_path):
    for (done, first, again, other), late in faults.run(faults.dies_with_handles, "", tmp_path):
        assert done and first == again and first[2] == "neighbor_exchange()"
        assert other is not None and other[2] == "neighbor_exchange()"
        assert late is not None and "rank 1" in late[0]


@pytest.mark.slow
def test_what_nobody_is_asked_about():
    ranks = run_together(faults.N, {"x": (faults.something_else,)}, deadline=300)["x"]
    for rank, out in enumerate(ranks):
        for name in ("shape", "type", "contradiction", "known", "step", "two functions"):
            assert out[f"after {name}"] == faults.behind(rank), (name, out[f"after {name}"])
        assert out["warm"] == [faults.behind(rank)] * 2
    for name in ("shape", "type", "contradiction", "known", "step", "two functions"):
        assert any(out[name][0] for out in ranks), name


@pytest.mark.slow
def test_a_handle_that_fails_unseen():
    for rank, (broken, after) in enumerate(run_together(faults.N, {"x": (faults.let_go,)})["x"]):
        assert broken == (rank != faults.CULPRIT) and after == faults.behind(rank)
