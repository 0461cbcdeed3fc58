"""Promises about bench/midpoint.py, midpoint_*.py and Fashion-MNIST in images.py:

- every part runs with small settings, and `show` prints what was kept;
- finished runs are not made again, and half a line is dropped;
- idx files are read, compressed or not, and what is not in that format is refused with the reason;
- the networks of all workers, run as one with grouped convolutions, equal torch's modules to 1e-5.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import images  # noqa: E402
import midpoint  # noqa: E402
import midpoint_characters  # noqa: E402
import midpoint_fashion  # noqa: E402
import midpoint_label8k  # noqa: E402
import midpoint_regression  # noqa: E402
import midpoint_tables  # noqa: E402
from midpoint_runs import Runs  # noqa: E402


def run(part: str, tmp_path: Path, *more: str) -> list[dict]:
    path = tmp_path / f"midpoint_{part}.jsonl"
    midpoint.main([part, "--results", str(path), *more])
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(part: str, tmp_path: Path, capsys) -> str:
    capsys.readouterr()
    midpoint.main(["show", part, "--folder", str(tmp_path)])
    return capsys.readouterr().out


def some_images(count: int) -> images.Images:
    random = torch.Generator().manual_seed(0)
    return images.Images(torch.randn(count, 1, 28, 28, generator=random), torch.arange(count) % 10)


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_growth(tmp_path, capsys):
    records = run("tables", tmp_path, "--only", "growth", "--largest", "16")
    assert all(r["growth"] < 1 for r in records)
    assert "one-peer-exponential 16" in shown("tables", tmp_path, capsys)


def test_range_and_bias(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(midpoint_tables, "RANGE", (("ring", 8),))
    monkeypatch.setattr(midpoint_tables, "BIAS", (("ring", 8, 2e-2),))
    monkeypatch.setattr(midpoint_tables, "STEPS", 100)
    run("tables", tmp_path, "--only", "range")
    records = run("tables", tmp_path, "--only", "bias")
    alike = next(r for r in records if r.get("case") == "mi-dmsgd" and r["curvature"] == "alike")
    assert alike["limit"] == pytest.approx(3.8, rel=1e-3)
    exact = next(r for r in records if r.get("case") == "mi-dmsgd, kappa inf")
    assert exact["end"] < 1e-15
    text = shown("tables", tmp_path, capsys)
    assert "largest stable lr * h" in text and "peak" in text


def test_regression(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(midpoint_regression, "STEPS", 100)
    records = run("regression", tmp_path, "--workers", "8", "--graphs", "ring", "exponential", "--lr", "0.02")
    assert len(records) == 16
    refused = {(r["graph"], r["method"]) for r in records if r["refused"]}
    assert ("exponential", "decentlam") in refused and not any(m == "mi-dmsgd" for _, m in refused)
    assert "refused 1.24" in shown("regression", tmp_path, capsys)


def test_digits(tmp_path, capsys):
    pytest.importorskip("sklearn")
    more = ("--seeds", "1", "--workers", "4", "--lr", "0.4", "--steps", "3")
    records = run("digits", tmp_path, *more)
    assert len(records) == 16 and {r["clip"] for r in records} == {None, "spikes"}
    assert run("digits", tmp_path, *more) == records  # nothing was made again
    assert "mi-dmsgd, clip" in shown("digits", tmp_path, capsys)


def test_fashion(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(midpoint_fashion, "data", lambda: (some_images(160), some_images(40)))
    midpoint_fashion.shares.cache_clear()
    records = run("fashion", tmp_path, "--seeds", "1", "--workers", "4", "--lr", "0.1", "--batch", "8")
    midpoint_fashion.shares.cache_clear()
    assert len(records) == 16 and {r["steps"] for r in records} == {5}
    assert "worst worker" in shown("fashion", tmp_path, capsys)


def test_label8k(tmp_path, capsys, monkeypatch):
    flat = [images.Images(part.x.flatten(1), part.y) for part in (some_images(160), some_images(40))]
    monkeypatch.setattr(midpoint_label8k, "data", lambda: flat)
    monkeypatch.setattr(midpoint_label8k, "LARGE", 800)  # 4 steps
    variants = ("kappa = inf", "awc", "reference follows drops at once", "lazy ring", "no warm-up", "cosine")
    more = ("--methods", "mi-dmsgd", "--variants", *variants)
    records = run("label8k", tmp_path, "--seeds", "1", "--lr", "0.05", "--batch", "64", *more)
    assert {r["variant"] for r in records} == {"", *variants} and all(np.isfinite(r["accuracy"]) for r in records)
    assert "reference follows drops" in shown("label8k", tmp_path, capsys)


def test_characters(tmp_path, capsys):
    (record,) = run("characters", tmp_path, "--seeds", "1", "--workers", "2", "--steps", "2", "--batch", "1")
    losses = record["loss"]
    assert set(losses) == set(midpoint_characters.METHODS)
    # AdamW inside Gossip is the method adamw: one step, two texts.
    assert losses["adamw"] == pytest.approx(losses["gossip atc"], abs=1e-3)
    assert "less all-reduce" in shown("characters", tmp_path, capsys)


def test_half_a_line_is_dropped(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"lr": 0.1, "end": 1.0}\n{"lr": 0.2, "e')
    runs, made = Runs(path), []
    runs.make([{"lr": 0.1}, {"lr": 0.2}], lambda job: made.append(job) or {"end": 2.0})
    assert made == [{"lr": 0.2}]
    assert [r["end"] for r in Runs(path).records] == [1.0, 2.0]


def test_unknown_part(capsys):
    with pytest.raises(SystemExit):
        midpoint.main(["show", "nothing"])
    assert "there is no part 'nothing'" in capsys.readouterr().err


# -- Fashion-MNIST -----------------------------------------------------------------------------------------------------


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


@pytest.fixture
def folder(tmp_path):
    """Five images and three, one part compressed as the packages have it, the other not."""
    random = np.random.default_rng(0)
    for part, count, packed in (("train", 5, True), ("t10k", 3, False)):
        for kind, shape, high in (("images-idx3", (count, 28, 28), 256), ("labels-idx1", (count,), 10)):
            raw = idx(random.integers(0, high, shape, dtype=np.uint8))
            path = tmp_path / f"{part}-{kind}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                path.write_bytes(raw)
    return tmp_path


def test_idx_files_are_read(folder):
    train, test = images.fashion_mnist(folder)
    assert train.x.shape == (5, 1, 28, 28) and test.y.shape == (3,)
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    byte = raw[16 + 2 * 784 + 3 * 28 + 4]  # image 2, row 3, column 4
    assert train.x[2, 0, 3, 4] == pytest.approx((byte / 255 - images.FASHION_MEAN) / images.FASHION_STD, abs=1e-5)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "no idx file"),
        (lambda path: path.write_bytes(b"\0\0"), "no idx file"),
        (lambda path: path.write_bytes(b"\0\0\x0d" + path.read_bytes()[3:]), "no idx file"),
        (lambda path: path.write_bytes(idx(np.array([1, 2, 10], np.uint8))), "0 to 9"),
        (lambda path: path.unlink(), "there is neither"),
    ],
)
def test_other_idx_files_are_refused(folder, spoil, message):
    spoil(folder / "t10k-labels-idx1-ubyte")
    with pytest.raises(ValueError, match=message):
        images.fashion_mnist(folder)


def test_no_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FASHION_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(ValueError, match="dataset-fashion-mnist"):
        images.fashion_mnist()


def test_fashion_mnist_itself():
    if not any(f.is_dir() for f in images.FASHION_FOLDERS):
        pytest.skip("Fashion-MNIST is not here: Debian's package dataset-fashion-mnist installs it")
    train, test = images.fashion_mnist()
    assert len(train.y) == 60_000 and len(test.y) == 10_000
    assert (train.y.bincount() == 6_000).all() and (test.y.bincount() == 1_000).all()
    assert abs(float(train.x.mean())) < 1e-3 and float(train.x.std()) == pytest.approx(1, abs=1e-3)


def test_networks_as_one():
    """Grouped convolutions against nn.Conv2d and nn.BatchNorm2d: logits, gradients and running statistics."""
    networks = midpoint_fashion.Networks(3)
    x = torch.stack([networks.start(seed) for seed in range(3)])
    batch = some_images(12)
    pixels, labels = batch.x.view(3, 4, 1, 28, 28), batch.y.view(3, 4)
    g = networks.gradients(x, pixels, labels)
    a, b = midpoint_fashion.CHANNELS
    for i in range(3):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, a, 3, 2, 1, bias=False), nn.BatchNorm2d(a), nn.ReLU(),
            nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.Flatten(), nn.Linear(49 * b, 10),
        )  # fmt: skip
        nn.utils.vector_to_parameters(x[i], net.parameters())
        nn.functional.cross_entropy(net(pixels[i]), labels[i]).backward()
        wanted = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
        assert torch.allclose(g[i], wanted, atol=1e-5)
        for mine, name in zip(networks.running, ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"),
                              strict=True):  # fmt: skip
            assert torch.allclose(mine.view(3, -1)[i], net.state_dict()[name], atol=1e-5)
        own = midpoint_fashion.Networks(1)
        own.running = [r.view(3, -1)[i] for r in networks.running]
        net.eval()
        with torch.no_grad():
            right = 100 * float((net(batch.x).argmax(1) == batch.y).float().mean())
        assert own.accuracy(x[i : i + 1], batch) == [pytest.approx(right)]
