"""Promises about bench/large_batch.py, large_batch_training.py and images.py:

- CIFAR-10's binary layout is read byte for byte, and what is not that layout is refused with the reason;
- crops and mirrors move pixels and invent none; shares of the data have equal sizes and do not overlap;
- simulated PmSGD equals torch.optim.SGD on the union of the workers' batches, to 1e-5, schedule and weight decay
  included; the row-of-numbers form of ResNet-20 equals the module bit for bit, running statistics included;
- finished runs are skipped, half a line is cut off, other settings and --fresh train anew; the same seed gives
  bit-equal results;
- bad options end the program with one clear line before anything is trained;
- an unstable method runs on the lazy graph with a footnote, and is refused where that is unstable too.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import images  # noqa: E402
import large_batch  # noqa: E402
import large_batch_training  # noqa: E402
from large_batch import Job  # noqa: E402
from large_batch_training import Network  # noqa: E402


def write_cifar10(folder: Path, records_per_file: int, seed: int = 0) -> np.ndarray:
    """Random images in the standard layout; all records, [6 files, records, 3,073]."""
    rng = np.random.default_rng(seed)
    records = rng.integers(0, 256, (6, records_per_file, images.RECORD), dtype=np.uint8)
    records[:, :, 0] %= 10
    for name, part in zip(images.CIFAR10_FILES, records, strict=True):
        part.tofile(folder / name)
    return records


def options(tmp_path, *more):
    return large_batch.parse(
        ["--results", str(tmp_path / "runs.jsonl"), "--seeds", "1", "--epochs", "2", "--warmup", "1", *more]
    )


# -- images ------------------------------------------------------------------------------------------------------------


def test_cifar10_is_read_byte_for_byte(tmp_path):
    records = write_cifar10(tmp_path, 3)
    train, test = images.cifar10(tmp_path)
    assert train.x.shape == (15, 3, 32, 32) and test.x.shape == (3, 3, 32, 32)
    assert torch.equal(train.y, torch.from_numpy(records[:5, :, 0].reshape(-1).astype(np.int64)))
    # Image 1 of data_batch_2: its green plane starts 1 + 1,024 bytes into the record; pixel (row 2, column 5).
    byte = float(records[1, 1, 1 + 1024 + 2 * 32 + 5])
    assert train.x[4, 1, 2, 5] == pytest.approx((byte / 255 - images.CIFAR10_MEAN[1]) / images.CIFAR10_STD[1], abs=1e-5)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "3,073"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.unlink(), "there is no"),
        (lambda path: path.write_bytes(bytes([10]) + bytes(3072)), "label 10"),
    ],
)
def test_other_files_are_refused(tmp_path, spoil, message):
    write_cifar10(tmp_path, 2)
    spoil(tmp_path / "data_batch_3.bin")
    with pytest.raises(ValueError, match=message):
        images.cifar10(tmp_path)


def test_crops_and_mirrors():
    """Every result is one of the 2 x 81 shifts and mirrors of its image, channels alike; many different ones occur."""
    x = torch.arange(1.0, 1 + 2 * 5 * 7).view(2, 5, 7).expand(3, 40, 2, 5, 7)
    y = images.crop_and_flip(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    padded = nn.functional.pad(x[0, 0], (4,) * 4)
    windows = [padded[:, i : i + 5, j : j + 7] for i in range(9) for j in range(9)]
    known = [w for crop in windows for w in (crop, crop.flip(-1))]
    found = {next(k for k, w in enumerate(known) if torch.equal(w, image)) for image in y.reshape(-1, 2, 5, 7)}
    assert len(found) > 60


@pytest.mark.parametrize("alpha", [None, 0.01, 0.1, 100.0])
def test_shares(alpha):
    y = np.random.default_rng(1).integers(0, 10, 803)
    shares = images.deal(y, 8, alpha, np.random.default_rng(0))
    assert shares.shape == (8, 100) and len(set(shares.ravel())) == 800
    largest = np.mean([np.bincount(y[share], minlength=10).max() for share in shares])
    assert largest > 45 if alpha in (0.01, 0.1) else largest < 30
    order = images.batches(shares, 9, 30, np.random.default_rng(0))
    assert order.shape == (9, 8, 30)
    for i, share in enumerate(shares):  # 270 images from 100: each twice, and 70 of them three times
        counts = np.unique(order[:, i], return_counts=True)
        assert set(counts[0]) == set(share) and sorted(counts[1]) == [2] * 30 + [3] * 70
    with pytest.raises(ValueError, match="too few"):
        images.deal(y[:5], 8, alpha, np.random.default_rng(0))


# -- training ----------------------------------------------------------------------------------------------------------


def test_pmsgd_is_sgd_on_the_union_batch(tmp_path, monkeypatch):
    chosen = options(tmp_path, "--batches", "64")
    job = Job("PmSGD", 64, seed=3, lr=0.1)
    seen = []
    real = large_batch_training.Simulation.step

    def step(self, g, lr):
        seen.append((lr, real(self, g, lr).clone()))
        return seen[-1][1]

    monkeypatch.setattr(large_batch_training.Simulation, "step", step)
    large_batch.train(job, chosen)

    training, _ = images.digits(3)
    shares = images.deal(training.y.numpy(), 8, 0.1, np.random.default_rng(3))
    order = images.batches(shares, len(seen), 8, np.random.default_rng([3, 64]))
    torch.manual_seed(3)
    net = images.digits_network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for union, (lr, x) in zip(order.reshape(len(seen), -1), seen, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(training.x[union]), training.y[union]).backward()
        optimizer.step()
        y = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        assert (x - y).abs().max() < 1e-5
    assert len(seen) == round(2 * 1200 / 64) and len({lr for lr, _ in seen}) > 30


def test_resnet20_as_a_row_of_numbers():
    torch.manual_seed(0)
    module, x, y = images.resnet20(), torch.randn(2, 4, 3, 32, 32), torch.randint(0, 10, (2, 4))
    net = Network(images.resnet20())
    net.start = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    assert len(net.start) == 269_722 and len(net.layers) == 20
    buffers = [{name: b.clone() for name, b in net.buffers.items()} for _ in range(2)]
    g = net.gradients(net.start.expand(2, -1), buffers, x, y)
    nn.functional.cross_entropy(module(x[1]), y[1]).backward()
    assert torch.equal(g[1], torch.cat([p.grad.reshape(-1) for p in module.parameters()]))
    for name, b in module.named_buffers():
        assert torch.equal(b, buffers[1][name]), name
    assert not torch.equal(buffers[0]["1.running_mean"], buffers[1]["1.running_mean"])


@pytest.mark.slow
def test_cifar10_end_to_end(tmp_path):
    """ResNet-20 through the whole program, four workers on a ring: 20 images, one step per epoch."""
    write_cifar10(tmp_path, 4)
    given = ["--data", "cifar10", "--folder", str(tmp_path), "--workers", "4", "--batches", "20", "--epochs", "2"]
    given += [
        "--warmup",
        "1",
        "--graph",
        "ring",
        "--seeds",
        "1",
        "--methods",
        "DecentLaM",
        "--results",
        str(tmp_path / "c.jsonl"),
    ]
    assert large_batch.main(given) == 0
    record = json.loads((tmp_path / "c.jsonl").read_text())
    assert record["steps"] == 2 and not record["diverged"] and 0 < record["train_loss"] < 100
    assert record["distance"] > 0 and (tmp_path / "c.png").stat().st_size > 10_000


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finished_runs_are_skipped(tmp_path, capsys, monkeypatch):
    trained = []
    real = large_batch.train
    monkeypatch.setattr(large_batch, "train", lambda job, *more: trained.append(job) or real(job, *more))
    file = tmp_path / "runs.jsonl"
    given = [
        "--results",
        str(file),
        "--seeds",
        "1",
        "--batches",
        "240",
        "--epochs",
        "2",
        "--warmup",
        "1",
        "--methods",
        "PmSGD",
    ]
    assert large_batch.main(given) == 0
    assert [job.method for job in trained] == ["PmSGD"]
    first = file.read_text()
    file.write_text(first + first[: len(first) // 2])  # killed in the middle of a line
    assert large_batch.main([*given, "PC-DmSGD, one-peer"]) == 0
    assert [job.method for job in trained] == ["PmSGD", "PC-DmSGD, one-peer"]
    assert file.read_text().startswith(first) and len(large_batch.read(file)) == 2
    printed = capsys.readouterr().out
    record = json.loads(first)
    assert f"{record['accuracy']:.1f}" in printed and "10 steps" in printed and "less PmSGD" in printed

    assert large_batch.main([*given, "--fresh"]) == 0
    again = json.loads(file.read_text().splitlines()[-1])
    same = [k for k in record if k not in ("seconds", "environment")]
    assert len(trained) == 3 and [again[k] for k in same] == [record[k] for k in same]
    assert large_batch.main([*given, "--alpha", "1"]) == 0
    assert len(trained) == 4 and len(large_batch.read(file)) == 3


def test_tuning_never_sees_the_test_images(tmp_path, monkeypatch):
    """The rate with the best held-out accuracy is taken; the held-out images are no test images of that seed."""
    chosen = options(tmp_path, "--batches", "120", "--methods", "DmSGD", "--tune", "--lr", "0.2", "--lr-batch", "120")

    def train(job, options, tick):
        held_out = large_batch_training.data_for(job, options)[1]
        _, test = images.digits(job.seed)
        assert job.validation and len(held_out.y) == 150
        assert (held_out.x[:, None] == test.x).flatten(2).all(2).sum() < 3  # the data hold hardly any image twice
        return {"accuracy": 90 if job.lr == 0.1 else 90 - 10 * job.lr, "loss": 1.0}

    monkeypatch.setattr(large_batch, "train", train)
    assert large_batch.rates({}, chosen) == {("DmSGD", 120): 0.1}


def test_unstable_methods_are_said_to_be(tmp_path, monkeypatch, capsys):
    given = ["--batches", "240", "--epochs", "2", "--seeds", "1", "--methods", "D2-DmSGD"]
    chosen = options(tmp_path, *given, "--graph", "ring")  # its smallest eigenvalue is D2's limit, -1/3
    graph, note = chosen.graphs["D2-DmSGD"]
    assert graph.name == "lazy ring" and "unstable on ring" in note and "run on lazy ring" in note
    job = Job("D2-DmSGD", 240, 0, 0.05)
    record = {**job._asdict(), **large_batch.train(job, chosen)}
    assert record["topology"] == "lazy ring" and not record["diverged"]
    text = large_batch.report({"D2-DmSGD": {240: [record, record | {"diverged": True}]}}, tuned=True)
    assert "D2-DmSGD [1]" in text and f"[1] {note}" in text and "[2] 1 of 2 runs overflowed" in text
    assert options(tmp_path, *given).graphs["D2-DmSGD"][1] == ""
    with pytest.raises(SystemExit):
        options(tmp_path, "--graph", "one-peer-exponential")
    assert "decentlam is unstable on one-peer-exponential" in capsys.readouterr().err


def test_runs_that_overflow_are_told(tmp_path):
    chosen = options(tmp_path, "--batches", "64", "--epochs", "4")
    record = large_batch.train(Job("PmSGD", 64, 0, 1e6), chosen)
    assert record["diverged"] and record["accuracy"] < 30


@pytest.mark.parametrize(
    "given, message",
    [
        (["--batches", "100"], "100 of 1200 images"),
        (["--batches", "2048"], "2048 of 1200 images"),
        (["--data", "cifar10"], "--folder"),
        (["--data", "cifar10", "--folder", "nowhere"], "there is no nowhere"),
        (["--alpha", "0"], "--alpha must be"),
        (["--workers", "0"], "--workers must be"),
        (["--warmup", "2"], "--warmup must be"),
        (["--results", "nowhere/runs.jsonl"], "no folder nowhere"),
    ],
)
def test_bad_options(tmp_path, capsys, given, message):
    with pytest.raises(SystemExit):
        options(tmp_path, *given)
    assert message in capsys.readouterr().err


def test_the_learning_rate(tmp_path):
    """Up in a line over the warm-up's share of the steps; then a cosine, or tenths."""
    chosen = options(tmp_path, "--epochs", "9", "--warmup", "1")
    job = Job("PmSGD", 64, 0, 0.5)
    rate = [large_batch_training.learning_rate(k, 90, job, chosen) for k in range(90)]
    assert rate[0] == pytest.approx(0.05) and rate[45] == pytest.approx(0.25) and 0 < rate[-1] < 0.001
    assert max(rate) == max(rate[9:12]) and rate[10:] == sorted(rate[10:], reverse=True)
    chosen.decay = "step"
    rate = [large_batch_training.learning_rate(k, 90, job, chosen) for k in range(90)]
    assert rate[4] == pytest.approx(0.25) and rate[10::20] == pytest.approx([0.5, 0.05, 0.05, 0.005])
    assert rate[-1] == pytest.approx(0.0005)
