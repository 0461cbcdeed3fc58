"""What worker processes run in the tests of Ray Train's page: its example, without Ray and without an interruption."""

import sys
import types

import torch


def without_ray(rank, code, shared):
    """What a worker reports. `code` is the page's example."""
    reports = []
    train, of_torch = types.ModuleType("ray.train"), types.ModuleType("ray.train.torch")
    train.get_context = lambda: types.SimpleNamespace(get_world_rank=lambda: rank)
    train.get_checkpoint = lambda: None
    train.Checkpoint = types.SimpleNamespace(from_directory=str)
    train.report = lambda metrics, **_: reports.append(metrics)
    of_torch.get_device, of_torch.TorchTrainer = lambda: torch.device("cpu"), None
    ray = types.ModuleType("ray")
    ray.train = train
    sys.modules.update({"ray": ray, "ray.train": train, "ray.train.torch": of_torch})
    names = {"__name__": "example"}
    exec(compile(code, "example.py", "exec"), names)
    torch.manual_seed(0)
    names["train"]({"shared": shared})
    return reports
