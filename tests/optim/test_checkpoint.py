"""Promises about checkpoints, with real processes:

- new objects that load a worker's own checkpoint continue bit for bit, in the middle of a time-varying graph's period:
  every method, both schedules, bfloat16, `Gossip`; through torch.save with weights_only, and through DCP;
- `save_checkpoint` is resumed by as many workers bit for bit, by any other number from the mean, within 1e-6: 4 -> 3,
  6 and 1, FSDP2's shards over other ranks included; PC-DmSGD's correction starts from zero then;
- what belongs to another method or graph is refused, with what to do.
"""

import checkpoint_workers
import pytest
import torch
from test_processes import AWC, GOSSIP

from fused_dlam import SlowMo, rules
from fused_dlam.tools.launch import run_workers


@pytest.mark.slow
def test_every_method_continues_bit_for_bit():
    """Through torch.save and weights_only; saved tensors drag no flat buffer along."""
    forced = {"allow_unstable": True}  # ten steps do not overflow
    cases = [(m, forced, torch.float32) for m in rules.ALL]
    cases += [(m, {"schedule": "awc", **forced}, torch.float32) for m in AWC]
    cases += [("pc-dmsgd", {"bucket_mb": 1e-4, "schedule": s}, torch.float32) for s in ("atc", "awc")]
    cases += [("pc-dmsgd", {"comm_dtype": torch.bfloat16, "global_average_every": 4}, torch.bfloat16)]
    cases += [("dmsgd", {"slowmo": SlowMo(3), "lars": 0.1, "nesterov": True}, torch.bfloat16)]
    cases += [
        ("gossip-adamw", {"schedule": s}, dtype) for s in ("atc", "awc") for dtype in (torch.float32, torch.bfloat16)
    ]
    assert len(GOSSIP) > len(AWC) > 3
    for rank, results in enumerate(run_workers(checkpoint_workers.resumed, 3, cases)):
        for case, (whole, again, excess) in zip(cases, results, strict=True):
            assert torch.equal(whole, again), (rank, case)
            assert excess == 0, case


def each(job, n, path, cases):
    """Results by case, then by rank."""
    return list(zip(*run_workers(checkpoint_workers.each, n, job, str(path), cases), strict=True))


def test_dcp_by_hand(tmp_path):
    """get_optimizer_state_dict and set_optimizer_state_dict, workers under names of their own: bit for bit."""
    for ranks in each("through_dcp", 3, tmp_path, [("pc-dmsgd", {"schedule": "awc"}), ("gossip-adamw", {})]):
        assert all(torch.equal(whole, again) for whole, again in ranks)


def test_saved_once_resumed_by_any_number(tmp_path):
    """As many: bit for bit. Others: equal on all, the mean to 1e-6 (bfloat16: one rounding), and training goes on."""
    cases = [("pc-dmsgd", {"schedule": "awc"}, torch.float32), ("gossip-adamw", {}, torch.bfloat16)]
    saved = each("save", 4, tmp_path, cases)
    for before, after in zip(saved, each("load", 4, tmp_path, cases), strict=True):
        for (own, whole), (loaded, end, count) in zip(before, after, strict=True):
            assert count == 4 and torch.equal(own[0], loaded[0]) and own[2:] == loaded[2:]
            assert torch.equal(whole, end)
        assert not torch.equal(before[0][0][0], before[1][0][0])
    for n in (3, 6, 1):
        for (_, _, dtype), before, after in zip(cases, saved, each("load", n, tmp_path, cases), strict=True):
            tight = 1e-6 if dtype == torch.float32 else 1e-2
            before = [summary for summary, _ in before]
            for x, state, *rest in (loaded for loaded, _, _ in after):
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


def test_shards_are_resumed_by_other_machines(tmp_path):
    """2 machines x 2 ranks: again bit for bit; by 1 x 4 and 3 x 2 from the mean of the machines, to 1e-6."""

    def on(machines, size):
        return [(machines, size, "pc-dmsgd", {}), (machines, size, "gossip-adamw", {"schedule": "awc"})]

    saved = each("save_shards", 4, tmp_path, on(2, 2))
    for before, after in zip(saved, each("load_shards", 4, tmp_path, on(2, 2)), strict=True):
        for (own, whole), (loaded, end, count) in zip(before, after, strict=True):
            assert count == 2 and torch.equal(own, loaded) and torch.equal(whole, end)
    for machines, size in ((1, 4), (3, 2)):
        others = each("load_shards", machines * size, tmp_path, on(machines, size))
        for before, after in zip(saved, others, strict=True):
            mean = (before[0][0] + before[2][0]) / 2
            for loaded, end, _ in after:
                torch.testing.assert_close(loaded, mean, rtol=1e-6, atol=1e-6)
                assert bool(torch.isfinite(end).all()) and not torch.equal(loaded, end)


def test_one_file_for_any_number(tmp_path):
    """averaged() and consensus_state_dict(): the mean to 1e-6, workers untouched; a worker's own file is refused."""
    cases = [("pc-dmsgd", {"schedule": "awc"}), ("gossip-adamw", {})]
    saved = each("consensus", 4, tmp_path, cases)
    for ranks in saved:
        for before, after in ranks:
            assert torch.equal(before[0], after[0]) and before[1].keys() == after[1].keys()
            assert all(torch.equal(before[1][k], after[1][k]) for k in before[1])
    corrections = torch.stack([before[1]["correction_buffer"] for before, _ in saved[0]])
    assert corrections.abs().max() > 1e-3 and corrections.mean(0).abs().max() < 1e-6  # why it is zero in the mean
    other = [("pc-dmsgd", {}), ("gossip-adamw", {"schedule": "awc"})]  # the other schedule each
    for ranks, again in zip(saved, each("from_consensus", 3, tmp_path, other), strict=True):
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
    for other, method, lacking, graph, unseen in run_workers(checkpoint_workers.refused, 2, str(tmp_path)):
        assert "holds no model, optimizer saved by" in other
        assert "method 'dmsgd', this optimizer of 'pc-dmsgd': load the model alone" in method
        assert "holds no scheduler saved by" in lacking
        assert "this optimizer of 'ring over 2'" in graph and "load_checkpoint(mean=True)" in graph
        assert "{0: '2 workers', 1: 'no model, optimizer saved by" in unseen
