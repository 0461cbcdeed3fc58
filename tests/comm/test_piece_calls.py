"""Promises about calls of a user's own loop, with five real processes over gloo:

- handles may be waited for in any order, or never, and their arguments may change;
- every mistake is a ValueError, on all ranks where ranks differ, before anything is sent, and the next call works;
- a profiler's trace has a span for each call;
- gradients are those of the transpose, by dense float64, of lists, of complex values, and of gradients.
"""

from collections import Counter

import call_workers
import numpy as np
import piece_workers
import pytest
import torch
from piece_workers import assert_near, directed
from random_exchanges import dense
from workers import run_together

N = 5
A, W = directed(N, 0), directed(N, 1)


@pytest.fixture(scope="module")
def fives():
    w = call_workers
    return run_together(
        N,
        {
            "handles": (w.handles, N),
            "let go": (w.let_go, N),
            "refusals": (w.refusals, N),
            "spans": (w.spans, N),
            "gradients": (w.gradients, N, A, W),
            "lists' gradients": (w.gradients_of_lists, N, W),
            "trained through": (w.trained_through, N),
            "end": (w.not_waited_for_at_the_end, N),
        },
    )


# -- handles -----------------------------------------------------------------------------------------------------------


def test_handles(fives):
    for rank, out in enumerate(fives["handles"]):
        mean, second, first, later, done, kept, same, lists, mean_done, again, last, here, alone, text, after = out
        assert (mean, second, first, later, kept, again, last) == (2.0, 200, 100, 500, 400, 2.0, 2.0)
        assert done and same and mean_done and here and alone
        # One-peer: the mean with the rank before.
        assert lists == [(rank + (rank - 1) % N) / 2] * 2
        assert text == "<neighbor_exchange(), under way>" and after == "<neighbor_exchange(), waited for>"


def test_nothing_is_kept_of_handles_that_were_let_go(fives):
    assert fives["let go"] == [(0, 0)] * N


def test_a_process_may_end_with_handles_under_way(fives):
    assert fives["end"] == [None, *([rank - 1.0] * 3 for rank in range(1, N))]


# -- mistakes ----------------------------------------------------------------------------------------------------------

TOLD = {  # what all ranks are told, of rank 1's mistake
    "allreduce shape": "the shape given to neighbor_allreduce(): rank 0 has (3,), (3,), rank 1 has (3,), (4,)",
    "allreduce type": "the type given to neighbor_allreduce(): rank 0 has torch.float32, torch.float32, rank 1 has",
    "allreduce length": "the shape given to neighbor_allreduce(): rank 0 has (2,), rank 1 has (2,), (3,)",
    "allreduce gradient": "the requires_grad given to neighbor_allreduce(): rank 0 has none, rank 1 has True",
    "allreduce weights": "do not agree on the topology given to neighbor_allreduce()",
    "two functions": "which function is called: rank 0 has neighbor_allreduce(), rank 1 has push_sum()",
    "a gathering": "which function is called: rank 0 has neighbor_allreduce(), rank 1 has neighbor_gather()",
    "exchange and gathering": "which function is called: rank 0 has neighbor_gather(), rank 1 has neighbor_exchange()",
    "exchange source": "rank 0 sends to rank 1, and rank 1 does not list it as a source",
    "exchange destination": "rank 2 lists rank 1 as a source, and rank 1 does not send to it",
    "exchange shape": "rank 1 sends (4,) to rank 2, whose own is (3,)",
    "exchange type": "rank 1 sends torch.float64 to rank 2, whose own is torch.float32",
    "exchange gradient": "gradients flow through what rank 1 passes as True, and rank 0's as none",
    "exchange itself": "rank 1: sources has rank 1, which is this rank itself",
    "exchange no rank": "rank 1: destinations has rank 5, and the group has ranks 0 to 4",
    "exchange twice": "rank 1: sources has rank 0 twice",
    "exchange a word": "rank 1: sources has 'left', which is no rank",
    "exchange a number": "rank 1: sources must be ranks, or {rank: number}, not 0",
    "exchange weight": "rank 1: sources[0] must be a finite real number, not nan",
    "exchange own weight": "rank 1: self_weight must be a finite real number, not 'half'",
    "exchange many": "rank 1 lists rank 0 as a source, and rank 0 does not send to it",
    "gather type": "do not agree on the type given to neighbor_gather()",
    "gather trailing": "but for its first dimension, given to neighbor_gather(): rank 0 has 2 dimensions, (3,),",
    "gather a number": "but for its first dimension, given to neighbor_gather(): rank 0 has 1 dimensions",
    "gather topology": "do not agree on the topology given to neighbor_gather()",
    "pair shape": "rank 0 brings (3,) of torch.float32, gradients none, rank 1 brings (4,) of torch.float32",
    "pair type": "rank 1 brings (3,) of torch.float64",
    "pair gradient": "rank 1 brings (3,) of torch.float32, gradients True",
    "push shape": "do not agree on the shape given to push_sum()",
}  # fmt: skip
ALONE = {  # what each rank is told of a mistake of its own
    "push rows": "ValueError: push_sum() needs columns that sum to one",
    "push mass": "TypeError: push_sum(): mass must be a number or a float64 tensor of no dimensions, not torch.float32",
    "push no mass": "TypeError: push_sum(): mass must be",
    "pair itself": "ValueError: pair_average(): partner must be another of the group's ranks, 0 to 4, not",
    "pair no rank": "ValueError: pair_average(): partner must be",
    "pair a word": "ValueError: pair_average(): partner must be",
    "allreduce integers": "TypeError: neighbor_allreduce() averages floating-point tensors, not torch.int64",
    "exchange float8": "TypeError: torch.float8_e5m2 cannot be averaged",
    "gather a list": "TypeError: neighbor_gather() takes a torch.Tensor, not a list",
    "push sparse": "TypeError: push_sum() takes dense tensors, not torch.sparse_coo",
    "pair a list of floats": "TypeError: pair_average() takes a torch.Tensor, or a list of them, not a float",
    "async gradient": "ValueError: neighbor_exchange(async_op=True) is not differentiable",
    "async gradient of all": "ValueError: neighbor_allreduce(async_op=True) is not differentiable",
    "timeout": "ValueError: timeout must be positive seconds, not 0.0",
    "two devices": "ValueError: neighbor_allreduce() sends one message from one device, and was given tensors on cpu,",
    "another device": "ValueError: the parameters are on meta",
}  # fmt: skip


def test_mistakes_are_told_to_all_ranks(fives):
    said = [told for told, _ in fives["refusals"]]
    for name, words in TOLD.items():
        concerned = said[:2] if name.startswith("pair") else said
        assert len({told[name] for told in concerned}) == 1, (name, concerned)
        assert concerned[0][name].startswith("ValueError: ") and words in concerned[0][name], (name, concerned[0][name])
        if name.startswith("pair"):
            assert {told[name] for told in said[2:]} == {"none"}
    for name, words in ALONE.items():
        assert all(told[name].startswith(words) for told in said), (name, said[0][name])
    assert set(said[0]) == {*TOLD, *ALONE}
    assert all(works == (True,) * 5 for _, works in fives["refusals"])


# -- profiler ----------------------------------------------------------------------------------------------------------


def test_spans_have_the_names_of_calls(fives):
    """Of every function one, and within it those of its waits."""
    for rank, counts in enumerate(fives["spans"]):
        names = Counter(counts)
        assert names["fused_dlam::neighbor_allreduce step 3"] == 1
        assert names["fused_dlam::neighbor_exchange"] == 2  # the call, and its handle's wait
        assert names["fused_dlam::neighbor_gather step 0"] == names["fused_dlam::push_sum step 2"] == 1
        assert names["fused_dlam::pair_average"] == 1
        assert names["fused_dlam::backward of neighbor_allreduce step 1"] == 1
        assert names[f"fused_dlam::waiting for a message from rank {(rank - 1) % N} step 3"] == 1


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_transpose(fives):
    """y = M x and the gradient M^T c of the sum over all ranks of <c, y>, by plain loops in float64."""
    ranks, pair = fives["gradients"], np.kron(np.eye(3), np.full((2, 2), 0.5))[:N, :N]
    pair[4, 4] = 1.0
    behind = np.roll(np.eye(N), 1, 0)
    matrices = {
        "rows": W, "full": np.full((N, N), 1 / N), "columns": A, "exchange": 0.25 * np.eye(N) - 1.05 * behind,
        "unchecked": (np.eye(N) + behind) / 2, "pair": pair, "push": A,
    }  # fmt: skip
    assert len(ranks[0]) == 2 * len(matrices)
    for name, M in matrices.items():
        for dtype in (torch.float64, torch.complex128):
            X, C, got, grads = zip(*(rank[f"{name} {dtype}"] for rank in ranks), strict=True)
            for values, found, matrix in ((X, got, M), (C, grads, M.T)):
                Y, S = dense(matrix.tolist(), values)
                for i in range(N):
                    assert_near(found[i], Y[i], S[i] + values[i].abs(), dtype)


def test_gradients_of_lists_and_of_gradients(fives):
    X, first, second, late, narrow, fixed = zip(*fives["lists' gradients"], strict=True)
    D = [piece_workers.own(20 + rank, 4) for rank in range(N)]
    for values, found in ((X, first), (D, second)):
        Y, _ = dense((W.T @ W).tolist(), values)
        for i in range(N):
            torch.testing.assert_close(found[i], Y[i], rtol=1e-13, atol=1e-13)
    ones, _ = dense(W.T.tolist(), [torch.ones(3, dtype=torch.float64)] * N)
    for i in range(N):
        assert not late[i].any() and fixed[i] is None
        assert narrow[i].dtype == torch.bfloat16
        torch.testing.assert_close(narrow[i].double(), ones[i], rtol=2.0**-6, atol=0)


def test_gradients_agree_with_finite_differences(fives):
    grads, numeric = fives["trained through"][0]
    assert max(map(abs, grads)) > 0.01
    np.testing.assert_allclose(grads, numeric, rtol=1e-6, atol=1e-8)
