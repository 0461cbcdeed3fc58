"""Promises of fused_dlam/frameworks/fabric.py, on two workers with unlike data.

- Steps are those of a plain loop, bit for bit, with accumulation too. All starts from rank 0's values.
- Fabric's wrapper of the optimizer has the optimizer's methods and properties: `averaged`, `join`, `bytes_sent`.
- `fabric.save` writes the mean into one file, of every module in the state, and `fabric.load` goes on bit for bit.
- `fabric.clip_gradients` clips unscaled gradients in mixed precision, bit for bit as a plain loop does; after an
  overflow on one rank too. Two optimizers are clipped and step in turn, or are told to.
- Ranks with unlike numbers of batches train within `join`.
- DDP with an optimizer of ours is refused, and so is an optimizer that would train alone.
- The page's example runs as it stands, and goes on when it is run again.
"""

import importlib.util
import re
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
# optimizer, to what, by, whether in float16 with a scaler
CLIPPED = [("sgd", 0.1, "norm", True), ("adamw", 0.02, "value", True), ("adamw", 0.1, "norm", False)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank returned, by call."""
    if "lightning.pytorch" not in launch.PRELOAD:
        launch.PRELOAD.append("lightning.pytorch")  # imported once, not by every process
    folder = str(tmp_path_factory.mktemp("fabric"))
    part = example().replace("+ 1, 5)", "+ 1, 3)")
    calls = {
        "sgd as a loop": ("as_a_loop", "sgd", 1),
        "adamw as a loop": ("as_a_loop", "adamw", 2),
        "awc as a loop": ("as_a_loop", "awc", 2),
        "sgd resumed": ("resumed", folder, "sgd"),
        "adamw resumed": ("resumed", folder, "adamw"),
        "awc resumed": ("resumed", folder, "awc"),
        "two clipped": ("two_clipped",),
        "uneven": ("uneven",),
        "buffers": ("buffers",),
        "refused": ("refused",),
    }
    for case in CLIPPED:
        calls[f"clipped {case}"] = "clipped", *case
    named = {name: (called, "fabric_workers", *call) for name, call in calls.items()}
    script = "script", str(tmp_path_factory.mktemp("example")), part, example()
    named["example"] = (called, "lightning_workers", *script)
    return run_together(2, named, deadline=240)


def example():
    code = re.search(r"```python\n(# fabric.py.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert code.count("\n") <= 30
    return code


@pytest.mark.parametrize("kind", ["sgd", "adamw", "awc"])
def test_steps_are_those_of_a_plain_loop(found, kind):
    ranks = found[f"{kind} as a loop"]
    for path, expected, means, expected_means, (distance, seen, sent) in ranks:
        assert torch.equal(path, expected) and torch.equal(means, expected_means)
        assert (distance > 0) == (kind != "adamw")  # whose two workers average x + d exactly
        assert seen == sent > 0
    assert not torch.equal(ranks[0][0], ranks[1][0])


@pytest.mark.parametrize("kind", ["sgd", "adamw", "awc"])
def test_training_goes_on_bit_for_bit(found, kind):
    for rank, said in enumerate(found[f"{kind} resumed"]):
        assert torch.equal(said["rest"], said["parts"])
        assert torch.equal(said["mean"], said["file"]) and torch.equal(said["mean"], said["model alone"])
        assert said["ema"] == (float(rank), 0.5)
        assert said["remainder"] == ({"note": "kept"}, 1)
        assert said["folders"] <= 3  # of three kinds, one file each


@pytest.mark.parametrize("case", CLIPPED)
def test_unscaled_gradients_are_clipped(found, case):
    _, clip, by, sixteen = case
    for rank, (path, expected, norms, scales) in enumerate(found[f"clipped {case}"]):
        assert torch.equal(path, expected)
        assert by == "value" or clip < norms[0] < 50
        if sixteen:
            assert scales == ((1024.0, 512.0)[rank],) * 2  # of torch's scaler: each rank's own


def test_two_optimizers_are_clipped_in_turn(found):
    assert all("right before its step()" in said for said in found["two clipped"])


def test_uneven_data(found):
    (steps, distance), (other, _) = found["uneven"]
    assert steps == other == 5 and distance > 0


def test_all_start_from_rank_0(found):
    first, second = found["buffers"]
    assert torch.equal(first, second) and float(first[:30].abs().max()) == 0


def test_what_is_refused(found):
    for said in found["refused"]:
        assert "train alone" in said["plain"] and "GossipFabricStrategy" in said["plain"]
        assert "DistributedDataParallel" in said["ddp"] and "GossipFabricStrategy" in said["ddp"]
        assert "URL" in said["url"]


def test_the_example(found):
    (first, names), (second, _) = found["example"][0]
    assert re.findall(r"epoch (\d): [\d.]+\n", first) == ["1", "2"] and names == {"last.ckpt", "workers"}
    assert re.findall(r"epoch (\d): [\d.]+\n", second) == ["3", "4"]
