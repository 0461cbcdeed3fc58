"""Promises about checkpoints, with real processes:

- new objects that load a worker's own checkpoint continue bit for bit, in the middle of a time-varying graph's period:
  every method, both schedules, bfloat16, `Gossip`; through torch.save with weights_only, and through DCP;
- `save_checkpoint` is resumed by as many workers bit for bit, by any other number from the mean, within 1e-6: 4 -> 3,
  6 and 1, FSDP2's shards over other ranks included; PC-DmSGD's correction starts from zero then;
- what belongs to another method or graph is refused, with what to do.
"""

import functools

import checkpoint_workers
import pytest
import torch
from layers_of_users import spaced
from test_processes import AWC, GOSSIP
from workers import run_together

from fused_dlam import rules
from fused_dlam.layers import Lars, SlowMo

CASES = {
    "worker": [("pc-dmsgd", {"schedule": "awc"}, torch.float32), ("gossip-adamw", {}, torch.bfloat16)],
    "consensus": [("pc-dmsgd", {"schedule": "awc"}), ("gossip-adamw", {})],
    "from consensus": [("pc-dmsgd", {}), ("gossip-adamw", {"schedule": "awc"})],  # the other schedule each
    "dcp": [("pc-dmsgd", {"schedule": "awc"}), ("gossip-adamw", {})],
}


def shards(machines, size):
    return [(machines, size, "pc-dmsgd", {}), (machines, size, "gossip-adamw", {"schedule": "awc"})]


def together(n, folder, jobs):
    """{name: (job, files, cases)} on n ranks, each job in the folder of its files: {name: results by case, by rank}."""
    each = checkpoint_workers.each
    calls = {name: (each, job, f"{folder}/{files}", cases) for name, (job, files, cases) in jobs.items()}
    return {name: list(zip(*ranks, strict=True)) for name, ranks in run_together(n, calls).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder):
    """What four workers saved."""
    jobs = {
        "worker": ("save", "worker", CASES["worker"]),
        "shards": ("save_shards", "shards", shards(2, 2)),
        "consensus": ("consensus", "consensus", CASES["consensus"]),
    }
    return together(4, folder, jobs)


@pytest.fixture(scope="module")
def loaded(folder, saved):
    """What other processes loaded of it, by their number: their results by what they loaded."""
    jobs = {n: {"worker": ("load", "worker", CASES["worker"])} for n in (4, 3, 6, 1)}
    jobs[4]["shards, 2 x 2"] = ("load_shards", "shards", shards(2, 2))
    jobs[4]["shards, 1 x 4"] = ("load_shards", "shards", shards(1, 4))
    jobs[6]["shards, 3 x 2"] = ("load_shards", "shards", shards(3, 2))
    jobs[3]["consensus"] = ("from_consensus", "consensus", CASES["from consensus"])
    jobs[3]["dcp"] = ("through_dcp", "dcp", CASES["dcp"])
    return {n: together(n, folder, of_n) for n, of_n in jobs.items()}


@pytest.mark.slow
def test_every_method_continues_bit_for_bit():
    """Through torch.save and weights_only; saved tensors drag no flat buffer along."""
    forced = {"allow_unstable": True}  # ten steps do not overflow
    exact = functools.partial(spaced, exact=4)
    cases = [(m, forced, torch.float32) for m in rules.ALL]
    cases += [(m, {"schedule": "awc", **forced}, torch.float32) for m in AWC]
    cases += [("pc-dmsgd", {"bucket_mb": 1e-4, "schedule": s}, torch.float32) for s in ("atc", "awc")]
    cases += [("pc-dmsgd", {"comm_dtype": torch.bfloat16, "topology": exact}, torch.bfloat16)]
    cases += [("nesterov-dmsgd", {"layers": [Lars(0.1), SlowMo(3)]}, torch.bfloat16)]
    cases += [
        ("gossip-adamw", {"schedule": s}, dtype) for s in ("atc", "awc") for dtype in (torch.float32, torch.bfloat16)
    ]
    assert len(GOSSIP) > len(AWC) > 3
    ranks = run_together(3, {"resumed": (checkpoint_workers.resumed, cases)})["resumed"]
    for rank, results in enumerate(ranks):
        for case, (whole, again, excess) in zip(cases, results, strict=True):
            assert torch.equal(whole, again), (rank, case)
            assert excess == 0, case


def test_dcp_by_hand(loaded):
    """get_optimizer_state_dict and set_optimizer_state_dict, workers under names of their own: bit for bit."""
    for ranks in loaded[3]["dcp"]:
        assert all(torch.equal(whole, again) for whole, again in ranks)


def test_saved_once_resumed_by_any_number(saved, loaded):
    """As many: bit for bit. Others: equal on all, the mean to 1e-6 (bfloat16: one rounding), and training goes on."""
    for before, after in zip(saved["worker"], loaded[4]["worker"], strict=True):
        for (own, whole), (found, end, count) in zip(before, after, strict=True):
            assert count == 4 and torch.equal(own[0], found[0]) and own[2:] == found[2:]
            assert torch.equal(whole, end)
        assert not torch.equal(before[0][0][0], before[1][0][0])
    for n in (3, 6, 1):
        for (_, _, dtype), before, after in zip(CASES["worker"], saved["worker"], loaded[n]["worker"], strict=True):
            tight = 1e-6 if dtype == torch.float32 else 1e-2
            before = [summary for summary, _ in before]
            for x, state, *rest in (found for found, _, _ in after):
                assert torch.equal(x, after[0][0][0]) and rest == list(before[0][2:])
                torch.testing.assert_close(x, torch.stack([s[0] for s in before]).mean(0), rtol=tight, atol=tight)
                assert set(state) == set(before[0][1])
                for name, value in state.items():
                    mean = torch.stack([s[1][name] for s in before]).mean(0)
                    expected = torch.zeros_like(mean) if name == "correction_buffer" else mean
                    torch.testing.assert_close(value, expected, rtol=tight, atol=1e-6)
            ends = [end for _, end, _ in after]
            assert all(bool(torch.isfinite(e).all()) for e in ends)
            assert n == 1 or not torch.equal(ends[0], ends[1])


def test_shards_are_resumed_by_other_machines(saved, loaded):
    """2 machines x 2 ranks: again bit for bit; by 1 x 4 and 3 x 2 from the mean of the machines, to 1e-6."""
    for before, after in zip(saved["shards"], loaded[4]["shards, 2 x 2"], strict=True):
        for (own, whole), (found, end, count) in zip(before, after, strict=True):
            assert count == 2 and torch.equal(own, found) and torch.equal(whole, end)
    for others in (loaded[4]["shards, 1 x 4"], loaded[6]["shards, 3 x 2"]):
        for before, after in zip(saved["shards"], others, strict=True):
            mean = (before[0][0] + before[2][0]) / 2
            for found, end, _ in after:
                torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-6)
                assert bool(torch.isfinite(end).all()) and not torch.equal(found, end)


def test_one_file_for_any_number(saved, loaded):
    """averaged() and consensus_state_dict(): the mean to 1e-6, workers untouched; a worker's own file is refused."""
    for ranks in saved["consensus"]:
        for before, after in ranks:
            assert torch.equal(before[0], after[0]) and before[1].keys() == after[1].keys()
            assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    corrections = torch.stack([before[1]["correction_buffer"] for before, _ in saved["consensus"][0]])
    assert corrections.abs().max() > 1e-3 and corrections.mean(0).abs().max() < 1e-6  # why it is zero in the mean
    for ranks, again in zip(saved["consensus"], loaded[3]["consensus"], strict=True):
        for (x, state, step, _), _, error in again:
            torch.testing.assert_close(x, torch.stack([b[0] for b, _ in ranks]).mean(0), rtol=1e-6, atol=1e-6)
            assert state.keys() == ranks[0][0][1].keys() and step == checkpoint_workers.HALF
            for name, value in state.items():
                mean = torch.stack([b[1][name] for b, _ in ranks]).mean(0)
                expected = torch.zeros_like(mean) if name == "correction_buffer" else mean
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
            assert "'one-peer-exponential over 4', this optimizer of 'one-peer-exponential over 3'" in error
            assert "consensus_state_dict" in error


def test_what_does_not_belong_is_refused(tmp_path):
    """The same on every rank."""
    ranks = run_together(2, {"refused": (checkpoint_workers.refused, str(tmp_path))})["refused"]
    for other, method, lacking, graph, unseen in ranks:
        assert "holds no model, optimizer saved by" in other
        assert "method 'dmsgd', this optimizer of 'pc-dmsgd': build it with method=" in method
        assert "holds no scheduler saved by" in lacking
        assert "this optimizer of 'ring over 2'" in graph and "load_checkpoint(mean=True)" in graph
        assert "holds {0: '2 workers of save " in unseen and "1: 'no model, optimizer saved by" in unseen
