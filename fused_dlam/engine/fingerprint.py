"""Whether a flat buffer was written since, by whatever means: version counters do not see `.data`, numpy, collectives.

A fingerprint is 4 KiB of sums: every column of 4-byte pairs, summed as integers, so that no write is rounded away.
Reading 8.4 million values takes 1.6 ms (one core, 21 GB/s); comparing them with a copy took 8 ms and the copy 11.
"""

from __future__ import annotations

import torch

from .buckets import PADDING


def fingerprint(flat: torch.Tensor) -> torch.Tensor:
    """[PADDING * size of an element / 8] of int64. A buffer of PADDING elements is compared bit for bit."""
    columns = PADDING * flat.element_size() // 8
    return flat.view(torch.int64).view(-1, columns).sum(0)
