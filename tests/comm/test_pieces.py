"""Promises about what a user's own loop calls, with five real processes over gloo, against dense float64:

- neighbor_allreduce is W x for a list of mixed types, in one message, and A x where columns sum to one, exactly;
- equal workers stay equal bit for bit; in 16 bits the mean does not drift (see `test_sixteen_bits`);
- neighbor_gather brings what is there, of any type and first dimension; pair_average the same bits to both ranks;
- push_sum's x/mass is the mean to float64's roundings, and the mass is exact whatever x is;
- with machines the result is that of kron(W, J), bit-equal inside one, and one message leaves it.
"""

import math

import numpy as np
import piece_workers
import pytest
import torch
from piece_workers import assert_near, directed
from random_exchanges import columns, dense, wide
from workers import run_together

import fused_dlam
from fused_dlam import neighbor_allreduce, neighbor_exchange, neighbor_gather, pair_average, push_sum, topology
from fused_dlam.comm.links import combined, of_topology

N = 5
STEPS = 3


A, W = directed(N, 0), directed(N, 1)


def graphs():
    with pytest.warns(UserWarning, match="not doubly stochastic"):
        return ["one-peer-exponential", "full", fused_dlam.Topology(W)]


@pytest.fixture(scope="module")
def fives():
    w = piece_workers
    return run_together(
        N,
        {
            "lists": (w.lists, graphs(), STEPS),
            "equal": (w.equal_ranks, N),
            "columns": (w.columns, A),
            "pushed": (w.pushed, A, 60),
            "sixteen": (w.sixteen, "exponential", torch.bfloat16, 40),
            "gathers": (w.gathers,),
            "pairs": (w.pairs, N),
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


@pytest.mark.parametrize(
    "name, dtype, sizes",
    [
        ("one-way-ring", torch.bfloat16, (8,)),
        ("exponential", torch.float16, (3,)),
        *(
            pytest.param(name, dtype, (2, 3, 5, 8), marks=pytest.mark.slow)
            for name in ("ring", "one-way-ring", "one-peer-exponential", "exponential", "symmetric-exponential")
            for dtype in (torch.bfloat16, torch.float16)
        ),
    ],
)
def test_sixteen_bits(name, dtype, sizes):
    """1,000 averages of 2, 3, 5 and 8 workers, computed by the function that the ranks call.

    Each is rounded once (half a unit in the last place of the result, and float32's roundings), so nothing leaves the
    range of what the workers began with; their mean moves by less than 2.5 units in the last place of the largest of
    them, up or down alike (0.1 of a unit on average over 500 numbers), and from the hundredth call on, when the workers
    are equal or as near as 16 bits have it, hardly.
    """
    for n in sizes:
        graph = topology.get(name, n)
        links = [[of_topology(graph, i, step) for i in range(n)] for step in range(graph.period)]
        first = torch.stack([piece_workers.own(i, 500, dtype=dtype) * 100 for i in range(n)])
        unit, X, at = ulps(first.double(), dtype), first, {}
        for k in range(1, 1001):
            row = links[(k - 1) % graph.period]
            before = X.double()
            X = torch.stack([combined(X[i], [X[j] for j, _ in row[i].sources], row[i]) for i in range(n)])
            if k <= graph.period:
                exact = torch.einsum("ij,jk->ik", torch.from_numpy(graph.weights(k - 1)), before)
                half = exact.abs() * torch.finfo(dtype).eps / 2
                assert ((X.double() - exact).abs() <= half + 2.0**-22 * before.abs().amax(0)).all()
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


# -- groups, machines --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fours():
    w = piece_workers
    return run_together(4, {"2 x 2": (w.machines, 2, False, directed(2, 1)), "groups": (w.some_of_the_ranks,)})


def test_ranks_are_numbers_in_the_group(fours):
    ranks = fours["groups"]
    assert ranks[1].startswith("ValueError") and "not in the given process group" in ranks[1]
    for me, rank in enumerate((0, 2, 3)):
        ring, gathered, pair, wrong = ranks[rank]
        assert ring == (0, 2, 3)[(me - 1) % 3]
        assert gathered == {k: g for k, g in enumerate((0, 2, 3)) if k != me}
        assert pair == (1.0, 1.0, 3.0)[me]
        assert "rank 1 lists rank 0 as a source, and rank 0 does not send to it" in wrong


def test_machines_are_kron_w_and_j(fours):
    hold_machines(2, 2, False, fours["2 x 2"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "n, size, use_mesh", [(2, 2, True), (3, 2, False), (2, 3, True), (4, 2, False), (1, 3, False), (3, 1, False)]
)
def test_more_machines(n, size, use_mesh):
    hold_machines(
        n, size, use_mesh, run_together(n * size, {"x": (piece_workers.machines, size, use_mesh, directed(n, 1))})["x"]
    )


def hold_machines(n, size, use_mesh, ranks):
    """16-bit values are rounded twice: as the machine's mean, and as the result."""
    M, count = directed(n, 1), n * size
    machine = [r % n if use_mesh else r // size for r in range(count)]
    J = [[M[machine[i], machine[j]] / size for j in range(count)] for i in range(count)]
    everything = np.full((count, count), 1 / count).tolist()
    for t in range(4):
        X = [wide(x[t]) for x, *_ in ranks]
        Y, S = dense(J, X)
        largest = sum(x.abs() for x in X)  # the machines' means are no larger, nor are their differences
        for i, (x, out, *_) in enumerate(ranks):
            assert_near(out[t], Y[i], S[i] + largest, x[t].dtype)
            first = ranks[machine.index(machine[i])][1][t]
            assert torch.equal(out[t], first), "the ranks of a machine differ"
    C = [piece_workers.own(rank + 50, 3) for rank in range(count)]
    G, S = dense(np.array(J).T.tolist(), C)
    mean, T = dense(everything, [x[0] for x, *_ in ranks])
    for i, (_, _, sent, grad, refused, one) in enumerate(ranks):
        assert_near(grad, G[i], S[i], torch.float64)
        assert_near(one, mean[i], 2 * T[i], torch.float64)
        assert "leave async_op=True out" in refused
        # 15 float64, 4 float32 and 7 bfloat16 values, each rounded up to parts of one size
        part = sum(-(-count // size) * width for count, width in ((15, 8), (4, 4), (7, 2)))
        receivers = np.count_nonzero(M[:, machine[i]]) - 1
        assert sent == receivers * part


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
