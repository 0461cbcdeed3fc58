"""Average precision of boxes at an overlap of one half: how good a detector is, in one number per class.

A detection is right if it lies on a box of its class and image that no detection of a higher score has taken: if their
intersection over union (IoU) is at least 0.5. Detections of all images in the order of their scores have after each of
them a precision (how many are right) and a recall (how many boxes are found). The average precision is the area under
this curve, where the precision at a recall is the largest at this recall or any larger one (PASCAL VOC 2010 and later;
COCO reads the same curve at 101 recalls).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

Sample = Mapping[str, Tensor]
Scores = dict[int, tuple[list[float], list[bool], int]]  # by class: scores, whether right, number of boxes to be found


def matches(detected: Iterable[Sample], targets: Iterable[Sample], overlap: float = 0.5) -> Scores:
    """What was detected in each of some images, compared with what there is. Counts of several ranks can be added.

    Args:
        detected: for each image boxes [D, 4] (x1, y1, x2, y2), labels [D] and scores [D], as torchvision's models give.
        targets: for each image boxes [B, 4] and labels [B]; iscrowd [B] marks boxes of many objects: what lies on one
            of them by at least `overlap` of its own area counts neither as right nor as wrong.
        overlap: the IoU from which on a detection is right.
    """
    scores: dict[int, list[float]] = defaultdict(list)
    right: dict[int, list[bool]] = defaultdict(list)
    boxes: dict[int, int] = defaultdict(int)
    for found, target in zip(detected, targets, strict=True):
        crowd = target.get("iscrowd", torch.zeros_like(target["labels"])).bool()
        for label in {*found["labels"].tolist(), *target["labels"].tolist()}:
            there = target["boxes"][(target["labels"] == label) & ~crowd]
            crowds = target["boxes"][(target["labels"] == label) & crowd]
            mine = found["labels"] == label
            order = found["scores"][mine].argsort(descending=True, stable=True)
            boxes[label] += len(there)
            free = torch.ones(len(there), dtype=torch.bool)
            for box, score in zip(found["boxes"][mine][order], found["scores"][mine][order].tolist(), strict=True):
                iou = box_iou(box[None], there)[0] * free
                hit = len(there) > 0 and iou.max().item() >= overlap
                if hit:
                    free[iou.argmax()] = False
                elif len(crowds) and _inside(box, crowds) >= overlap:
                    continue
                scores[label].append(score)
                right[label].append(hit)
    return {label: (scores[label], right[label], count) for label, count in boxes.items()}


def _inside(box: Tensor, crowds: Tensor) -> float:
    """The largest share of a box's area that lies in one of the others."""
    corners = torch.cat([torch.maximum(box[:2], crowds[:, :2]), torch.minimum(box[2:], crowds[:, 2:])], 1)
    sides = (corners[:, 2:] - corners[:, :2]).clamp(min=0)
    return (sides.prod(1).max() / box_area(box[None])[0]).item()


def average_precision(parts: Iterable[Scores]) -> dict[int, float]:
    """The average precision, in [0, 1], of each class that has boxes, from the counts of all images."""
    scores: dict[int, list[float]] = defaultdict(list)
    right: dict[int, list[bool]] = defaultdict(list)
    boxes: dict[int, int] = defaultdict(int)
    for part in parts:
        for label, (values, hits, count) in part.items():
            scores[label] += values
            right[label] += hits
            boxes[label] += count
    return {label: _area(scores[label], right[label], count) for label, count in sorted(boxes.items()) if count}


def _area(scores: list[float], right: list[bool], boxes: int) -> float:
    if not scores:
        return 0.0
    order = torch.tensor(scores, dtype=torch.float64).argsort(descending=True, stable=True)
    hits = torch.tensor(right, dtype=torch.float64)[order]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    return (best_from_here * hits).sum().item() / boxes  # recall rises by 1 / boxes where a box is found
