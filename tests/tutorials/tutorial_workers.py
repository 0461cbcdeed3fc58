"""What worker processes run in the tests of the tutorials: the tutorials' own functions, in small form."""

import contextlib
import importlib
import io

import torch
import torch.distributed as dist

from fused_dlam.tutorials import (
    asynchrony,
    bias_correction,
    consensus,
    deep_learning,
    directed,
    gradient_descent,
    hello,
)
from fused_dlam.tutorials.least_squares import LeastSquares
from fused_dlam.tutorials.worker import mean, relative_errors


def told(fn, *args, **options):
    """(what the function returns, what this worker prints meanwhile)"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = fn(*args, **options)
    return found, out.getvalue()


def whole(rank, name):
    """All of a tutorial."""
    return told(importlib.import_module(f"fused_dlam.tutorials.{name}").run)[0]


def four(rank):
    """Tutorials 1 to 4 and 7, on as many workers as they are for or fewer, with fewer steps."""
    return {
        "hello": told(hello.run),
        "rates": told(consensus.rates, 60),
        "exact": told(consensus.exact),
        "biases": told(gradient_descent.biases, (0.2, 0.1), 20.0),
        "stable": told(gradient_descent.stable_range, 40),
        "optimizer": told(gradient_descent.as_optimizer, steps=20),
        "by hand": told(bias_correction.by_hand, 300),
        "by method": told(bias_correction.by_method, 300, ("exact-diffusion",)),
        "learning": told(deep_learning.compare, 2, ("all-reduce", "ATC, one peer", "MI-DmSGD, the default")),
    }


def asynchronous(rank):
    """Tutorial 6, for longer where a busy machine lets workers take few steps only."""
    n = dist.get_world_size()
    x = torch.full((3,), float(rank), dtype=torch.float64)
    target = mean(x)
    asynchrony.PAUSE = 0.002
    for seconds in (1.5, 6.0, 24.0):
        one = asynchrony.asynchronous(x, target, seconds)
        worst = relative_errors([one["x"] / one["p"]], target)[0]
        if worst < 1e-12:
            break
    lost = (
        (mean(one["x"]) - target).abs().max().item(),
        abs(n * mean(torch.tensor(one["p"], dtype=torch.float64)).item() - n),
    )
    together = asynchrony.synchronous(x, target, 0.2)
    return {"steps": one["steps"], "worst": worst, "lost": lost, "together": together["steps"], "log": one["log"],
            "training": told(asynchrony.training, 0.5)}  # fmt: skip


def six(rank):
    """Tutorial 5."""
    f = LeastSquares()
    return {
        "consensus": told(directed.consensus, 90),
        "push-DIGing": relative_errors(directed.push_diging(f, directed.mesh(), 0.1, 420), f.solution)[-1],
    }
