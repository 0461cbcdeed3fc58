"""Promises of fused_dlam/frameworks/tracking.md: its examples run on two ranks, and what was told is what is written.

Each needs its package, and is skipped without.
"""

import csv
import importlib.util
import logging
import struct
from pathlib import Path

import pytest
import torch
import tracker_workers
from tracker_workers import STEPS, example

import fused_dlam
from fused_dlam.tools.launch import run_workers

NAMES = [name for name in ("tensorboard", "wandb", "mlflow") if importlib.util.find_spec(name)]
DISTANCE, SENT = "consensus_distance", "bytes_sent"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of each package, what each rank was told)"""
    if not NAMES:
        pytest.skip("none is installed")
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in NAMES}
    return folders, run_workers(tracker_workers.run_each, 2, folders, deadline=120)


def check(told, read):
    """read: {name: [(step, value)]} for some of the numbers; both ranks have measured the same distances."""
    assert [n["step"] for n in told[0]] == list(range(1, STEPS + 1))
    for name, places in read.items():
        expected = [(n["step"], n[name]) for n in told[0] if name in n]
        assert len(expected) == (STEPS // 2 if name == DISTANCE else STEPS)
        assert [step for step, _ in places] == [step for step, _ in expected], name
        assert [value for _, value in places] == pytest.approx([value for _, value in expected], rel=1e-6), name
    assert [n.get(DISTANCE) for n in told[0]] == [n.get(DISTANCE) for n in told[1]]
    assert max(n.get(DISTANCE, 0.0) for n in told[0]) > 1e-3


def test_tensorboard(written):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(written[0]["tensorboard"])
    events.Reload()
    read = {name: [(e.step, e.value) for e in events.Scalars(f"gossip/{name}")] for name in ("lr", SENT, DISTANCE)}
    check([rank["tensorboard"] for rank in written[1]], read)


def test_wandb(written):
    wandb = pytest.importorskip("wandb")
    (file,) = Path(written[0]["wandb"]).rglob("*.wandb")
    rows = []
    for data in logged(file.read_bytes()):
        record = wandb.proto.wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): float(i.value_json) for i in record.history.item})
    read = {name: [(row["_step"], row[name]) for row in rows if name in row] for name in ("lr", SENT, DISTANCE)}
    check([rank["wandb"] for rank in written[1]], read)


def logged(data):
    """The records of an offline run's file, which has the form of LevelDB's log: blocks of 32 KiB, from behind a header
    of 7 bytes; a record is whole (1) or in parts (2 first, 3, 4 last)."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_mlflow(written, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"file:{written[0]['mlflow']}/runs")
    (run,) = client.search_runs(["0"])
    read = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in ("lr", SENT, DISTANCE)
    }
    check([rank["mlflow"] for rank in written[1]], read)


def test_lightning(tmp_path):
    """One process: its logger has every number."""
    lightning = pytest.importorskip("lightning")
    space = {"GossipSGD": fused_dlam.GossipSGD}
    exec(compile(example("self.logger"), "tracking.md, Lightning", "exec"), space)

    class Module(lightning.LightningModule):
        configure_optimizers = space["configure_optimizers"]

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, index):
            return self.layer(batch).square().mean()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    trainer = lightning.Trainer(max_epochs=1, logger=logger, accelerator="cpu", enable_progress_bar=False,
                                enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(STEPS, 2)))
    logger.save()
    rows = list(csv.DictReader(open(f"{logger.log_dir}/metrics.csv")))
    assert [(float(row["step"]), float(row["lr"])) for row in rows] == [(k, 0.1) for k in range(1, STEPS + 1)]
    assert [row[DISTANCE] for row in rows] == ["", "0.0", "", "0.0"]


def test_hugging_face_trainer(tmp_path):
    """One process: the callback's method is given Accelerate's optimizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    space = {}
    exec(compile(example("on_train_begin"), "tracking.md, Trainer", "exec"), space)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, x):
            return {"loss": self.layer(x).square().mean()}

    class Callback(transformers.TrainerCallback):
        on_train_begin = space["on_train_begin"]
        told = []

        def write(self, numbers):
            self.told.append(numbers)

    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=1, num_train_epochs=1, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(
        Model(), arguments, train_dataset=[{"x": torch.ones(2)}] * STEPS, callbacks=[Callback()],
        optimizer_cls_and_kwargs=(fused_dlam.GossipSGD, {"lr": 0.1}),
    )  # fmt: skip
    trainer.train()
    assert [(numbers["step"], numbers["lr"]) for numbers in Callback.told] == [(k, 0.1) for k in range(1, STEPS + 1)]
