"""Promises about bench/low_communication.py and the modules beside it:

- the batched GPT is a GPT: row i's loss is that of one built of torch's own layers with worker i's numbers, to 1e-12 in
  float64, with their mask, and row i of the gradients is worker i's own;
- torch's AdamW on [n, d] is n AdamWs, bit for bit;
- every method is a loop of n models, n AdamWs and averages by hand, to rounding: all-reduce of gradients; DiLoCo with
  H = 1, lr 1 and momentum 0, which averages parameters; averaging every H-th step; and Gossip AdamW, which is
  W (x + d), W (x + d/2) + d/2 or W x + d;
- bytes are M/H for one peer and 2 (n-1)/n M/H for averages of all; modeled times are those of costs.py, and what awc
  hides is free;
- uneven shares do not overlap and are all of the text; nothing held out is in them;
- the quick command trains every method, goes on where it was, takes the best in tuning, prints tables, and draws;
- bad options end the program with one clear line.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import low_communication  # noqa: E402
import low_communication_training as training  # noqa: E402
from costs import COSTS, gbit  # noqa: E402
from low_communication_model import GPT  # noqa: E402
from low_communication_report import exchange, seconds, steps_to  # noqa: E402
from low_communication_training import METHODS, Method  # noqa: E402

from fused_dlam import topology  # noqa: E402

NET = GPT(characters=11, width=12, heads=4, layers=2, context=6)
AVERAGING = {"lr": 1.0, "momentum": 0.0}


def workers(n: int) -> torch.Tensor:
    return torch.stack([NET.start(seed) for seed in range(n)]).double() * 5  # so that attention is not nearly even


def plain(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Loss of one worker's row, [d], on [b, context + 1]: by torch's layers and a mask."""
    character, position, *matrices, head = (m[0] for m in NET.split(x[None]))
    y = character[text[:, :-1]] + position
    mask = nn.Transformer.generate_square_subsequent_mask(NET.context, dtype=x.dtype)
    for k in range(NET.layers):
        qkv, out, up, down = matrices[4 * k : 4 * k + 4]
        a = F.layer_norm(y, (NET.width,))
        attended, _ = F.multi_head_attention_forward(
            *[a.transpose(0, 1)] * 3, NET.width, NET.heads, qkv.T, None, None, None, False, 0.0, out.T, None,
            attn_mask=mask,
        )  # fmt: skip
        y = y + attended.transpose(0, 1)
        y = y + F.gelu(F.layer_norm(y, (NET.width,)) @ up, approximate="tanh") @ down
    return F.cross_entropy((F.layer_norm(y, (NET.width,)) @ head).flatten(0, 1), text[:, 1:].flatten())


def test_n_models_at_once_are_n_models():
    x, text = workers(3), torch.randint(11, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    losses, g = NET.gradients(x, text)
    assert x.shape == g.shape == (3, NET.parameters) and NET.parameters == 11 * 24 + 6 * 12 + 2 * 12 * 12**2
    for i in range(3):
        row = x[i].clone().requires_grad_()
        loss = plain(row, text[i])
        (own,) = torch.autograd.grad(loss, row)
        assert abs(loss - losses[i]) < 1e-12 and (own - g[i]).abs().max() < 1e-12 and own.abs().max() > 1e-3


def test_it_has_a_million_parameters():
    net = training.network(low_communication.SIZES)
    assert net.parameters >= 1_000_000 and net.heads > 1


def test_adamw_on_rows_is_n_adamws():
    random = torch.Generator().manual_seed(0)
    start = torch.randn(3, 1000, generator=random)
    settings = {"betas": training.BETAS, "weight_decay": training.WEIGHT_DECAY}
    rows, one, loop = start.clone(), [r.clone() for r in start], [r.clone() for r in start]
    optimizers = [torch.optim.AdamW([p], fused=True, **settings) for p in (rows, *one)]
    optimizers += [torch.optim.AdamW([p], **settings) for p in loop]
    for step in range(20):
        rows.grad = torch.randn(3, 1000, generator=random)
        for own in (one, loop):
            for p, g in zip(own, rows.grad, strict=True):
                p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = training.learning_rate(step, 20, 1e-2)
            optimizer.step()
    assert torch.equal(rows, torch.stack(one))
    assert (rows - torch.stack(loop)).abs().max() < 1e-6 and (rows - start).abs().max() > 0.05


# -- training ----------------------------------------------------------------------------------------------------------


def job(method: str, every: int, **more) -> dict:
    own = {"method": method, "every": every, "split": "uneven", "seed": 1, "inner_lr": 1e-2, "outer": AVERAGING}
    return {**own, **low_communication.QUICK, "steps": 6, "validation": 8, **more}


def by_hand(job: dict, average) -> float:
    """Loss of the mean model: `average(step, W, x, y)` gives n models from those before the last round and after it."""
    n, net, H = job["workers"], training.network(job), job["every"]
    models = [net.start(job["seed"]) for _ in range(n)]
    optimizers = [torch.optim.AdamW([m], betas=training.BETAS, weight_decay=training.WEIGHT_DECAY) for m in models]
    random = [np.random.default_rng([job["seed"], rank]) for rank in range(n)]
    graph = topology.get("one-peer-exponential", n)
    before = torch.stack(models)
    for step in range(job["steps"]):
        for m, text, r in zip(models, training.shares(n, job["split"]), random, strict=True):
            m.grad = net.gradients(m[None], training.draw(text, job["batch"], net.context, r)[None])[1][0]
        if average is None:
            mean = sum(m.grad for m in models) / n
            for m in models:
                m.grad = mean
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = training.learning_rate(step, job["steps"], job["inner_lr"])
            optimizer.step()
        if average is not None and (step + 1) % H == 0:
            W = torch.as_tensor(graph.phase(step // H).dense(), dtype=torch.float32)
            before = average(W, before, torch.stack(models)).clone()
            for m, row in zip(models, before, strict=True):
                m.copy_(row)
    return training.judge(net, (sum(models) / n)[None], training.validation(net, job["validation"], 1))


@pytest.mark.parametrize(
    "method, every, average",
    [
        ("all-reduce AdamW", 1, None),
        ("DiLoCo", 1, lambda W, x, y: y.mean(0).expand_as(y)),
        ("DiLoCo", 3, lambda W, x, y: y.mean(0).expand_as(y)),
        ("averaging, one-peer", 2, lambda W, x, y: W @ y),
        ("Gossip AdamW, atc", 1, lambda W, x, y: W @ y),
        ("Gossip AdamW, midpoint", 1, lambda W, x, y: W @ ((x + y) / 2) + (y - x) / 2),
        ("Gossip AdamW, awc", 1, lambda W, x, y: W @ x + y - x),
    ],
)
def test_methods_are_loops_over_workers(method, every, average):
    """The same to rounding; without averaging, another. AdamW divides rounding by it: hence 1e-4 of a loss near 4."""
    this = job(method, every, outer={} if average is None else AVERAGING)
    found = training.train(this)
    assert found["loss"] == pytest.approx(by_hand(this, average), abs=1e-4)
    assert found["curve"][-1] == [6, found["loss"]] and found["curve"][0][0] == 4
    alone = by_hand(this, lambda W, x, y: y)
    assert abs(found["loss"] - alone) > 1e-3, "whether anything was averaged makes no difference here"


def test_uneven_shares_are_all_of_the_text():
    train, held = training.pieces()
    assert torch.equal(torch.cat(training.shares(8, "uneven")), train.flatten())
    assert all(torch.equal(share, train.flatten()) for share in training.shares(2, "even"))
    text = training.corpus()
    assert len(train) + len(held) == len(text) // training.PIECE > 1000
    at = torch.arange(5, len(train) + len(held), 10)
    assert torch.equal(held, text[: (len(train) + len(held)) * training.PIECE].view(-1, training.PIECE)[at])


# -- bytes and times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_bytes_and_times(n):
    options = low_communication.parse(["--parameters", "1e6", "--compute", "0.3", "--latency", "0.002"])
    M, link = 4e6, gbit(0.002, 1.0)
    ring, peer = (COSTS[name](n, M, 1) for name in ("ring all-reduce", "one-peer"))
    for name in METHODS:
        everyone = name in ("all-reduce AdamW", "DiLoCo")
        assert exchange(name, n, 1e6) == (ring if everyone else peer)
        assert exchange(name, n, 1e6).bytes == pytest.approx(2 * (n - 1) / n * M if everyone else M)
    for H in (10, 50):
        assert seconds("DiLoCo", H, n, 1.0, options) == pytest.approx(0.3 + link.seconds(ring) / H)
        for name in ("GASLoC", "NoLoCo", "averaging, one-peer", "MI-DmSGD, midpoint"):
            assert seconds(name, H, n, 1.0, options) == pytest.approx(0.3 + link.seconds(peer) / H)
        assert seconds("MI-DmSGD, awc", H, n, 1.0, options) == pytest.approx(0.3)  # 34 ms behind 3 s
    slow = gbit(0.002, 1e-3).seconds(peer)  # 32 s
    assert seconds("MI-DmSGD, awc", 10, n, 1e-3, options) == pytest.approx(slow / 10)
    late = 0.3 + max(0.0, gbit(0.002, 0.1).seconds(ring) - 0.2)
    assert seconds("all-reduce AdamW", 1, n, 0.1, options) == pytest.approx(late)


def test_two_messages_or_neighbors_count_twice(monkeypatch):
    monkeypatch.setitem(METHODS, "two", Method("da-dmsgd", "one-peer-exponential"))
    monkeypatch.setitem(METHODS, "three", Method("dsgd", "exponential"))
    assert METHODS["two"].sends(8) == 2 and METHODS["three"].sends(8) == 3


def test_steps_to_a_level():
    curve = [[10, 4.0], [20, 3.0], [30, 3.5], [40, 2.0]]
    assert steps_to(curve, 3.5) == 15 and steps_to(curve, 2.75) == 35 and steps_to(curve, 1.9) is None
    assert steps_to(curve, 4.5) == 10


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_quick_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(low_communication, "settle", lambda: None)  # it is for the whole process
    file = tmp_path / "quick.jsonl"
    given = ["--quick", "--every", "2", "--processes", "1", "--above", "0.02", "--results", str(file)]
    assert low_communication.main([*given, "--report"]) == 1 and "no finished runs" in capsys.readouterr().err
    assert low_communication.main(given) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    grids = sum(len(m.outer) for m in METHODS.values())
    assert len(records) == grids + len(METHODS)  # tuned on even data, and the best on uneven data too
    tried = [r for r in records if r["method"] == "DiLoCo" and r["split"] == "even"]
    best = min(tried, key=lambda r: r["tuning_loss"])["outer"]
    assert [r["outer"] for r in records if r["method"] == "DiLoCo" and r["split"] == "uneven"] == [best]
    text = capsys.readouterr().out
    record = next(r for r in records if r["method"] == "Gossip AdamW, awc" and r["split"] == "uneven")
    assert f"{record['loss']:.3f}" in text and "Modeled seconds of a step" in text and "on uneven data" in text
    assert file.with_suffix(".png").stat().st_size > 20_000

    file.write_text(file.read_text()[:-20])  # killed while it wrote
    assert low_communication.main(given) == 0
    assert len(file.read_text().splitlines()) == len(records)
    assert low_communication.main([*given, "--report"]) == 0


@pytest.mark.parametrize(
    "given, message",
    [
        (["--every", "0"], "--every 0"),
        (["--every", "301"], "number of steps"),
        (["--compute", "0"], "--compute must be"),
        (["--latency", "-1"], "--latency must be"),
        (["--results", "nowhere/runs.jsonl"], "no folder nowhere"),
    ],
)
def test_bad_options(capsys, given, message):
    with pytest.raises(SystemExit):
        low_communication.parse(given)
    assert message in capsys.readouterr().err
