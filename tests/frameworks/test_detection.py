"""Promises of the detection example, with two workers in real processes:

- losses are finite and fall; frozen layers, FrozenBatchNorm included, stay bit-equal, in the model and in its EMA;
- what is saved for use is the workers' mean, of the model and of the EMAs, to float32's rounding;
- a run that was ended and resumed in new processes ends as one that was not, bit for bit: parameters, momentum, EMA,
  schedule, random numbers;
- --optimizer pmsgd is DDP with torch's SGD, to 1e-3 of its losses in the first steps;
- where a rank has no boxes, or trains its classifier alone, the others' gradients count half and nobody waits;
- the average precision is that of the definition, drawn shapes lie in their boxes, and data of COCO's form are read.
"""

import json
import math

import pytest
import torch

pytest.importorskip("torchvision")

import detection_workers as workers  # noqa: E402
from bitwise import assert_equal  # noqa: E402
from torchvision.ops import box_iou  # noqa: E402
from workers import run_together  # noqa: E402

from fused_dlam.examples import detection, detection_data  # noqa: E402
from fused_dlam.examples.average_precision import average_precision, matches  # noqa: E402
from fused_dlam.examples.detection_model import build, parameter_groups, small  # noqa: E402

N, LR = 2, 0.1
SMALL = "--images 32 --test-images 6 --size 64 -b 2 --print-freq 5 --lr-steps 2 --timeout 60".split()
WHOLE = [*SMALL, "--uneven", "--norm-weight-decay", "0", "--clip-grad-norm", "5", "--ema-decay", "0.9"]
FEW = [*SMALL, "--images", "8", "--epochs", "1", "--lr", "0.001", "--ema-decay", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    lines = {
        "whole": [*WHOLE, "--epochs", "3"],
        "cut": [*WHOLE, "--epochs", "2"],
        "pmsgd": [*FEW, "--optimizer", "pmsgd"],
        "ddp": [*FEW, "--optimizer", "ddp"],
        "amp": [*FEW, "--optimizer", "decentlam", "--amp"],
    }
    lines = {name: [*line, "--out", str(folder / name)] for name, line in lines.items()}
    calls = {name: (workers.run, line) for name, line in lines.items()}
    calls |= {"without": (workers.without_gradients, LR), "wrapped": (workers.wrapped_twice,)}
    calls["mean"] = (workers.mean_of_losses,)
    found = run_together(N, calls, deadline=120)
    resumed = [*WHOLE, "--epochs", "3", "--out", str(folder / "cut"), "--resume"]
    found |= run_together(N, {"resumed": (workers.run, resumed)}, deadline=120)
    return found, folder


def test_losses_are_finite_and_fall(trained):
    for history, _ in trained[0]["whole"]:
        assert history == trained[0]["whole"][0][0]  # what all ranks decide by is the same
        totals = [sum(epoch.losses.values()) for epoch in history[1:]]
        assert len(totals) == 3 and all(map(math.isfinite, totals)) and totals[2] < 0.75 * totals[0]
        assert all(0 <= epoch.precision <= 1 and 0 <= epoch.ema_precision <= 1 for epoch in history)


def test_frozen_layers_stay_bit_equal_and_others_move(trained):
    torch.manual_seed(0)
    start = small(4, 64, 3).state_dict()
    frozen = [name for name in start if name.startswith("backbone.layer1.")]
    assert len(frozen) == 5
    for _, kept in trained[0]["whole"]:
        for name in frozen:
            assert torch.equal(kept["net"][name], start[name])
            assert torch.equal(kept["ema"][f"module.{name}"], start[name])
        for name in ("backbone.layer2.0.weight", "backbone.layer2.1.running_mean", "rpn.head.bbox_pred.weight"):
            assert not torch.equal(kept["net"][name], start[name])


@pytest.mark.parametrize("what, prefix", [("net", ""), ("ema", "module.")])
def test_workers_differ_and_their_mean_is_saved(trained, what, prefix):
    found, folder = trained
    first, other = (kept[what] for _, kept in found["whole"])
    saved = torch.load(folder / "whole" / f"{'model' if what == 'net' else what}.pt")
    apart = 0.0
    for name, value in saved.items():
        if value.is_floating_point():
            a, b = first[prefix + name], other[prefix + name]
            torch.testing.assert_close(value, (a + b) / 2, rtol=1e-6, atol=1e-6)
            apart = max(apart, (a - b).abs().max().item())
    assert apart > 1e-3


def test_the_ema_is_behind_the_model(trained):
    for _, kept in trained[0]["whole"]:
        assert kept["ema"]["n_averaged"] == 3 * 16
        name = "roi_heads.box_predictor.cls_score.weight"
        assert not torch.equal(kept["ema"][f"module.{name}"], kept["net"][name])


def test_a_resumed_run_is_the_uninterrupted_run(trained):
    found, _ = trained
    for (whole, kept), (cut, _), (resumed, again) in zip(*(found[n] for n in ("whole", "cut", "resumed")), strict=True):
        assert_equal(kept, again, "kept")
        assert whole[:3] == cut and resumed == [cut[2]._replace(losses={}), whole[3]]
        assert kept["optimizer"]["param_groups"][0]["weight_decay"] == 0


def test_pmsgd_is_ddp(trained):
    for (ours, _), (torchs, _) in zip(trained[0]["pmsgd"], trained[0]["ddp"], strict=True):
        assert ours[1].losses == pytest.approx(torchs[1].losses, rel=1e-3) and math.isnan(ours[1].ema_precision)


def test_autocast_is_used(trained):
    """bfloat16 moves losses, by less than 5 %."""
    for (amp, _), (plain, _) in zip(trained[0]["amp"], trained[0]["pmsgd"], strict=True):
        a, b = (sum(history[1].losses.values()) for history in (amp, plain))
        assert 0 < abs(a - b) < 0.05 * b


# -- a rank without gradients ------------------------------------------------------------------------------------------


def test_heads_without_gradients_are_averaged(trained):
    """Rank 1 trains its classifier alone: from equal parameters the first step moves the workers' mean of every
    parameter by lr times the mean of the gradients, of which one that is missing is zero; within 1e-6."""
    first, other = (rank[0] for rank in trained[0]["without"])
    missing = [name for name, g in other["gradients"].items() if g is None and first["gradients"][name] is not None]
    assert {name.split(".")[0] for name in missing} == {"rpn", "roi_heads"}
    assert list(other["losses"]) == ["loss_classifier"]
    for name, x in first["before"].items():
        assert torch.equal(x, other["before"][name])
        gs = [rank["gradients"][name] for rank in (first, other)]
        mean = sum(torch.zeros_like(x) if g is None else g for g in gs) / 2
        after = (first["after"][name] + other["after"][name]) / 2
        torch.testing.assert_close(after, x - LR * mean, rtol=1e-6, atol=1e-6)
    assert all(not torch.equal(first["after"][name], first["before"][name]) for name in missing)


def test_images_without_boxes(trained):
    """Losses of boxes are zero there, and so are their gradients; everything stays finite, and the run goes on."""
    ranks = trained[0]["without"]
    other = ranks[1][1]
    losses = other["losses"]
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0 < losses["loss_classifier"]
    assert not other["gradients"]["rpn.head.bbox_pred.weight"].any()
    for rank in ranks:
        for step in rank:
            assert all(map(math.isfinite, step["losses"].values()))
            assert all(x.isfinite().all() for x in step["after"].values())
        assert len(rank[2]["losses"]) == 4 and rank[2]["losses"]["loss_rpn_box_reg"] > 0


def test_a_model_in_ddp_is_refused(trained):
    for error in trained[0]["wrapped"]:
        assert "wrapped in DistributedDataParallel" in error and "Pass the model unwrapped" in error


def test_a_dictionary_of_losses_has_a_mean_as_one_tensor(trained):
    for error, mean in trained[0]["mean"]:
        assert "not dict; several losses go as one: torch.stack" in error and mean.tolist() == [1.5, 4.5]


# -- average precision -------------------------------------------------------------------------------------------------


def found(*entries):
    """(x1, y1, x2, y2, label, score) each."""
    rows = torch.tensor(entries, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": rows[:, :4], "labels": rows[:, 4].long(), "scores": rows[:, 5]}


def there(*entries, crowd=()):
    """(x1, y1, x2, y2, label) each."""
    rows = torch.tensor(entries, dtype=torch.float32).reshape(-1, 5)
    marks = torch.tensor([int(i in crowd) for i in range(len(rows))])
    return {"boxes": rows[:, :4], "labels": rows[:, 4].long(), "iscrowd": marks}


A, B = (0, 0, 10, 10), (20, 20, 40, 30)
HAND_MADE = {
    "all found": ([found((*A, 1, 0.9), (*B, 1, 0.8))], [there((*A, 1), (*B, 1))], {1: 1.0}),
    "nothing found": ([found()], [there((*A, 1))], {1: 0.0}),
    "half found": ([found((*A, 1, 0.9))], [there((*A, 1), (*B, 1))], {1: 0.5}),
    "a wrong one first: precision 1/2": ([found((*B, 1, 0.9), (*A, 1, 0.8))], [there((*A, 1))], {1: 0.5}),
    "a wrong one last costs nothing": ([found((*A, 1, 0.9), (*B, 1, 0.8))], [there((*A, 1))], {1: 1.0}),
    "a box is found once": ([found((*A, 1, 0.9), (*A, 1, 0.8), (*B, 1, 0.7))], [there((*A, 1), (*B, 1))], {1: 5 / 6}),
    "an IoU of exactly one half": ([found((0, 0, 10, 5, 1, 0.9))], [there((*A, 1))], {1: 1.0}),
    "an IoU below one half": ([found((0, 0, 10, 4.9, 1, 0.9))], [there((*A, 1))], {1: 0.0}),
    "another class": ([found((*A, 2, 0.9))], [there((*A, 1))], {1: 0.0}),  # class 2 has no boxes, and no precision
    "another image": ([found((*A, 1, 0.9)), found()], [there(), there((*A, 1))], {1: 0.0}),
    "the scores of all images": (
        [found((*B, 1, 0.5), (*A, 1, 0.4)), found((*A, 1, 0.9))], [there((*A, 1)), there((*A, 1))], {1: 5 / 6},
    ),
    "the best of two boxes": (
        [found((0, 0, 10, 10, 1, 0.9), (0, 0, 10, 8, 1, 0.8))], [there((0, 0, 10, 8, 1), (*A, 1))], {1: 1.0},
    ),
    "in a crowd": ([found((*B, 1, 0.9), (*A, 1, 0.8))], [there((*A, 1), (0, 0, 80, 80, 1), crowd=[1])], {1: 1.0}),
    "two classes": ([found((*A, 1, 0.9), (*B, 2, 0.8))], [there((*A, 1), (*A, 2), (*B, 2))], {1: 1.0, 2: 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_average_precision_by_hand(name):
    detected, targets, expected = HAND_MADE[name]
    assert average_precision([matches(detected, targets)]) == pytest.approx(expected, abs=1e-12)
    parts = [matches([d], [t]) for d, t in zip(detected, targets, strict=True)]  # of several ranks
    assert average_precision(parts) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_plain_loops():
    """Of random boxes, 1e-12: greedy matching by score, then the area under the curve, recall by recall."""
    random = torch.Generator().manual_seed(3)

    def boxes(count):
        corner = torch.rand(count, 2, generator=random)
        return torch.cat([corner, corner + 2 + 2 * torch.rand(count, 2, generator=random)], 1)

    one = torch.ones(9, dtype=torch.int64)
    detected = [{"boxes": boxes(9), "labels": one, "scores": torch.rand(9, generator=random)} for _ in "abcd"]
    targets = [{"boxes": boxes(5), "labels": one[:5]} for _ in detected]
    curve, hits, taken = [], 0, set()
    by_score = sorted((-d["scores"][k].item(), i, k) for i, d in enumerate(detected) for k in range(9))
    for rank, (_, i, k) in enumerate(by_score):
        overlaps = [
            (box_iou(detected[i]["boxes"][k][None], targets[i]["boxes"][b][None]).item(), b)
            for b in range(5)
            if (i, b) not in taken
        ]
        best, b = max(overlaps, default=(0.0, -1))
        if best >= 0.5:
            hits += 1
            taken.add((i, b))
        curve.append((hits / 20, hits / (rank + 1)))
    area = sum(max((p for r, p in curve if r >= k / 20), default=0.0) / 20 for k in range(1, 21))
    assert 0.2 < area < 0.95
    assert average_precision([matches(detected, targets)])[1] == pytest.approx(area, abs=1e-12)


# -- images and models -------------------------------------------------------------------------------------------------


def test_shapes_lie_in_their_boxes():
    """A shape's pixels touch all four sides of its box; images are a function of seed and index; favorites are 80 %."""
    dataset = detection_data.Shapes(40, 64, seed=5, most=1)
    kinds = set()
    for image, target in dataset:
        if "boxes" not in target:
            continue
        (x1, y1, x2, y2), area = target["boxes"][0].int().tolist(), target["area"][0]
        assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64 and area == (x2 - x1) * (y2 - y1)
        outside = image.clone()
        outside[:, y1:y2, x1:x2] = 0
        assert outside.max() < 120  # noise alone
        kinds.add(target["labels"].item())
    assert kinds == {1, 2, 3}
    again, other = detection_data.Shapes(40, 64, seed=5, most=1), detection_data.Shapes(40, 64, seed=6, most=1)
    assert torch.equal(dataset[3][0], again[3][0]) and not torch.equal(dataset[3][0], other[3][0])
    labels = [label for _, t in detection_data.Shapes(400, 64, favorite=2) for label in t.get("labels", ())]
    assert 0.75 < sum(label == 2 for label in labels) / len(labels) < 0.85


def test_a_flip_moves_image_and_boxes_alike():
    plain, train = (detection_data.Shapes(30, 64, transforms=detection_data.transforms(t)) for t in (False, True))
    torch.manual_seed(0)
    flipped = 0
    for (image, target), (trained, moved) in zip(plain, train, strict=True):
        assert set(moved) == set(detection_data.KEYS) and moved["boxes"].shape == (len(moved["labels"]), 4)
        assert moved["area"].dtype == torch.float32 and moved["iscrowd"].dtype == moved["labels"].dtype == torch.int64
        if torch.equal(image, trained):
            assert torch.equal(target["boxes"], moved["boxes"])
        else:
            flipped += 1
            assert torch.equal(image.flip(-1), trained)
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            assert torch.equal(moved["boxes"], torch.stack([64 - x2, y1, 64 - x1, y2], 1))
    assert 5 < flipped < 25


def test_data_of_cocos_form(tmp_path):
    """Not its images: boxes as corners, a crowd to evaluate with and not to train on, an image without any box."""
    pytest.importorskip("pycocotools")
    from PIL import Image

    annotations = [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [2, 3, 10, 20], "area": 150.5, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 90, "bbox": [0, 0, 30.5, 24], "area": 700, "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [5, 5, 0, 4], "area": 0, "iscrowd": 0},  # without width
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 24} for i in (7, 9)],
        "categories": [{"id": i, "name": str(i)} for i in range(1, 91)],
        "annotations": annotations,
    }
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"{part}2017").mkdir()
        (tmp_path / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
        for i in (7, 9):
            Image.new("RGB", (30, 24)).save(tmp_path / f"{part}2017" / f"{i}.png")
    (image, target), (_, none) = detection_data.coco(tmp_path, "val", detection_data.transforms(train=False))
    assert image.shape == (3, 24, 30) and image.dtype == torch.float32 and target["image_id"] == 7
    assert target["boxes"].tolist() == [[2, 3, 12, 23], [0, 0, 30, 24]] and target["labels"].tolist() == [18, 90]
    assert target["area"].tolist() == [150.5, 700] and target["iscrowd"].tolist() == [0, 1]
    assert none["boxes"].shape == (0, 4) and none["image_id"] == 9 and none["labels"].dtype == torch.int64
    (_, target), _ = detection_data.coco(tmp_path, "train", detection_data.transforms(train=True))
    assert target["labels"].tolist() == [18] and len(target["area"]) == 1


def test_groups_of_parameters():
    model = small(4, 64, 2)
    norms, others = parameter_groups(model, 1e-4, 0.0)
    assert [len(p) for p in norms["params"]] == [64] * 4
    assert norms["weight_decay"] == 0 and others["weight_decay"] == 1e-4
    assert len(norms["params"]) + len(others["params"]) == sum(p.requires_grad for p in model.parameters())
    assert len(parameter_groups(model, 1e-4, None)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"])
def test_torchvisions_models(name):
    model = build(name, 4, 64, 3)
    target = {"boxes": torch.tensor([[10.0, 12.0, 30.0, 34.0]]), "labels": torch.tensor([2])}
    losses = model([torch.rand(3, 64, 64)] * 2, [target] * 2)
    assert all(loss.isfinite() for loss in losses.values())


def test_what_cannot_be_is_refused(capsys):
    with pytest.raises(ValueError, match="no model 'fast'; there are small, fasterrcnn"):
        build("fast", 4, 64, 3)
    with pytest.raises(ValueError, match="4 layers: 5 of them"):
        small(4, 64, 5)
    with pytest.raises(SystemExit):
        detection.arguments(["--optimizer", "ddp", "--resume"])
    assert "--optimizer ddp saves none" in capsys.readouterr().err
