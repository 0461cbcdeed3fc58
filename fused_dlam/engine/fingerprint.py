"""Whether a flat buffer was written since, by whatever means: version counters do not see `.data`, numpy, collectives.

A fingerprint is about 4 KiB of sums: the columns of a matrix of 8-byte words, summed as integers, so that no write is
rounded away; what does not fill a row is kept as it is. Reading 8.4 million values takes 1.6 ms (one core, 21 GB/s);
comparing them with a copy took 8 ms, and the copy 11.

Values that change places within their columns would leave the sums alone. So the width is a prime, which no layer has
for a stride, and one drawn anew in every process.
"""

from __future__ import annotations

import random

import torch

WIDTH = random.SystemRandom().choice([457, 461, 463, 467, 479, 487, 491, 499, 503, 509])


def fingerprint(flat: torch.Tensor) -> torch.Tensor:
    """[WIDTH + the rest] of int64, of a buffer of a multiple of 8 bytes."""
    words = flat.view(torch.int64)
    whole = len(words) // WIDTH * WIDTH
    return torch.cat([words[:whole].view(-1, WIDTH).sum(0), words[whole:]])
