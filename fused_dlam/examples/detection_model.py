"""Detectors: a small Faster R-CNN for small images, and those of torchvision by their names. Nothing is downloaded."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops._utils import split_normalization_params

STAGES = (16, 32, 64, 64)  # channels; the first three halve the image's sides


def small(classes: int, size: int, trainable: int) -> nn.Module:
    """A Faster R-CNN of 0.3 million parameters for images of `size` pixels a side.

    Its backbone's first stages, all but `trainable` of the four, are frozen as torchvision freezes those of a
    pretrained one: parameters without gradients, and BatchNorm whose statistics and factors are fixed buffers.
    """
    if not 0 <= trainable <= len(STAGES):
        raise ValueError(f"the backbone has {len(STAGES)} layers: {trainable} of them cannot be trainable")
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, width in enumerate(STAGES):
        frozen = number < len(STAGES) - trainable
        norm = FrozenBatchNorm2d(width) if frozen else nn.BatchNorm2d(width)
        convolution = nn.Conv2d(channels, width, 3, 2 if number < 3 else 1, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        convolution.requires_grad_(not frozen)
        stages[f"layer{number + 1}"] = nn.Sequential(convolution, norm, nn.ReLU())
        channels = width
    backbone = nn.Sequential(stages)
    backbone.out_channels = channels  # type: ignore[assignment]
    sides = tuple(round(size * part) for part in (0.2, 0.3, 0.4))
    return FasterRCNN(
        backbone,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator((sides,), ((0.6, 1.0, 1.7),)),
        rpn_pre_nms_top_n_train=200, rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        box_head=TwoMLPHead(channels * 5 * 5, 128),
        box_predictor=FastRCNNPredictor(128, classes),
        box_batch_size_per_image=64,
        box_detections_per_img=20,
    )  # fmt: skip


def models() -> tuple[str, ...]:
    """Models that `build` knows: of torchvision's those that find boxes in images of any size."""
    theirs = torchvision.models.list_models(torchvision.models.detection)
    return "small", *(name for name in theirs if name.startswith(("fasterrcnn", "retinanet", "fcos")))


def build(name: str, classes: int, size: int, trainable: int, weights_backbone: str | None = None) -> nn.Module:
    """A detector for `classes` classes, the background included.

    Args:
        name: one of `models()`.
        classes: how many, with the background.
        size: pixels to which the shorter side of an image is scaled.
        trainable: how many of the backbone's layers are trained, counted from its end. Of torchvision's models without
            weights_backbone all are: it freezes what has been trained alone.
        weights_backbone: weights that torchvision downloads, such as "IMAGENET1K_V1" (not tried here).

    Raises ValueError for another name, and for more layers than there are.
    """
    if name == "small":
        return small(classes, size, trainable)
    if name not in models():
        raise ValueError(f"no model {name!r}; there are {', '.join(models())}")
    return torchvision.models.get_model(
        name, weights=None, weights_backbone=weights_backbone, num_classes=classes, min_size=size,
        trainable_backbone_layers=trainable if weights_backbone else None,
    )  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float | None) -> list[dict[str, Any]]:
    """What is trained, as groups for an optimizer: normalization layers have a weight decay of their own.

    norm_weight_decay: None: that of all others, in one group.
    """
    if norm_weight_decay is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    norms, others = split_normalization_params(model)
    pairs: list[tuple[list[torch.Tensor], float]] = [(norms, norm_weight_decay), (others, weight_decay)]
    return [{"params": params, "weight_decay": decay} for params, decay in pairs if params]
