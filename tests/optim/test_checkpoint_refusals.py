"""Promises about what goes wrong with checkpoints, with real processes, the same on every rank and nothing loaded:

- parts of two saves, missing and truncated ones are refused, and named;
- a rank that does not come to save_checkpoint or load_checkpoint is named within the optimizer's timeout, and the next
  call, to which all come, works; load_state_dict on one rank ends in words as well;
- a disk that is full on one rank is an OSError on all, which names it, and the last checkpoint stays;
- one worker's state on all is refused where the method has corrections or trackers, which diverge with copies;
- checkpoints of different steps, or with bad values on one rank, are refused on all.
"""

import checkpoint_refusal_workers as them
import pytest
from workers import run_together

TIMEOUT = 3.0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    calls = {
        "mixed": (them.mixed, str(folder)),
        "one file": (them.one_file,),
        "full disk": (them.full_disk, str(folder / "full")),
        "other steps": (them.other_steps, str(folder)),
        "over and over": (them.over_and_over, str(folder / "again")),
        "never comes": (them.never_comes, str(folder), TIMEOUT),
    }
    return run_together(2, calls, deadline=200)


def test_one_workers_state_for_all(ranks):
    for told in ranks["one file"]:
        for kind, error, text in told[::3]:
            assert error == ("none" if kind == "dmsgd" else "ValueError"), (kind, text)
            assert kind == "dmsgd" or "ranks 0, 1 load what worker 0 saved" in text
        assert {error for _, error, _ in (*told[1::3], *told[2::3])} == {"none"}, "its own, and the mean"


@pytest.mark.parametrize("mean", ["", ", mean"])
def test_parts_of_two_saves(ranks, mean):
    for told in ranks["mixed"]:
        for name, words in {
            "newer": "worker 0's part is of step 6, worker 1's is of step 3",
            "same step": "worker 0's part is of step 3 (save ",
            "all of another": ".metadata is of save ",
            "missing": "worker 1's is unreadable (FileNotFoundError",
            "short": "worker 1's is unreadable (",
        }.items():
            kind, text, _ = told[name + mean]
            assert kind == "ValueError" and "holds parts of more than one save" in text and words in text, (name, text)
        kind, text, _ = told["by hand"]
        assert kind == "ValueError" and "worker 0's part is of step 6, worker 1's is of step" in text


def test_who_does_not_come_is_named(ranks):
    zero, one = ranks["never comes"]
    for name, what in (("save first", "save"), ("save", "save"), ("load", "load")):
        kind, text, seconds = zero[name]
        assert kind == "ExchangeError" and TIMEOUT <= seconds < TIMEOUT + 10
        assert f"rank 0 at step 2: {what}_checkpoint() has waited 3 s" in text
        assert "for rank 1, which has not called it. All ranks must call it" in text
    kind, text, _ = one["rank 0 not"]
    assert kind == "ExchangeError" and "rank 1 at step 2: save_checkpoint()" in text
    assert "rank 0, which has not called it" in text
    assert zero["other"][0] == one["other"][0] == "ExchangeError"  # whoever gives up first sees where the other is
    assert "which has called load_checkpoint()" in zero["other"][1] or (
        "which has called save_checkpoint()" in one["other"][1]
    )
    for told in (zero, one):
        assert [told[name][0] for name in ("both", "both again", "load by both")] == ["none"] * 3
    kind, text, seconds = zero["load_state_dict"]
    assert kind == "ExchangeError" and "in optimizer.load_state_dict()" in text and seconds < 20


def test_full_disk(ranks):
    for told, folders, stays, again, unwritable in ranks["full disk"]:
        assert told[0] == "OSError" and "save_checkpoint(), on rank 1: [Errno 27] File too large" in told[1]
        assert len(folders) == 1 and stays and again[0] == "none"
        assert unwritable[0] == "OSError" and "on rank 0: " in unwritable[1]


def test_steps_and_values(ranks):
    for rank, told in enumerate(ranks["other steps"]):
        assert told["good"][0] == "none"
        assert all(told[name][0] == "ValueError" for name in told if name != "good"), told
        assert "do not agree on what they load: rank 0 has step 2, rank 1 has step 4" in told["steps"][1]
        bad = "group 0 of the checkpoint: Invalid learning rate: -1.0"
        assert bad in told["bad on 1"][1] and told["bad"][1] == bad
        assert rank == 1 or "rank 0 has step 4, rank 1 has an error" in told["bad on 1"][1]
        assert "save_checkpoint() was called at different steps: {0: 'step 4', 1: 'step 5'}" in told["save"][1]
        assert f"load_checkpoint(), on rank 1: {bad}" in told["load bad"][1]


def test_one_directory_again_and_again(ranks):
    """Earlier releases' checkpoints load; no warnings of torch's; one checkpoint is left, which torch's tools read."""
    for count, caught, left, equal, of_async in ranks["over and over"]:
        assert count == of_async == 2 and equal
        assert not [text for text in caught if "overwrit" in text or "torch.distributed is disabled" in text], caught
        folder = left[-1].partition("/")[0]
        assert left == [".metadata", f"{folder}/__0_0.distcp", f"{folder}/__1_0.distcp"]
