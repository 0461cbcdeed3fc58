"""Promises of `averaged` and `consensus_distance`, on four workers:

- buffers of any layout and type are the mean of all ranks inside, and bit-equal to before afterwards, in the layout
  that they had; memory that is there twice is averaged once; float8 and sparse are left alone, which is logged once;
- whatever fails, in the averaging or in the body, every rank has its own values back bit for bit;
- parameters that are not exchanged (frozen, replaced, an EMA's) are averaged like buffers, and stay bit-equal where
  they are equal on all ranks, whose number is 3, a mask of -inf too;
- parameters of one rank that are not finite are left out of the mean; trainable ones of no optimizer are told;
- ranks with different models get the same ValueError, and no wrong mean;
- inside, `averaged` is refused, a flag tells step(), and the distance is 0;
- `mean` gives all ranks the mean of their values, two machines' ranks too, and leaves the values alone; integers and
  unlike shapes are refused on all of them;
- the distance counts what a script has written into weights of any type, and nothing behind the last parameter.
"""

import averaged_workers as workers
import pytest
import torch
from workers import run_together

import fused_dlam

N = 4


@pytest.fixture(scope="module")
def ranks():
    names = ("layouts", "body", "ema", "not_exchanged", "within", "distances", "machines", "different", "means",
             "equal", "sick")  # fmt: skip
    calls = {name: (getattr(workers, name),) for name in names}
    calls.update({f"failures {d}": (workers.failures, d) for d in (torch.float32, torch.bfloat16)})
    return run_together(N, calls, deadline=120)


LEFT = ("float8", "sparse", "counter")


def test_the_mean_of_what_a_script_decides_by(ranks):
    for rank, (number, vector, own, (integer, shape), machines) in enumerate(ranks["means"]):
        assert number.dtype == torch.float64 and number == machines == 1.5
        assert torch.equal(vector, torch.full((2,), 1.5)) and torch.equal(own, torch.full((2,), float(rank)))
        assert integer.startswith("TypeError") and "cannot be averaged" in integer
        assert shape.startswith("ValueError") and "the value's shape" in shape


def test_the_mean_of_every_layout_and_type(ranks):
    """Values are chosen to have exact means."""
    for before, inside, after, same_strides, _ in ranks["layouts"]:
        assert workers.same(before, after) and same_strides
        for name, value in inside.items():
            if name in LEFT:
                assert torch.equal(value.float(), before[name].float()), name
            elif value.numel():
                own = torch.stack([b[name].to(torch.complex128) for b, *_ in ranks["layouts"]])
                assert torch.equal(value.to(torch.complex128), own.mean(0)), name


def test_what_is_equal_on_three_ranks_stays_as_it_is(ranks):
    for own, inside in ranks["equal"][:3]:
        assert workers.same(own, inside)
    assert ranks["equal"][3] is None


def test_parameters_that_are_not_finite_and_those_of_nobody(ranks):
    for values, log in ranks["sick"]:
        assert values == pytest.approx([(0 + 2 + 3) / 3, float("inf")], rel=1e-7)
        (line,) = [line for line in log if "no optimizer's" in line]
        assert "1.weight, 1.bias are trainable" in line


def test_what_has_no_mean_is_told_once(ranks):
    for *_, log in ranks["layouts"]:
        (line,) = [line for line in log if "leaves alone" in line]
        assert "float8 (float8_e4m3fn)" in line and "sparse (sparse_coo)" in line and line.count(",") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_failure_in_the_middle_of_averaging(ranks, dtype):
    for found in ranks[f"failures {dtype}"]:
        assert len(found) > 4 and all(found)


def test_a_failure_in_the_body(ranks):
    assert ranks["body"] == [[True] * 3] * N


def test_an_ema_is_averaged(ranks):
    """Parameters and buffers, the optimizer's own parameters too; one line says that the model is another."""
    for before, inside, after, trained, log, again in ranks["ema"]:
        assert workers.same(before, after)
        floats = [v for k, v in inside.items() if v.is_floating_point()]
        assert len(floats) == 6 and all((v == 1.5).all() for v in floats)
        assert (trained["0.weight"] == 15.0).all()
        assert sum("none of the model's parameters is the optimizer's" in line for line in log) == 1 and again == []


def test_parameters_that_are_not_exchanged_are_averaged(ranks):
    for rank, (inside, after) in enumerate(ranks["not_exchanged"]):
        assert len(inside) == 8 and all((v == 1.5).all() for v in inside.values())
        assert all((v == rank).all() for v in after.values())


def test_different_models_are_refused_on_all_ranks(ranks):
    (told, *_), *_ = ranks["different"]
    shape, kind, more, none = told
    assert "running_mean, which averaged() averages: rank 0 has (3,) float32, rank 2 has (4,) float32" in shape
    assert "running_var" in kind and "float64" in kind
    assert "4 tensors" in more and "5 tensors" in more and "no model" in none
    for others, back, flag in ranks["different"]:
        assert others == told and back and not flag


def test_within(ranks):
    for flags, error, distance, afterwards in ranks["within"]:
        assert flags == [False, True, True, False]
        assert "averaged() was entered within averaged()" in error
        assert distance == 0 and afterwards > 1


def test_the_distance_counts_what_was_written_and_no_padding(ranks):
    """Eight elements that are 0, 1, 2, 3 on the four ranks: sqrt(8 * 1.25), exactly so in 16 bits."""
    for found in ranks["distances"]:
        assert len(found) == 6
        for case, distance in found.items():
            assert distance == pytest.approx(10**0.5, rel=1e-12), case


def test_machines_average_over_all_their_ranks(ranks):
    for inside, back in ranks["machines"]:
        assert (inside == 1.5).all() and back


def test_one_worker():
    model = torch.nn.BatchNorm1d(3)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    with optimizer.averaged(model):
        assert optimizer._averaging
        with pytest.raises(RuntimeError, match="within averaged"), optimizer.averaged(model):
            pass
    assert not optimizer._averaging
    with pytest.raises(TypeError, match="averaged takes the model, a torch.nn.Module, not list"):
        with optimizer.averaged([model]):
            pass
