"""Where step() cannot exchange, and says so before anything is sent."""

from __future__ import annotations

import torch

from .engine import Engine


def check_step_allowed(engine: Engine, averaging: bool, call: str = "step()") -> None:
    """Raises RuntimeError within `averaged()`, a CUDA graph's capture, and with several workers a backward pass."""
    if averaging:
        raise RuntimeError(
            f"{call} was called within averaged(), where the parameters are the workers' mean, and what is done to them"
            " is undone afterwards: train outside"
        )
    if any(device.type == "cuda" for device in engine.lanes) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{call} cannot be captured in a CUDA graph, for peers and scalars change from step to step: capture"
            f" forward and backward, and call {call} after the replay"
        )
    if engine.place.workers.size > 1 and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{call} was called within a backward pass, where ranks may come to it in different orders (one optimizer"
            f" per parameter does so): build one optimizer over all parameters and call {call} after backward()"
        )
