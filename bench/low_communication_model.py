"""n GPTs at once: the parameters of worker i are row i of x [n, d], and each matrix product is one batched one.

Radford et al. 2019, with what later models left out: no biases, and normalization without a gain. Workers never mix
here, so the gradient of the sum of their losses holds each worker's own gradient in its row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F


class GPT(NamedTuple):
    """A decoder of text: sizes, and the places of its matrices in a row of numbers."""

    characters: int
    width: int = 144
    heads: int = 4
    layers: int = 4
    context: int = 64

    @property
    def shapes(self) -> list[tuple[int, int]]:
        w = self.width
        block = [(w, 3 * w), (w, w), (w, 4 * w), (4 * w, w)]
        return [(self.characters, w), (self.context, w), *block * self.layers, (w, self.characters)]

    @property
    def parameters(self) -> int:
        return sum(a * b for a, b in self.shapes)

    def start(self, seed: int) -> torch.Tensor:
        """[d]: normal numbers of deviation 0.02, those that end a residual branch smaller, as GPT-2 has it."""
        random = torch.Generator().manual_seed(seed)
        x = 0.02 * torch.randn(self.parameters, generator=random)
        matrices = self.split(x[None])
        for k in range(self.layers):
            for which in (1, 3):
                matrices[2 + 4 * k + which].mul_((2 * self.layers) ** -0.5)
        return x

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Views [n, rows, columns] of x [n, d]."""
        parts = x.split([a * b for a, b in self.shapes], 1)
        return [p.view(len(x), *shape) for p, shape in zip(parts, self.shapes, strict=True)]

    def losses(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """[n], nats per character: of x [n, d] on text [n, b, context + 1], integers below `characters`."""
        n, b, _ = text.shape
        t, w = self.context, self.width
        character, position, *matrices, head = self.split(x)
        worker = torch.arange(n, device=x.device)[:, None, None]
        y = (character[worker, text[:, :, :-1]] + position[:, None]).view(n, b * t, w)
        for k in range(self.layers):
            qkv, out, up, down = matrices[4 * k : 4 * k + 4]
            q, key, v = torch.bmm(F.layer_norm(y, (w,)), qkv).view(n * b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, key, v, is_causal=True)
            y = y + torch.bmm(attended.transpose(1, 2).reshape(n, b * t, w), out)
            y = y + torch.bmm(F.gelu(torch.bmm(F.layer_norm(y, (w,)), up), approximate="tanh"), down)
        logits = torch.bmm(F.layer_norm(y, (w,)), head)
        loss = F.cross_entropy(logits.view(-1, self.characters), text[:, :, 1:].reshape(-1), reduction="none")
        return loss.view(n, -1).mean(1)

    def gradients(self, x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [n] and each worker's gradient of its own, [n, d]."""
        leaf = x.detach().requires_grad_()
        losses = self.losses(leaf, text)
        (g,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), g
