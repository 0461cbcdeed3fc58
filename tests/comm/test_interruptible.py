"""Promises of a call that waits for others in C++: what it returns and raises comes through; once somebody is gone it
is left behind, and what it does later is taken back."""

import threading

import pytest

from fused_dlam.comm import interruptible


def test_what_is_returned_and_raised():
    assert interruptible.run(lambda: 5, lambda: "nobody asks") == 5

    def fails():
        raise ValueError("as it is")

    with pytest.raises(ValueError, match="as it is"):
        interruptible.run(fails, lambda: "")


def test_one_that_ends_by_itself_is_not_left(monkeypatch):
    """Though somebody is gone: it may have been through with that one."""
    looked = threading.Event()

    def gone():
        looked.set()
        return "worker 1 died"

    def call():
        looked.wait(30)
        return "there"

    monkeypatch.setattr(interruptible, "GRACE", 30.0)
    assert interruptible.run(call, gone) == "there"


def test_one_that_would_wait_for_the_dead_is_left_and_taken_back(monkeypatch):
    monkeypatch.setattr(interruptible, "GRACE", 0.05)
    go_on, undone = threading.Event(), threading.Event()
    with pytest.raises(RuntimeError, match="worker 1 died while groups were formed"):
        interruptible.run(lambda: go_on.wait(60), lambda: "worker 1 died", undone.set)
    assert not undone.is_set()
    go_on.set()
    assert undone.wait(30)


def test_names_of_groups_are_of_the_thread_that_builds():
    from fused_dlam.comm import process_group

    named = process_group._name(lambda ranks, use_hashed_name: "torch's")
    process_group._naming.name = "ours"
    found = []
    try:
        thread = threading.Thread(target=lambda: found.append(named([0], False)))
        thread.start()
        thread.join()
        assert named([0], True) == "ours" and found == ["torch's"]
    finally:
        del process_group._naming.name
    assert named([0], True) == "torch's"
