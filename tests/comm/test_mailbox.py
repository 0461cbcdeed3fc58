"""Promises of `Mailbox`, with four real processes over gloo:

- whatever is pushed when to whom, mass is conserved: the masses of all ranks sum to their number to 1e-12 within each
  drained() and after close(), and what they have to what they had, up to rounding;
- asynchronous push-sum with one slow rank comes to the mean of all within 1e-12;
- a full slot takes nothing and breaks nothing; slots of other ranks are free; everything comes in order;
- `latest`, `steps`, `age` and `wait` tell of the last message, lists of tensors keep their shapes, 16-bit messages are
  summed in float32;
- wrong calls raise what they should before anything is sent, on all ranks where all are concerned, and all works after;
- mailboxes in a row take no more threads and files than the first; one that is let go of is lost for the others, which
  go on, or raise an error that names it, once;
- drained() begins when the last rank has come, and holds up nobody when it ends; a rank that does not come is named;
- in a drained() that others gave up nothing comes; they cannot try again, and all close;
- a rank without neighbors gives back its process group;
- two ranks of `Pairs` that ask each other at once come to their mean;
- the last message of a source that was lost by silence stays what it was, whatever comes of it.
"""

import threading
from types import SimpleNamespace

import mailbox_workers
import numpy as np
import pytest
import torch
from workers import run_together

from fused_dlam import Mailbox
from fused_dlam.comm.inbox import Inbox
from fused_dlam.comm.letter import Letter, add
from fused_dlam.comm.line import MESSAGE, Head, Line

N = 4


@pytest.fixture(scope="module")
def four():
    names = ("consensus", "full_slot", "puts", "wrong", "in_turn", "left_alone", "unequal", "who_does_not_come",
             "some_gave_up", "nobody_there", "crossed")  # fmt: skip
    calls = {"schedules": (mailbox_workers.schedules, ["one-peer-exponential", "star"], [0, 1])}
    calls |= {name: (getattr(mailbox_workers, name),) for name in names}
    calls |= {name: (mailbox_workers.bits, name) for name in ("float16", "bfloat16")}
    return run_together(N, calls, deadline=240.0)


def check_conserved(results):
    for rank in results:
        for lost, sent, _ in rank:
            assert sent > 10
            for mass, x in lost:
                assert mass <= 1e-12 and x <= 1e-12, lost


def test_mass_is_conserved(four):
    check_conserved(four["schedules"])


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_mass_is_conserved_by_any_number_of_ranks(n):
    topologies = ["full", "one-peer-exponential", "one-way-ring", "random-match"]
    calls = {"schedules": (mailbox_workers.schedules, topologies, [2])}
    check_conserved(run_together(n, calls, deadline=280.0)["schedules"])


def test_asynchronous_consensus(four):
    """The masses and the mean to the last digits though one rank is five times slower; all come to the mean."""
    for error, mass, x in four["consensus"]:
        assert error < 1e-12 and mass < 1e-12 and x < 1e-12


def test_a_full_slot_takes_nothing(four):
    told, *_ = four["full_slot"][0]
    assert told == [True, False, True]  # the first to rank 1; the third, behind one that is not taken; to rank 3
    _, (x, mass), (again, nothing), steps = four["full_slot"][1]
    assert mass == 0.75 and torch.equal(x, 0.75 * torch.arange(5.0)) and steps[0] == 8
    assert nothing == 0.0 and torch.equal(again, torch.zeros(5))
    assert four["full_slot"][3][1][1] == 0.125 and four["full_slot"][2][1][1] == 0.0


def test_the_last_message(four):
    for rank, (found, (matrix, number), step, sum_of_matrices, sum_of_numbers, mass) in enumerate(four["puts"]):
        left = (rank - 1) % N
        assert found == {"early": set(), 0: {left}, 1: {left}, 2: {left}, "never": set()}
        assert torch.equal(matrix, torch.full((2, 3), 10.0 * left + 2)) and number == 2.0 and step == 2
        assert torch.equal(sum_of_matrices, torch.full((2, 3), 30.0 * left + 3)) and sum_of_numbers == 3.0 == mass


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bits_are_summed_in_float32(name, four):
    for dtype, error, mass in four[name]:
        assert dtype == torch.float32 and error < 1e-5 and mass == 9.0  # nine values of at most 4 are added


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_those_of_torch(dtype):
    """For every 16-bit pattern, and some numbers of the others."""
    if dtype.itemsize == 2:
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        values = torch.randn(1001, dtype=dtype)
    total = torch.randn(len(values), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = total + values
    add(total, values)
    assert np.array_equal(total.numpy(), expected.numpy(), equal_nan=True)


WRONG = [
    ("TypeError", "not torch.int64"), ("TypeError", "one type"), ("ValueError", "nothing to send"),
    ("ValueError", "on_loss must be"), ("ValueError", "timeout must be positive"),
    ("ValueError", "do not agree on the shapes"),
    ("ValueError", "do not agree on the topology"), ("ValueError", "shapes (4,) are not those"),
    ("TypeError", "torch.float64 on cpu is not what"), ("TypeError", "sends one tensor"),
    ("ValueError", "is none that the topology has this rank send to"), ("ValueError", "weight must be finite"),
    ("ValueError", "step must be an integer"), ("ValueError", "is none that the topology has send to this rank"),
    ("ValueError", "at_least must be"), ("RuntimeError", "within drained()"), ("RuntimeError", "within drained()"),
    ("ClosedError", "was closed"), ("ClosedError", "was closed"),
]  # fmt: skip


def test_wrong_calls(four):
    for told, pushed, (x, mass) in four["wrong"]:
        assert [kind for kind, _ in told] == [kind for kind, _ in WRONG], told
        for (_, text), (_, words) in zip(told, WRONG, strict=True):
            assert words in text
        assert pushed and mass == 1.0 and torch.equal(x, torch.ones(3))


def test_nothing_piles_up(four):
    for early, late in four["in_turn"]:
        assert all(b <= a for a, b in zip(early, late, strict=True)), (early, late)


def test_one_that_leaves_is_lost_for_the_others(four):
    for rank in (0, 2):
        errors, lost, pushed = four["left_alone"][rank]["raise"]
        assert [error[:3] for error in errors] == [(1, True, "Mailbox.collect()")] and lost == {1} and pushed is False
        assert f"rank {rank} in Mailbox.collect(): rank 1 has left" in errors[0][3]
        assert four["left_alone"][rank]["continue"] == ([], {1}, False)
    assert four["left_alone"][3] == {"raise": ([], set(), None), "continue": ([], set(), None)}


def test_drained_begins_with_the_last_and_holds_up_nobody(four):
    last = four["unequal"][3][0]
    for _, entered, pushed, mass in four["unequal"][:3]:
        assert entered >= last and pushed is False and mass == 0.0
    assert four["unequal"][3][2:] == (None, 3.0)


def test_who_does_not_come_is_named(four):
    for rank, (told, lost) in enumerate(four["who_does_not_come"]):
        assert lost == set()
        if rank != 2:
            peer, gone, call, text = told
            assert (peer, gone, call) == (2, False, "Mailbox.drained()")
            assert "rank 2 did not call it within 1 s, though it runs" in text


def test_drained_where_some_gave_up(four):
    for rank, (pushed, told, masses, lost) in enumerate(four["some_gave_up"]):
        assert pushed is (False if rank == 1 else None) and masses == 4.0 and lost == set(), rank
        assert (told is None) if rank in (0, 2) else ("only close() is left" in told)


def test_a_rank_without_neighbors_gives_back_its_group(four):
    assert four["nobody_there"] == [(1, 0)] * N


def test_crossed_questions_average(four):
    for rank, (asked, x) in enumerate(four["crossed"]):
        assert asked and torch.equal(x, torch.full_like(x, 0.5 if rank < 2 else rank))


def test_the_last_message_of_a_silent_source():
    """Its place is that of the second message that comes after it: the first one of those is dropped, too."""
    inbox = Inbox(Letter(torch.zeros(2)))
    post = SimpleNamespace(changed=threading.Condition(), reader=inbox)
    line, places = Line(post, 1, 1, []), [torch.zeros(2), torch.zeros(2)]
    for number in range(1, 5):
        if number == 2:
            line.lost = "has been silent"
        place, head = places[number % 2], Head(MESSAGE, number, number, 1.0)
        place.fill_(float(number))
        inbox.came(line, head, place)
        inbox.read(line, head, place)
        line._note(head)
    head, values = inbox.last[1]
    assert head.number == 1 and torch.equal(values, torch.ones(2)) and line.step == 1 and inbox.mass == 1.0


def test_one_worker_needs_no_process_group():
    """Nothing is pushed, nothing comes."""
    x = torch.randn(3)
    box = Mailbox(x, "ring")
    assert not box.push(x) and box.lost == set() and box.steps == {} and box.wait(0, 5, 1.0) == set()
    with box.drained():
        pass
    box.close()
    total, mass = box.collect()
    assert torch.equal(total, torch.zeros(3)) and mass == 0.0
