"""The two models and the two lists of shapes that steps are measured on. Written out: no other package is needed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .device import DEVICE


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 161 parameters of ResNet-50, 25.6M."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for conv in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt124_shapes() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 small, 124M, its vocabulary padded to 50304."""
    return [tuple(p.shape) for p in meta(lambda: GPT()).parameters()]


def meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.n1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's shape; the token embedding is the last layer too."""

    def __init__(self, layers=12, width=768, heads=12, vocabulary=50304, length=1024):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x):
        h = self.token(x) + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.linear(self.norm(h), self.token.weight)

    def batch(self, size: int) -> torch.Tensor:
        shape = (size, self.place.num_embeddings + 1)
        return torch.randint(0, self.token.num_embeddings, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(x[:, :-1]).float().flatten(0, 1), x[:, 1:].flatten())


class Basic(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.c1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.c2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.n1, self.n2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.skip = None
        if stride != 1 or inputs != width:
            self.skip = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class ResNet18(nn.Module):
    def __init__(self, classes: int = 1000, width: int = 64):
        super().__init__()
        stages, inputs = [], width
        for k in range(4):
            for stride in (1 if k == 0 else 2, 1):
                stages.append(Basic(inputs, width << k, stride))
                inputs = width << k
        self.stem, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.stages(x).mean((2, 3)))


def small_gpt(tiny: bool) -> GPT:
    """Two layers: inductor takes seconds for each. tiny: next to nothing, for --smoke."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return GPT(2, 32, 2, 96, 16) if tiny else GPT(2, 256, 4, 4096, 256)


def layers(width: int, depth: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return nn.Sequential(*(nn.Linear(width, width, dtype=dtype) for _ in range(depth)))


def flat(model: nn.Module) -> torch.Tensor:
    """All parameters in a row, whole where they are sharded."""
    values = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([v.detach().flatten() for v in values])
