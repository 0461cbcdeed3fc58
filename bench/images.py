"""Images for bench/large_batch.py and midpoint.py, dealt to workers, and the networks that learn them.

Digits are scikit-learn's 1,797 handwritten ones, 8x8, with a network of two convolutions. CIFAR-10 is read from its
*binary* layout (https://www.cs.toronto.edu/~kriz/cifar.html: `cifar-10-batches-bin`), with ResNet-20 of He et al. 2016.
Fashion-MNIST's 70,000 images, 28x28 (https://github.com/zalandoresearch/fashion-mnist), are read from idx files.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

DIGITS_TEST = 597  # of 1,797; 1,200 are trained on
CIFAR10_FILES = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")
RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane, row by row
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images
FASHION_MEAN, FASHION_STD = 0.2860, 0.3530  # of the training images
FASHION_FOLDERS = (
    Path(__file__).resolve().parents[2] / "shared/data/fashion-mnist",  # beside the checkout
    Path("/usr/share/datasets/fashion-mnist"),  # Debian's and Ubuntu's package dataset-fashion-mnist
    Path("data/FashionMNIST/raw"),  # torchvision.datasets.FashionMNIST("data", download=True)
)


class Images(NamedTuple):
    x: torch.Tensor  # [m, channels, height, width] float32
    y: torch.Tensor  # [m] int64, 0 to 9

    def __getitem__(self, index) -> Images:  # type: ignore[override]
        return Images(self.x[index], self.y[index])

    def to(self, device: torch.device | str) -> Images:
        return Images(self.x.to(device), self.y.to(device))


def digits(seed: int) -> tuple[Images, Images]:
    """Training and test images, shuffled and parted by `seed`; pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.target))
    x = torch.from_numpy(bunch.images[order, None].astype(np.float32) / 16)
    y = torch.from_numpy(bunch.target[order].astype(np.int64))
    return Images(x[DIGITS_TEST:], y[DIGITS_TEST:]), Images(x[:DIGITS_TEST], y[:DIGITS_TEST])


def cifar10(folder: Path) -> tuple[Images, Images]:
    """Training and test images of a folder in CIFAR-10's binary layout, channels normalized.

    Raises ValueError for a missing file, a size that is no multiple of 3,073 bytes, or a label above 9.
    """
    parts = []
    for name in CIFAR10_FILES:
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"there is no {path}: the folder must hold {', '.join(CIFAR10_FILES)}")
        raw = np.fromfile(path, dtype=np.uint8)
        if raw.size == 0 or raw.size % RECORD:
            raise ValueError(
                f"{path} has {raw.size:,} bytes, which is no multiple of {RECORD:,} (1 label, 3,072 pixels)"
            )
        records = raw.reshape(-1, RECORD)
        if records[:, 0].max() > 9:
            raise ValueError(f"{path}: label {records[:, 0].max()} in CIFAR-10, whose labels are 0 to 9")
        parts.append(records)

    def images(records: np.ndarray) -> Images:
        x = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32)).float() / 255
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CIFAR10_MEAN, CIFAR10_STD))
        return Images((x - mean) / std, torch.from_numpy(records[:, 0].astype(np.int64)))

    return images(np.concatenate(parts[:-1])), images(parts[-1])


def fashion_mnist(folder: Path | None = None) -> tuple[Images, Images]:
    """60,000 images to train on and 10,000 to test with, of mean 0 and deviation 1.

    folder: where the four idx files are, compressed or not; else the first of FASHION_FOLDERS that exists.

    Raises ValueError where there are none, or where a file is not in idx format.
    """
    folders = FASHION_FOLDERS if folder is None else (Path(folder),)
    found = next((f for f in folders if f.is_dir()), None)
    if found is None:
        raise ValueError(
            f"Fashion-MNIST is in none of {', '.join(map(str, folders))}: install Debian's package"
            " dataset-fashion-mnist, or name the folder of train-images-idx3-ubyte.gz"
        )

    def images(part: str) -> Images:
        x, y = read_idx(found / f"{part}-images-idx3-ubyte"), read_idx(found / f"{part}-labels-idx1-ubyte")
        if x.ndim != 3 or x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or y.max() > 9:
            raise ValueError(
                f"{found}: {part} has images {x.shape} and labels {y.shape}, not [m, 28, 28] and [m], 0 to 9"
            )
        pixels = torch.from_numpy(x[:, None]).float() / 255
        return Images((pixels - FASHION_MEAN) / FASHION_STD, torch.from_numpy(y.astype(np.int64)))

    return images("train"), images("t10k")


def read_idx(path: Path) -> np.ndarray:
    """Unsigned bytes in idx format: 0, 0, 8, the number of axes, their sizes in big-endian int32, the values."""
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise ValueError(f"there is neither {path} nor {packed.name}")
    raw = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    axes = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw[4 : 4 + 4 * axes], ">i4") if len(raw) >= 4 + 4 * axes else ()
    if not axes or len(raw) != 4 + 4 * axes + math.prod(map(int, shape)):
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def crop_and_flip(x: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Every image of x [..., c, h, w] shifted by up to `padding` pixels each way, and every second one mirrored.

    Zeros move in. On x's device, one gather for all images; `generator` must live there too.
    """
    images = x.reshape(-1, *x.shape[-3:])
    m, (h, w), device = len(images), x.shape[-2:], x.device
    top, left = torch.randint(0, 2 * padding + 1, (2, m, 1), generator=generator, device=device)
    mirrored = torch.rand(m, 1, generator=generator, device=device) < 0.5
    rows = top + torch.arange(h, device=device)
    columns = left + torch.arange(w, device=device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = nn.functional.pad(images, (padding,) * 4)
    i = torch.arange(m, device=device)[:, None, None]
    # Indices around a slice: the channels come last.
    return padded[i, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).reshape(x.shape)


# -- who has which image, and when -------------------------------------------------------------------------------------


def deal(y: np.ndarray, workers: int, alpha: float | None, rng: np.random.Generator) -> np.ndarray:
    """Indices into y, [workers, len(y) // workers]: shares of equal size that do not overlap.

    alpha: None deals at random. A number gives each worker its own mixture of the classes, drawn from a Dirichlet
    distribution (Hsu et al. 2019): at 0.1 most have one to three classes, at 100 all have them alike. The workers draw
    an image in turn; who finds none left of the classes it likes draws from the rest.
    """
    order = rng.permutation(len(y))
    size = len(y) // workers
    if size < 1:
        raise ValueError(f"{len(y)} images are too few for {workers} workers")
    if alpha is None:
        return order[: workers * size].reshape(workers, size)
    classes = [list(order[y[order] == c]) for c in range(int(y.max()) + 1)]
    mixture = rng.dirichlet([alpha] * len(classes), workers)
    shares: list[list[int]] = [[] for _ in range(workers)]
    for _ in range(size):
        for share, likes in zip(shares, mixture, strict=True):
            left = np.array([len(c) for c in classes], dtype=np.float64)
            weights = likes * (left > 0)
            weights = weights if weights.sum() > 0 else left
            share.append(classes[rng.choice(len(classes), p=weights / weights.sum())].pop())
    return np.array(shares)


def batches(shares: np.ndarray, steps: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Every worker's images of every step, [steps, workers, size]: its share, shuffled anew each time it has ended."""
    rounds = math.ceil(steps * size / shares.shape[1])
    streams = [np.concatenate([rng.permutation(share) for _ in range(rounds)])[: steps * size] for share in shares]
    return np.stack(streams).reshape(len(shares), steps, size).swapaxes(0, 1)


# -- networks ----------------------------------------------------------------------------------------------------------


def digits_network() -> nn.Module:
    """3,818 parameters; no normalization."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al.'s option A: stride, and zero channels)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.more = outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return (y + shortcut).relu()


def resnet20() -> nn.Module:
    """He et al. 2016, section 4.2, n = 3: 269,722 parameters for 3x32x32 images."""
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        *(Block(a, b) for a, b in zip(widths, widths[1:], strict=False)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
