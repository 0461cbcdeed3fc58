"""Promises about what a user's own loop calls, with five real processes over gloo, against dense float64:

- neighbor_allreduce is W x for a list of mixed types, in one message, and A x where columns sum to one, exactly;
- equal workers stay equal bit for bit; in 16 bits the mean does not drift (see `test_sixteen_bits`);
- neighbor_gather brings what is there, of any type and first dimension; pair_average the same bits to both ranks;
- push_sum's x/mass is the mean to float64's roundings, and the mass is exact whatever x is;
- with machines the result is that of kron(W, J), bit-equal inside one, and one message leaves it;
- handles may be waited for in any order, or never, and their arguments may change;
- every mistake is a ValueError, on all ranks where ranks differ, before anything is sent, and the next call works.
"""

import math
from collections import Counter

import numpy as np
import piece_workers
import pytest
import torch
from random_exchanges import TOLERANCE, columns, dense, wide
from workers import run_together

import fused_dlam
from fused_dlam import neighbor_allreduce, neighbor_exchange, neighbor_gather, pair_average, push_sum, topology
from fused_dlam.comm.links import combined, of_topology

N = 5
STEPS = 3


def directed(n, axis):
    """A random directed matrix with zeros, whose rows (1) or columns (0) sum to one."""
    rng = np.random.default_rng(n)
    A = rng.uniform(0.1, 1, (n, n)) * (rng.random((n, n)) < 0.5) + np.eye(n) + np.roll(np.eye(n), 1, 0)
    return A / A.sum(axis, keepdims=True)


A, W = directed(N, 0), directed(N, 1)


def graphs():
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        return ["one-peer-exponential", "full", fused_dlam.Topology(W)]


def assert_near(got, expected, size, dtype):
    assert got.dtype == dtype and got.shape == expected.shape
    assert bool(((wide(got) - expected).abs() <= TOLERANCE[dtype] * size + 1e-7 * (dtype == torch.float16)).all())


@pytest.fixture(scope="module")
def fives():
    w = piece_workers
    return run_together(
        N,
        {
            "lists": (w.lists, graphs(), STEPS),
            "equal": (w.equal_ranks, N),
            "columns": (w.columns, A),
            "pushed": (w.pushed, A, 100),
            "sixteen": (w.sixteen, "exponential", torch.bfloat16, 100),
            "gathers": (w.gathers,),
            "pairs": (w.pairs, N),
            "handles": (w.handles, N),
            "let go": (w.let_go, N),
            "refusals": (w.refusals, N),
            "spans": (w.spans, N),
            "gradients": (w.gradients, N, A, W),
            "lists' gradients": (w.gradients_of_lists, N, W),
            "trained through": (w.trained_through, N),
        },
    )


# -- values ------------------------------------------------------------------------------------------------------------


def test_lists_are_the_rows_of_w(fives):
    ranks = fives["lists"]
    for k, graph in enumerate(graphs()):
        for step in range(STEPS):
            M = topology.get(graph, N).weights(step).tolist()
            for t, first in enumerate(ranks[0][0]):
                Y, S = dense(M, [wide(tensors[t]) for tensors, *_ in ranks])
                for i, (tensors, out, _, _) in enumerate(ranks):
                    size = S[i] + wide(tensors[t]).abs()
                    assert_near(out[k * STEPS + step][t], Y[i], size, first.dtype)
    assert all(same_form and sent == 1 for _, _, same_form, sent in ranks)


def test_equal_workers_stay_equal(fives):
    assert fives["equal"] == [[True] * 4] * N


def test_columns_are_a_times_x(fives):
    Y, S = dense(A.tolist(), [x for x, *_ in fives["columns"]])
    masses, _ = dense(A.tolist(), [torch.ones((), dtype=torch.float64)] * N)
    for i, (_, averaged, asked, (pushed, mass)) in enumerate(fives["columns"]):
        for got in (averaged, asked, pushed):
            assert_near(got, Y[i], S[i], torch.float64)
        assert mass == pytest.approx(masses[i].item(), rel=1e-15)
    assert math.fsum(mass for *_, (_, mass) in fives["columns"]) == pytest.approx(N, rel=1e-15)


def test_push_sum_goes_to_the_mean(fives):
    """Beside bfloat16 values the mass is to the bit what it is beside float64 values."""
    mean = sum(x for x, _ in fives["pushed"]) / N
    for i, (_, out) in enumerate(fives["pushed"]):
        x, mass = out[torch.float64]
        assert abs(mass - 1) > 0.01, "equal masses would hide what is lost"
        torch.testing.assert_close(x / mass, mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close((out[torch.float32][0] / mass).double(), mean, rtol=1e-5, atol=1e-5)
        assert out[torch.float32][1] == out[torch.bfloat16][1] == mass, i


def ulps(values, dtype):
    """Of the largest of all workers' values, by element."""
    return 2.0 ** (values.abs().amax(0).log2().floor() + math.log2(torch.finfo(dtype).eps))


def test_sixteen_bits_on_processes(fives):
    x, y = (torch.stack([rank[k] for rank in fives["sixteen"]]).double() for k in range(2))
    drift = (y.mean(0) - x.mean(0)).abs() / ulps(x, torch.bfloat16)
    assert drift.max() < 2.5 and (y.amax(0) <= x.amax(0)).all() and (y.amin(0) >= x.amin(0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ring", "one-way-ring", "one-peer-exponential", "exponential"])
def test_sixteen_bits(name, dtype):
    """1,000 averages of 2, 3, 5 and 8 workers, computed by the function that the ranks call.

    Each is the float32 sum, rounded once, so nothing leaves the range of what the workers began with; their mean moves
    by less than 2.5 units in the last place of the largest of them, up or down alike (0.1 of a unit on average over
    500 numbers), and from the hundredth call on, when the workers are equal or as near as 16 bits have it, hardly.
    """
    for n in (2, 3, 5, 8):
        graph = topology.get(name, n)
        links = [[of_topology(graph, i, step) for i in range(n)] for step in range(graph.period)]
        first = torch.stack([piece_workers.own(i, 500, dtype=dtype) * 100 for i in range(n)])
        unit, X, at = ulps(first.double(), dtype), first, {}
        for k in range(1, 1001):
            row = links[(k - 1) % graph.period]
            X = torch.stack([combined(X[i], [X[j] for j, _ in row[i].sources], row[i]) for i in range(n)])
            if k in (100, 1000):
                at[k] = (X.double().mean(0) - first.double().mean(0)) / unit
        assert (X.amax(0) <= first.amax(0)).all() and (X.amin(0) >= first.amin(0)).all()
        assert at[1000].abs().max() < 2.5 and abs(at[1000].mean()) < 0.1, (n, at[1000].abs().max(), at[1000].mean())
        assert (at[1000] - at[100]).abs().max() < 0.5, n


def test_gathered_as_it_is(fives):
    for i, (of_types, numbers) in enumerate(fives["gathers"]):
        for t, (_, out) in enumerate(of_types):
            for graph, got in zip(("one-way-ring", "full", "one-peer-exponential"), out, strict=True):
                M = topology.get(graph, N).weights(1)
                assert list(got) == [j for j in range(N) if j != i and M[i, j]]
                for j, tensor in got.items():
                    sent = fives["gathers"][j][0][t][0]
                    assert tensor.dtype == sent.dtype and torch.equal(tensor, sent)
        assert numbers == {j: torch.tensor(j) for j in range(N) if j != i}


def test_pairs_get_the_same_bits(fives):
    for i, calls in enumerate(fives["pairs"]):
        assert len(calls) == N + 3 * (i < 2)
        for k, (x, partner, mean) in enumerate(calls):
            other = fives["pairs"][partner][k]
            assert torch.equal(mean, other[2])
            torch.testing.assert_close(mean, (x + other[0]) / 2, rtol=2e-7, atol=1e-7)


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


def test_a_process_may_end_with_handles_under_way():
    out = run_together(3, {"x": (piece_workers.not_waited_for_at_the_end, 3)}, deadline=120)["x"]
    assert out == [None, [0.0] * 3, [1.0] * 3]


# -- mistakes ----------------------------------------------------------------------------------------------------------

TOLD = {  # what all ranks are told, of rank 1's mistake
    "allreduce shape": "the shape given to neighbor_allreduce(): rank 0 has (3,), (3,), rank 1 has (3,), (4,)",
    "allreduce type": "the type given to neighbor_allreduce(): rank 0 has torch.float32, torch.float32, rank 1 has",
    "allreduce length": "the shape given to neighbor_allreduce(): rank 0 has (2,), rank 1 has (2,), (3,)",
    "allreduce gradient": "the gradient given to neighbor_allreduce(): rank 0 has none, rank 1 has True",
    "allreduce weights": "do not agree on the topology given to neighbor_allreduce()",
    "two functions": "which function is called: rank 0 has neighbor_allreduce(), rank 1 has push_sum()",
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


# -- profiler, groups, machines ----------------------------------------------------------------------------------------


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


def test_ranks_are_numbers_in_the_group():
    ranks = run_together(4, {"x": (piece_workers.some_of_the_ranks,)})["x"]
    assert ranks[1].startswith("ValueError") and "not in the given process group" in ranks[1]
    for me, rank in enumerate((0, 2, 3)):
        ring, gathered, pair, wrong = ranks[rank]
        assert ring == (0, 2, 3)[(me - 1) % 3]
        assert gathered == {k: g for k, g in enumerate((0, 2, 3)) if k != me}
        assert pair == (1.0, 1.0, 3.0)[me]
        assert "rank 1 lists rank 0 as a source, and rank 0 does not send to it" in wrong


MACHINES = [(2, 2, False), (2, 2, True)]
MORE = [(3, 2, False), (2, 3, True), (4, 2, False), (1, 3, False), (3, 1, False)]


@pytest.mark.parametrize(
    "n, size, use_mesh", MACHINES[:1] + [pytest.param(*m, marks=pytest.mark.slow) for m in MACHINES[1:] + MORE]
)
def test_machines_are_kron_w_and_j(n, size, use_mesh):
    """16-bit values are rounded twice: as the machine's mean, and as the result."""
    M = directed(n, 1)
    ranks = run_together(n * size, {"x": (piece_workers.machines, size, use_mesh, M)})["x"]
    machine = [r % n if use_mesh else r // size for r in range(n * size)]
    J = [[M[machine[i], machine[j]] / size for j in range(n * size)] for i in range(n * size)]
    for t in range(4):
        Y, S = dense(J, [wide(x[t]) for x, *_ in ranks])
        for i, (x, out, *_) in enumerate(ranks):
            assert_near(
                out[t],
                Y[i],
                2 * S[i] + 2 * max(wide(x[t]).abs().max() for x, *_ in ranks if x[t].numel()) if x[t].numel() else S[i],
                x[t].dtype,
            )
            first = ranks[machine.index(machine[i])][1][t]
            assert torch.equal(out[t], first), "the ranks of a machine differ"
    C = [piece_workers.own(rank + 50, 3) for rank in range(n * size)]
    G, S = dense(np.array(J).T.tolist(), C)
    mean, T = dense([[1 / (n * size)] * (n * size)] * (n * size), [x[0] for x, *_ in ranks])
    for i, (_, _, sent, grad, refused, one) in enumerate(ranks):
        assert_near(grad, G[i], S[i], torch.float64)
        assert_near(one, mean[i], 2 * T[i] + 2, torch.float64)
        assert "leave async_op=True out" in refused
        # 15 float64, 4 float32 and 7 bfloat16 values, each rounded up to parts of one size
        whole = sum(-(-count // size) * width for count, width in ((15, 8), (4, 4), (7, 2)))
        assert sent == np.count_nonzero(M[:, machine[i]] * (np.arange(n) != machine[i])) * whole


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


# -- one worker --------------------------------------------------------------------------------------------------------


def test_one_worker_needs_no_process_group():
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(neighbor_allreduce([x], "ring")[0], x)
    assert torch.equal(neighbor_exchange(x, ()), x) and torch.equal(neighbor_exchange(x, {}, {}, -2.0), -2 * x)
    assert neighbor_gather(x, "full") == {} and torch.equal(pair_average(x, None), x)
    y, mass = push_sum(x, 3, "one-peer-exponential")
    assert torch.equal(y, x) and mass == 3.0 and isinstance(mass, float)
    assert torch.equal(push_sum(x, 0.5, columns(np.ones((1, 1))))[0], x)
    neighbor_exchange(x, (), self_weight=3.0).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 3.0))
    handle = neighbor_allreduce(x.detach(), "ring", async_op=True)
    assert handle.done and torch.equal(handle.wait(), x)
    assert neighbor_allreduce((), "ring") == () and neighbor_allreduce([], "ring", async_op=True).wait() == []
    for call in (lambda: neighbor_exchange(x, [0]), lambda: pair_average(x, 0), lambda: pair_average(x, 1)):
        with pytest.raises(ValueError, match="this rank is alone|which is this rank itself"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex32])
def test_far_apart_in_sixteen_bits(dtype):
    """Of 60000 and -60000 the difference overflows where the average does not; an infinity of weight zero stays out."""
    x = torch.tensor([60000.0, 1.0]).to(dtype)
    links = of_topology(topology.full(2), 0, 0)
    assert combined(x, [-x], links).tolist() == [0, 0]
    inf = torch.tensor([float("inf")] * 2).to(dtype)
    assert combined(x, [inf], links._replace(sources=((1, 0.0),))).tolist() == x.tolist()
    assert combined(inf, [x], links._replace(own=0.0)).tolist() == [30000, 0.5]
