"""Exchanges drawn at random, on real processes over gloo, against dense float64 (random_exchanges.py).

neighbor_exchange with any weights and scales, neighbor_allreduce over rows, columns and doubly stochastic matrices,
push_sum, neighbor_gather, pair_average; single tensors, lists and tuples of 0 to 50 elements of mixed types, contiguous
or not; with gradients; with handles that are waited for in any order, asked, or let go. Errors are bounded by
`TOLERANCE` times the sum of the absolute values that are added: 8 roundings of float64 or float32, one unit in the last
place of 16 bits.

    EXCHANGE_SEEDS=20 pytest tests/comm/test_random_exchanges.py -m slow -n0 -s
"""

import os

import pytest
import random_exchanges
from workers import run_together


def hold(n, seed, count, staged=False):
    results = run_together(n, {"play": (random_exchanges.play, n, seed, count, staged)}, deadline=900)["play"]
    wrong = [text for _, wrong in results for text in wrong]
    assert not wrong, "\n" + "\n".join(wrong[:10])
    assert [calls for calls, _ in results] == [count] * n


def test_a_few_hundred():
    hold(3, 0, 300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("EXCHANGE_SEEDS", "1"))))
def test_ten_thousand(seed):
    hold(5, seed, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_other_numbers_of_ranks(n):
    hold(n, 100 + n, 1000)


@pytest.mark.slow
def test_as_cuda_tensors_travel():
    hold(3, 7, 1000, staged=True)
