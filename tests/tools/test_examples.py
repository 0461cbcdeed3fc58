"""Promises about the examples:

- the page of the examples shows the very diff of ddp.py and gossip.py, at most five lines each way;
- with four workers, autocast on and off, both end within 3 points of each other, above 95 %;
- a run of gossip.py that was killed and resumed in new processes ends as one that was not, bit for bit, on every
  worker; one of ddp.py within 1e-2, for DDP rebuilds its buckets after its first step, which changes the order of sums
  (6e-8 apart without autocast; 0 with find_unused_parameters=True, which leaves the buckets alone);
- gossip goes on from DDP's checkpoints; the model it saves for use is the workers' mean, to float32's rounding;
- torchrun starts it; with Accelerate two workers learn the same, accumulate, save, go on, join, and are told of DDP;
- TensorBoard's event file holds the distances that all workers measured, and the bytes that a step sends.
"""

import difflib
import shutil
import subprocess
import sys
from pathlib import Path

import example_workers as workers
import pytest
import torch
from bitwise import assert_equal

from fused_dlam import examples
from fused_dlam.tools.launch import run_workers

FOLDER = Path(examples.__file__).parent
PAGES = (FOLDER / "README.md",)
N, EPOCHS, KILLED_AT = 4, 4, 2
CASES = [(script, amp) for script in ("ddp", "gossip") for amp in ("--no-amp", "--amp")]


def test_five_lines_from_ddp_to_gossip():
    ddp, gossip = ((FOLDER / name).read_text().splitlines() for name in ("ddp.py", "gossip.py"))
    diff = list(difflib.unified_diff(ddp, gossip, "ddp.py", "gossip.py", n=0, lineterm=""))
    for sign in "-+":
        assert 1 <= sum(line.startswith(sign) for line in diff[2:]) <= 5
    for page in PAGES:
        assert "```diff\n" + "\n".join(diff) + "\n```" in page.read_text(), page


# -- the two scripts ---------------------------------------------------------------------------------------------------


def load(folder, name="checkpoint"):
    return [torch.load(folder / f"{name}{rank}.pt") for rank in range(N)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("examples")
    whole = {case: folder / "whole" / "".join(case) for case in CASES}
    cut = {case: folder / "cut" / "".join(case) for case in CASES}

    def line(out, amp, *more):
        return ["--epochs", str(EPOCHS), "--out", str(out), *([amp] if amp == "--amp" else []), *more]

    first = [(case[0], line(whole[case], case[1]), None) for case in CASES]
    first += [(case[0], line(cut[case], case[1]), KILLED_AT) for case in CASES]
    results = run_workers(workers.scripts, N, first, deadline=120)
    accuracies = dict(zip(CASES, results[0][: len(CASES)], strict=True))
    assert all(result[len(CASES) :] == [None] * len(CASES) for result in results)
    assert all(saved["epoch"] == KILLED_AT for case in CASES for saved in load(cut[case]))
    halfway = {case: folder / "halfway" / "".join(case) for case in CASES}
    for case in CASES:
        shutil.copytree(cut[case], halfway[case])
    moved = folder / "moved"
    shutil.copytree(cut["ddp", "--no-amp"], moved)
    second = [(case[0], line(cut[case], case[1], "--resume"), None) for case in CASES]
    second += [("gossip", line(moved, "--no-amp", "--resume"), None)]
    *_, moved_accuracy = run_workers(workers.scripts, N, second, deadline=120)[0]
    return whole, cut, halfway, accuracies, moved_accuracy


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["--no-amp", "--amp"])
def test_gossip_learns_what_ddp_learns(trained, amp):
    *_, accuracies, _ = trained
    assert abs(accuracies["gossip", amp] - accuracies["ddp", amp]) < 3
    assert min(accuracies["gossip", amp], accuracies["ddp", amp]) > 95


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["--no-amp", "--amp"])
def test_a_resumed_run_is_the_uninterrupted_run(trained, amp):
    whole, cut, *_ = trained
    for rank, (a, b) in enumerate(zip(load(whole["gossip", amp]), load(cut["gossip", amp]), strict=True)):
        assert_equal(a, b, f"rank {rank}")
    for a, b in zip(load(whole["ddp", amp]), load(cut["ddp", amp]), strict=True):
        torch.testing.assert_close(a["net"], b["net"], rtol=1e-2, atol=1e-2)
        assert torch.equal(a["random"], b["random"]) and a["scheduler"] == b["scheduler"]


@pytest.mark.slow
def test_gossip_goes_on_from_checkpoints_of_ddp(trained):
    *_, accuracies, moved = trained
    assert abs(moved - accuracies["ddp", "--no-amp"]) < 3 and moved > 95


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["--no-amp", "--amp"])
def test_workers_differ_and_their_mean_is_saved(trained, amp):
    """Where a run was killed, at half its learning rate: 1e-6, and the workers are 1000 times as far apart."""
    folder = trained[2]["gossip", amp]
    nets = [saved["net"] for saved in load(folder)]
    apart = {}
    for name, value in torch.load(folder / "model.pt").items():
        if value.is_floating_point():
            values = torch.stack([net[name] for net in nets])
            torch.testing.assert_close(value, values.mean(0), rtol=1e-6, atol=1e-6)
            apart[name] = (values - value).abs().max()
    assert apart["8.weight"] > 1e-3 and apart["1.running_mean"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ddp", "gossip"])
def test_autocast_is_used_where_it_is_asked_for(trained, script):
    """bfloat16 moves the weights by more than 1e-4; the scale, a power of two, cannot."""
    plain, amp = (load(trained[0][script, flag])[0] for flag in ("--no-amp", "--amp"))
    assert not plain["scaler"] and amp["scaler"]["scale"] == 2**16
    assert (plain["net"]["8.weight"] - amp["net"]["8.weight"]).abs().max() > 1e-4


@pytest.mark.slow
def test_torchrun_starts_the_script(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fused_dlam.examples.gossip", "--epochs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "epoch 1: test accuracy" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint0.pt", "checkpoint1.pt", "model.pt"]


# -- Accelerate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("accelerated")
    cases = [["--epochs", "3", "--precision", p, "--out", str(folder / p)] for p in ("no", "bf16")]
    return run_workers(workers.accelerated, 2, cases, str(folder / "state"), deadline=120), folder


def test_accelerate_learns_and_every_worker_saves_its_own(accelerated):
    ranks, folder = accelerated
    for accuracies in (rank["accuracies"] for rank in ranks):
        assert min(accuracies) > 93
    for i, precision in enumerate(("no", "bf16")):
        first, other = (rank["own"][i] for rank in ranks)
        assert not torch.equal(first["1.running_mean"], other["1.running_mean"])
        for name, value in torch.load(folder / precision / "model.pt").items():
            if value.is_floating_point():
                torch.testing.assert_close(value, (first[name] + other[name]) / 2, rtol=1e-6, atol=1e-6)


def test_accelerate_accumulates(accelerated):
    """1e-6 of one backward pass over both halves; messages leave in the last backward pass before a step alone."""
    for weights, early, as_many in (rank["accumulated"] for rank in accelerated[0]):
        torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)
        assert not any(early[::2]) and all(early[3::2]) and as_many


def test_accelerate_with_a_scaler_is_no_rank_alone(accelerated):
    """Rank 1's overflow halves both scales; three local steps of lr (1 - beta^k)/(1 - beta) each, within 1e-6."""
    first, other = (rank["overflow"] for rank in accelerated[0])
    assert first[0] == other[0] == [1, 1, 0.5, 0.5]
    for _, x in (first, other):
        torch.testing.assert_close(x, torch.full((4,), 1 - 0.1 * (1 + 1.9 + 2.71)), rtol=1e-6, atol=1e-6)


def test_accelerate_saves_and_loads_every_worker(accelerated):
    """A step after loading is the step that was taken before, bit for bit; workers differ. save_model within `averaged`
    saves all of the mean."""
    from safetensors.torch import load_file

    ranks, folder = accelerated
    (first, second, again, path), (other, another, *_) = (rank["saved"] for rank in ranks)
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True)) and path == str(folder / "state" / "last")
    assert not torch.equal(first[1], other[1])
    saved = load_file(folder / "state" / "model" / "model.safetensors")
    assert saved.keys() == {"weight", "bias"}
    torch.testing.assert_close(saved["weight"], (second[0] + another[0]) / 2, rtol=1e-6, atol=1e-6)


def test_accelerate_joins_uneven_data(accelerated):
    assert [rank["uneven"] for rank in accelerated[0]] == [5, 5]


def test_what_is_refused_with_accelerate(accelerated):
    for errors in (rank["refused"] for rank in accelerated[0]):
        assert "DistributedDataParallel" in errors["step"] and "DistributedDataParallel" in errors["prepare"]
        assert "there are 0 and 0" in errors["kept"]


def test_accelerate_goes_on_from_a_checkpoint(accelerated, tmp_path):
    """Two epochs and one more are three, bit for bit."""
    ranks, _ = accelerated
    line = ["--epochs", "3", "--out", str(tmp_path)]
    two, three = run_workers(workers.accelerated_in_parts, 2, line, deadline=120)
    for whole, parts in zip((rank["own"][0] for rank in ranks), (two, three), strict=True):
        assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def test_the_event_file_of_tensorboard(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = ["--steps", "11", "--every", "3", "--out", str(tmp_path)]
    distances = run_workers(workers.dashboard, 4, line, deadline=60)
    assert all(d == distances[0] for d in distances) and len(list(tmp_path.iterdir())) == 1
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curve = [(e.step, e.value) for e in events.Scalars("gossip/consensus_distance")]
    assert [step for step, _ in curve] == [3, 6, 9]
    assert [value for _, value in curve] == pytest.approx(distances[0], rel=1e-6) and min(distances[0]) > 0.01
    parameters = 160 + 32 + 4640 + 64 + 5130
    for event in events.Scalars("gossip/bytes_per_step"):
        assert 4 * parameters <= event.value <= 4 * (parameters + 2048)
    assert {"loss", "lr"} <= set(events.Tags()["scalars"])


def test_every_must_be_positive(tmp_path):
    pytest.importorskip("tensorboard")
    from fused_dlam.examples.dashboard import Curves

    with pytest.raises(ValueError, match="every must be at least 1, not 0"):
        Curves(None, tmp_path, 0)
