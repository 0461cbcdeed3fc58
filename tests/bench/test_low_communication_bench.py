"""Promises about bench/low_communication.py and the modules beside it:

- the batched GPT is a GPT: row i's loss is that of one built of torch's own layers with worker i's numbers, to 1e-12 in
  float64, and row i of the gradients is worker i's own; it is causal: later characters change no earlier prediction;
- torch's AdamW on [n, d] is n AdamWs, bit for bit;
- H = 1, DiLoCo with lr 1 and momentum 0 averages what AdamW did, and so does the one-peer graph of 2 workers;
  Gossip AdamW by the rule dsgd is W (x + d), W (x + d/2) + d/2 or W x + d;
- bytes are M/H for one peer and 2 (n-1)/n M/H for averages of all, and modeled times those of costs.py;
- uneven shares do not overlap and are all of the text; nothing held out is in them; every kind of data has its own draw;
- the quick command trains everything, goes on where it was, prints tables, and draws.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import low_communication  # noqa: E402
import low_communication_report  # noqa: E402
import low_communication_training as training  # noqa: E402
from costs import COSTS, gbit  # noqa: E402
from low_communication_model import GPT  # noqa: E402

from fused_dlam import Simulation, topology  # noqa: E402

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


def test_it_is_causal():
    """The last character is never read, the one before only by the last prediction."""
    x, text = workers(1), torch.randint(11, (1, 1, 7), generator=torch.Generator().manual_seed(1))
    other = text.clone()
    other[0, 0, 5] = (text[0, 0, 5] + 1) % 11
    g = []
    for t in (text, other):
        leaf = x.clone().requires_grad_()
        short = NET._replace(context=5)  # its positions are the first five
        cut = torch.cat([leaf[:, : 11 * 12 + 5 * 12], leaf[:, 11 * 12 + 6 * 12 :]], 1)
        loss = short.losses(cut, t[:, :, :6])
        g.append((float(loss), torch.autograd.grad(loss.sum(), leaf)[0]))
    # Its target differs, its inputs do not: the gradient at the embedding of the target's character is its own alone.
    first = [NET._replace(context=4).losses(
        torch.cat([x[:, : 11 * 12 + 4 * 12], x[:, 11 * 12 + 6 * 12 :]], 1), t[:, :, :5]) for t in (text, other)
    ]  # fmt: skip
    assert g[0][0] != g[1][0] and torch.equal(first[0], first[1])


def test_adamw_on_rows_is_n_adamws():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 1000, generator=generator)
    settings = {"betas": training.BETAS, "weight_decay": training.WEIGHT_DECAY, "fused": True}
    rows, single = start.clone(), [row.clone() for row in start]
    together = torch.optim.AdamW([rows], 1e-2, **settings)
    each = [torch.optim.AdamW([row], 1e-2, **settings) for row in single]
    loop = [row.clone() for row in start]
    plainly = [torch.optim.AdamW([row], 1e-2, **{**settings, "fused": False}) for row in loop]
    for step in range(20):
        g = torch.randn(3, 1000, generator=generator)
        for optimizer, parameters in ((together, [rows]), *zip(each + plainly, [[r] for r in single + loop], strict=True)):
            optimizer.param_groups[0]["lr"] = training.learning_rate(step, 20, 1e-2)
            for p, own in zip(parameters, [g] if len(parameters[0]) == 3 else [None], strict=True):
                p.grad = own
        for row_set in (single, loop):
            for row, own in zip(row_set, g, strict=True):
                row.grad = own.clone()
        for optimizer in (together, *each, *plainly):
            optimizer.step()
    assert torch.equal(rows, torch.stack(single))
    assert (rows - torch.stack(loop)).abs().max() < 1e-6 and (rows - start).abs().max() > 0.05
