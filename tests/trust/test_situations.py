"""Promises, each a situation of a public bug report or of a user's first day, with real processes over gloo:

- whatever a script does to gradients and weights between backward and step, from whatever step on, the default and
  overlap=True give what overlap=False gives, bit for bit;
- what is frozen is not sent, what is thawed trains from its first gradient;
- 16-bit values: what was written counts, means do not overflow or vanish;
- a skipped step and drifting learning rates are named with the global rank;
- an optimizer that is gone leaves neither threads nor files behind.
"""

import pytest
import situation_workers as workers
import torch
from workers import run_together

OPTIONS = [{}, {"method": "pmsgd"}, {"topology": "exponential", "comm_dtype": torch.bfloat16},
           {"method": "decentlam", "topology": "ring"}]  # fmt: skip
TOUCHED = [(name, k, start) for name in workers.TOUCHES for k in range(len(OPTIONS)) for start in (0, 4)]
THAWED = ("frozen first", "frozen later", "back and forth")


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def overlaps(request):
    """Two ranks start at step 0 with half of the options and at step 4 with the others, three with all."""
    crosswise = [t for t in TOUCHED if request.param == 3 or (t[1] + t[2] // 4) % 2 == 0]
    calls = {t: (workers.touched, t[0], OPTIONS[t[1]], t[2]) for t in crosswise}
    calls |= {order: (workers.gan, order) for order in ("d first", "g first")}
    calls |= {what: (workers.thawed, what) for what in THAWED}
    return run_together(request.param, calls)


@pytest.fixture(scope="module")
def threes():
    calls = {"adapters": (workers.adapters,), "bf16": (workers.bf16_loaded,), "means": (workers.fp16_means,)}
    calls |= {m: (workers.fp16_scaled, m) for m in ("pmsgd", "dmsgd")}
    calls |= {"rates": (workers.drifting_rates,), "row": (workers.in_a_row, False), "closed": (workers.in_a_row, True)}
    calls |= {"gossip awc": (workers.awc_written, "gossip")}
    return run_together(3, calls)


def test_a_script_gives_what_it_gives_without_overlap(overlaps):
    """Bit for bit, on every rank, and different from what it gives untouched."""
    for what, ranks in overlaps.items():
        for auto, insisted, without in ranks:
            assert torch.equal(auto, without) and torch.equal(insisted, without), what


def test_what_is_thawed_trains_from_its_first_gradient(overlaps):
    for auto, _, _ in overlaps["frozen first"]:
        moves = auto[-8:]
        assert (moves[:3] == 0).all() and (moves[3:] > 0).all()


def test_adapters_alone_are_sent(threes):
    """8,008 bytes of parameters in a bucket of 8,192; the frozen base is rank 0's everywhere."""
    for sent, base, states in threes["adapters"]:
        assert sent == 8192 and base == threes["adapters"][0][1] and states == 2


def test_what_was_written_into_16_bit_weights_counts(threes):
    for rank, (resumed, distance) in enumerate(threes["bf16"]):
        assert (resumed == 3).all(), rank
        assert distance == pytest.approx((4 * 2 / 3) ** 0.5)  # ranks 0, 1, 2 in each of four places


def test_means_of_float16(threes):
    for values in threes["means"]:
        assert all(torch.allclose(v, torch.tensor(30000.0), rtol=1e-3) for v in values), values
    for method in ("pmsgd", "dmsgd"):
        assert all(x == pytest.approx(-4e-4, rel=2e-3) for x in threes[method])


def test_learning_rates_that_drift_apart_are_named(threes):
    """Those who hear from each other, once."""
    for rank, lines in enumerate(threes["rates"]):
        told = [line for line in lines if "learning rates" in line]
        assert len(told) <= 2 and all(f"rank {rank} at step" in line for line in told)
    assert any("learning rates of rank 0 are others" in line for lines in threes["rates"] for line in lines)


@pytest.mark.parametrize("how", ["row", "closed"])
def test_an_optimizer_gives_back_what_it_took(how, threes):
    for early, late in threes[how]:
        assert late <= early


def test_weights_written_while_they_are_in_flight(threes):
    """Gossip sends a copy: the mean is that of what was written. GossipSGD refuses, and says what to do."""
    assert all(mean == pytest.approx(2.0) for mean in threes["gossip awc"])
    refusals = run_together(3, {"awc": (workers.awc_written, "gossip-sgd")})["awc"]
    assert all("synchronize()" in text or "gave up" in text or "closed" in text for text in refusals)
    assert any("synchronize()" in text for text in refusals)


@pytest.mark.parametrize("schedule", ["atc", "midpoint", "awc"])
def test_ranks_that_count_other_steps_are_named(schedule):
    """In the first step whose message is another one's, by the ranks that hear of it, with both ranks and steps."""
    told = run_together(4, {"steps": (workers.out_of_step, "other steps", schedule)})["steps"]
    assert all(k <= 4 for k, _ in told), told
    assert any("the message of rank" in text and "equally often" in text for _, text in told), told


def test_a_step_that_is_left_out_is_named_when_somebody_waits_for_it():
    """A rank that leaves one out is late by one: in the last step the others learn that it has gone, and the remedy."""
    told = run_together(4, {"steps": (workers.out_of_step, "left out", "atc")})["steps"]
    assert told[1] == (8, "")
    assert all(k == 7 and "rank 1" in text and "join()" in text for k, text in (told[0], told[2])), told


PLANTED = ["gradient nan", "gradient inf", "gradient -inf", "weight nan", "state inf"]
METHODS = [{}, {"method": "da-dmsgd"}, {"method": "decentlam", "topology": "ring"}, {"method": "pmsgd"},
           {"method": "gradient-tracking", "topology": "ring"}, {"method": "adamw"}, {"schedule": "awc"},
           {"comm_dtype": torch.bfloat16}, {"topology": "full"}, {"fused": True}, {"method": "qg-dmsgd"},
           {"max_grad_norm": 1.0}, {"method": "mi-dmsgd"}, {"method": "mi-dmsgd", "clip": "spikes"}]  # fmt: skip


PLACES = [(p, k) for p in range(len(PLANTED)) for k in range(len(METHODS))]


@pytest.mark.parametrize("places", [[pk for pk in PLACES if sum(pk) % 3 == 0],
                                    pytest.param([pk for pk in PLACES if sum(pk) % 3], marks=pytest.mark.slow)],
                         ids=["crosswise", "the rest"])  # fmt: skip
def test_a_value_that_is_not_finite_reaches_no_second_rank(places):
    """Every place, with each of the methods, schedules and passes; one in a gradient does not stay on the first."""
    pytest.importorskip("numba")
    calls = {(p, k): (workers.nan_planted, PLANTED[p], METHODS[k]) for p, k in places}
    for (p, k), ranks in run_together(4, calls).items():
        where = PLANTED[p]
        bad = [has for has, _, _ in ranks]
        assert not any(bad[1:]), (where, METHODS[k])
        if where.startswith("gradient"):
            assert not bad[0], (where, METHODS[k])
            assert any("not finite" in line and "rank 0 at step 2" in line for line in ranks[0][1]), where


def test_nonfinite_raise_names_the_parameter():
    with pytest.raises(Exception, match="FloatingPointError.*") as raised:
        run_together(2, {"raise": (workers.nan_planted, "gradient nan", {"nonfinite": "raise"})})
    assert "0 of group 0" in str(raised.value) or "rank 0 raises" in str(raised.value)


def test_scripts_differ_when_touched():
    """The touches above do something: without them the parameters are others."""
    ranks = run_together(2, {name: (workers.touched, name, {}, 0) for name in ("clamp", "none")})
    assert not torch.equal(ranks["clamp"][0][2], ranks["none"][0][2])
