"""Promises of fused_dlam/frameworks/lightning.py, on two workers with unlike data.

- A Trainer's steps are those of a plain loop, bit for bit: with accumulation, with clipping, of GossipSGD and Gossip.
- Validation sees the workers' mean, on all ranks the same; each worker has its own back, also if it raises. After fit()
  all have the mean.
- A checkpoint's file is the mean, and opens as any of Lightning's. With the folder beside it training goes on bit for
  bit, on every worker; without, from the mean. A save that does not come to its end leaves the last one whole.
- All ranks stop with the first that has no data left.
- An overflow on one rank is a step of none, and scales stay equal.
- In mixed precision what is clipped, by norm and by value, are unscaled gradients: bit for bit those of a plain loop.
- DDP with an optimizer of ours is refused, and so is an optimizer that would train alone.
- The page's example runs as it stands, with the processes that Lightning starts.
"""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from by_name import called
from workers import run_together

if importlib.util.find_spec("lightning") is None:
    pytest.skip("Lightning is not installed", allow_module_level=True)

import fused_dlam
from fused_dlam.tools import launch

PAGE = Path(fused_dlam.__file__).parent / "frameworks" / "lightning.md"
CLIP = 0.1


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank returned, by call."""
    launch.PRELOAD.append("lightning.pytorch")  # imported once, not by every process

    def folder(name):
        return str(tmp_path_factory.mktemp(name))

    calls = {
        "sgd as a loop": ("as_a_loop", folder("sgd"), "sgd", 1, None),
        "adamw as a loop": ("as_a_loop", folder("adamw"), "adamw", 2, 0.1),
        "awc as a loop": ("as_a_loop", folder("awc"), "awc", 2, None),
        "uneven": ("uneven", folder("uneven")),
        "sgd resumed": ("resumed", folder("resumed"), "sgd"),
        "adamw resumed": ("resumed", folder("resumed2"), "adamw"),
        "awc resumed": ("resumed", folder("resumed3"), "awc"),
        "cut short": ("cut_short", folder("cut")),
        "refused": ("refused", folder("refused")),
        "failed": ("failed_validation", folder("failed")),
        "bf16, norm as a loop": ("as_a_loop", folder("bf16"), "adamw", 2, 0.1, "norm", "bf16-mixed"),
        "bf16, value as a loop": ("as_a_loop", folder("bf16"), "sgd", 1, 0.05, "value", "bf16-mixed"),
        "overflow": ("overflow", folder("overflow")),
        "sgd clipped": ("overflow", folder("overflow"), "sgd", CLIP),
        "adamw clipped": ("overflow", folder("overflow"), "adamw", CLIP),
        "clipped by hand": ("overflow", folder("overflow"), "sgd", CLIP, True),
        "sgd clipped, loop": ("overflow_loop", "sgd", CLIP),
        "adamw clipped, loop": ("overflow_loop", "adamw", CLIP),
        "two": ("two", folder("two")),
        "example": ("script", folder("example"), example().replace("max_epochs=4", "max_epochs=2"), example()),
    }
    named = {name: (called, "lightning_workers", *call) for name, call in calls.items()}
    return run_together(2, named, deadline=240)


def example():
    code = re.search(r"```python\n(# train.py.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert code.count("\n") <= 30
    return code


@pytest.mark.parametrize("built", ["sgd", "adamw", "awc", "bf16, norm", "bf16, value"])
def test_steps_are_those_of_a_plain_loop(found, built):
    models = []
    for path, expected, seen, means, model in found[f"{built} as a loop"]:
        assert torch.equal(path, expected)
        each = len(seen) // len(means)
        assert each * len(means) == len(seen) > 0
        for i, x in enumerate(seen):
            assert torch.equal(x, means[i // each])
        assert torch.equal(model, means[-1])
        models.append(path[-1])
    assert not torch.equal(*models)  # workers differ in training
    assert torch.equal(found[f"{built} as a loop"][0][4], found[f"{built} as a loop"][1][4])


def test_all_ranks_stop_with_the_shortest(found):
    assert found["uneven"] == [[15, 15], [15, 15]]


@pytest.mark.parametrize("built", ["sgd", "adamw", "awc"])
def test_training_goes_on_bit_for_bit(found, built):
    ranks = found[f"{built} resumed"]
    for rank in ranks:
        assert rank["whole"].shape[0] == 15
        assert torch.equal(rank["whole"], rank["parts"])
        assert torch.equal(rank["file"], rank["validated"]) and torch.equal(rank["file"], rank["inference"])
        assert rank["folders"] == rank["files"] and "last.ckpt" in rank["files"] and len(rank["files"]) == 3
    assert not torch.equal(ranks[0]["whole"], ranks[1]["whole"])


def test_a_save_that_is_cut_short_leaves_the_last_one(found):
    for whole, rest, _ in found["cut short"]:
        assert torch.equal(rest, whole[5:])


def test_a_file_without_its_folder_starts_from_the_mean(found):
    starts = []
    for whole, _, mean in found["cut short"]:
        assert mean.shape == whole[5:].shape and not torch.equal(mean, whole[5:])
        assert (mean - whole[5:]).norm() < 0.2 * whole[5:].norm()
        starts.append(mean)
    assert not torch.equal(*starts)


def test_what_is_refused(found):
    for said in found["refused"]:
        assert "GossipStrategy" in said["ddp"] and "DistributedDataParallel" in said["ddp"]
        assert "GossipStrategy" in said["ddp, Gossip"]
        assert "train alone" in said["plain"] and "Gossip(SGD(...))" in said["plain"]
        assert "find_unused_parameters" in said["option"] and "positive" in said["timeout"]


def test_a_validation_that_raises_gives_every_worker_its_own_back(found):
    for own, mean, after in found["failed"]:
        assert torch.equal(own, after) and not torch.equal(own, mean)
    assert torch.equal(found["failed"][0][1], found["failed"][1][1])


def test_an_overflow_on_one_rank_is_a_step_of_none(found):
    (path, scales, (of, name), norms), (other, others, _, _) = found["overflow"]
    assert of.startswith("fused_dlam") and name == "MixedPrecision"  # in checkpoints, with the scale
    assert max(norms) < 50  # unscaled
    assert scales == others == [1024.0, *[512.0] * 4]
    means = (path + other) / 2
    # BatchNorm's statistics go on, so parameters alone: weight and bias of the first layer.
    moved = (means[1:, :35] - means[:-1, :35]).norm(dim=1)
    assert moved[0] < 1e-6 < 1e-3 < moved[1:].min()


@pytest.mark.parametrize("built", ["sgd", "adamw"])
def test_unscaled_gradients_are_clipped(found, built):
    ranks = zip(found[f"{built} clipped"], found[f"{built} clipped, loop"], strict=True)
    for rank, ((path, scales, _, norms), (expected, of_loop)) in enumerate(ranks):
        assert torch.equal(path, expected) and repr(norms) == repr(of_loop) and norms[0] > CLIP  # NaN is NaN
        assert scales == [1024.0, *[512.0] * 4] and (rank == 0 or not math.isfinite(norms[1]))
        assert built == "adamw" or not torch.equal(path, found["overflow"][rank][0])


def test_clipping_by_hand_is_the_trainers(found):
    for (path, scales, *_), (expected, others, *_) in zip(found["clipped by hand"], found["sgd clipped"], strict=True):
        assert torch.equal(path, expected) and scales == others


def test_two_optimizers_by_hand(found):
    for (whole, first, rest), told in found["two"]:
        assert torch.equal(whole, torch.cat([first, rest]))
        assert all(distance > 0 and seen == sent > 0 for distance, seen, sent in told)


def test_the_example_goes_on(found):
    (_, names), (second, _) = found["example"][0]
    assert names == {"best.ckpt", "last.ckpt", "workers"}
    assert "loss" in second
    assert found["example"][0][1][1] == names


def test_the_example_starts_its_processes(tmp_path):
    (tmp_path / "train.py").write_text(example())
    environment = {**os.environ, "PYTHONPATH": str(PAGE.parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert out.returncode == 0, out.stderr
    assert "Starting with 2 processes" in out.stderr
    (folder,) = (tmp_path / "run" / "workers").glob("last.ckpt.*/0/step*")
    assert len([*folder.glob("*.distcp")]) == 2  # of two workers
