"""Images with boxes to train a detector on: drawn here, or COCO's.

A dataset of your own gives what `wrap_dataset_for_transforms_v2(CocoDetection(...))` gives: an image and a target, a
dictionary of boxes [B, 4] (`tv_tensors.BoundingBoxes`), labels [B] from 1 on, image_id, area [B] and iscrowd [B]. An
image without boxes is welcome, with a target that has image_id alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

SHAPES = ("rectangle", "circle", "triangle")  # labels 1, 2, 3; 0 is the background
COCO_CLASSES = 91  # its labels have gaps
KEYS = ("boxes", "labels", "image_id", "area", "iscrowd")


class Shapes(Dataset):
    """Rectangles, circles and triangles of random colors on noise, none to `most` in an image, which may overlap.

    An image is made from (seed, index) alone: workers with unlike seeds have unlike images, the same in every epoch.

    Args:
        count: how many images.
        size: pixels of an image's side.
        seed: of all of them.
        favorite: the label that four of five shapes have; None: all are equally frequent.
        transforms: called with an image and its target, as torchvision's datasets do.
        most: the largest number of shapes in an image.
    """

    def __init__(
        self, count: int, size: int = 96, seed: int = 0, favorite: int | None = None, transforms: Any = None,
        most: int = 3,
    ):  # fmt: skip
        self.count, self.size, self.seed, self.favorite = count, size, seed, favorite
        self.transforms, self.most = transforms, most

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        image = torch.randint(0, 120, (3, self.size, self.size), generator=random)
        boxes, labels = [], []
        for _ in range(int(torch.randint(0, self.most + 1, (), generator=random))):
            label = int(torch.randint(1, len(SHAPES) + 1, (), generator=random))
            if self.favorite is not None and torch.rand((), generator=random) < 0.7:  # the others: 0.3 / 3 each
                label = self.favorite
            inside = self._draw(label, random)
            color = torch.randint(100, 256, (3, 1), generator=random)
            image[:, inside] = color + torch.randint(-20, 21, (3, int(inside.sum())), generator=random)
            rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            labels.append(label)
        target: dict[str, Any] = {"image_id": index}
        if boxes:  # else image_id alone, as COCO's wrapper does
            found = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(self.size, self.size))  # type: ignore
            sides = found[:, 2:] - found[:, :2]
            target |= {"boxes": found, "labels": torch.tensor(labels)}
            target |= {"area": sides.prod(1).tolist(), "iscrowd": [0] * len(labels)}
        drawn = tv_tensors.Image(image.clamp(0, 255).to(torch.uint8))
        return (drawn, target) if self.transforms is None else self.transforms(drawn, target)

    def _draw(self, label: int, random: torch.Generator) -> Tensor:
        """Which pixels [size, size] a shape covers, a sixth to two fifths of the image's side wide."""
        low, high = self.size // 6, 2 * self.size // 5
        width, height = torch.randint(low, high + 1, (2,), generator=random).tolist()
        if SHAPES[label - 1] == "circle":
            height = width
        left = int(torch.randint(0, self.size - width + 1, (), generator=random))
        top = int(torch.randint(0, self.size - height + 1, (), generator=random))
        y = (torch.arange(self.size)[:, None] + 0.5 - top) / height  # in [0, 1] inside of the box
        x = (torch.arange(self.size)[None, :] + 0.5 - left) / width
        if SHAPES[label - 1] == "circle":
            return (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.25
        if SHAPES[label - 1] == "triangle":
            return (y < 1) & ((x - 0.5).abs() < y / 2)
        return (0 < x) & (x < 1) & (0 < y) & (y < 1)


def coco(folder: Path, images: str, transforms: Any) -> Dataset:
    """COCO's images "train" or "val" as they are unpacked: annotations/instances_*2017.json, train2017/, val2017/.

    Needs pycocotools. The data were not at hand: what has run is a small folder of this form.
    """
    where, annotations = folder / f"{images}2017", folder / "annotations" / f"instances_{images}2017.json"
    dataset = CocoDetection(str(where), str(annotations), transforms=transforms)
    return wrap_dataset_for_transforms_v2(dataset, target_keys=KEYS)


# -- from a dataset's sample to a batch --------------------------------------------------------------------------------


def transforms(train: bool) -> v2.Compose:
    """As torchvision's reference does: flipped with their boxes, floating-point, impossible boxes left out."""
    flip = [v2.RandomHorizontalFlip(0.5)] if train else []
    clean = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_per_box)]
    last = [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([Complete(crowds=not train), v2.ToImage(), *flip, *clean, *last])


class Complete:
    """Gives every target all five entries, as tensors, be there boxes or none.

    crowds: whether boxes of many objects stay; the reference trains without.
    """

    def __init__(self, crowds: bool):
        self.crowds = crowds

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        size = functional.get_size(image)
        boxes = target.get("boxes", torch.zeros(0, 4))
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size, dtype=torch.float32)  # type: ignore
        full = {
            "boxes": boxes,
            "labels": torch.as_tensor(target.get("labels", ()), dtype=torch.int64),
            "image_id": torch.as_tensor(target["image_id"]),
            "area": torch.as_tensor(target.get("area", [0.0] * len(boxes)), dtype=torch.float32),
            "iscrowd": torch.as_tensor(target.get("iscrowd", [0] * len(boxes)), dtype=torch.int64),
        }
        if not self.crowds and full["iscrowd"].any():
            one = full["iscrowd"] == 0
            full |= {name: full[name][one] for name in ("labels", "area", "iscrowd")}
            full["boxes"] = tv_tensors.wrap(boxes[one], like=boxes)
        return image, full


def _per_box(sample: tuple[Any, dict[str, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(sample[1][name] for name in ("labels", "area", "iscrowd"))


def collate(batch: Sequence[tuple[Any, Any]]) -> tuple[tuple, ...]:
    """Images differ in size and in their number of boxes: a batch is a tuple of images and one of targets."""
    return tuple(zip(*batch, strict=True))
