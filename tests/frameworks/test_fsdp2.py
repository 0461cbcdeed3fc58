"""Promises of fused_dlam/frameworks/torchtitan.md, with 2 x 2 real processes over gloo, all in float64:

- a transformer under FSDP2, clipping, warm-up, AdamW (atc, awc), DmSGD, and rounds of AdamW with DmSGD around them
  (atc, awc), unlike data: each rank's shards after every step are within 1e-11 of a dense oracle in which a worker is
  one model with the mean gradient of its ranks;
- a run that was saved half-way, in each of three ways, and resumed is the uninterrupted one, bit for bit;
- workers with unlike numbers of batches, and unlike ranks in one, end with equally many steps;
- the example runs as it is printed, twice; its file of the mean is the mean of what the workers have;
- HSDP, shards over ranks that gossip and DDP are refused, on all ranks.
"""

import fsdp2_workers as workers
import numpy as np
import pytest
import torch

from fused_dlam.tools.launch import run_workers

N = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_workers(workers.all_of_it, N, str(tmp_path_factory.mktemp("fsdp2")), deadline=240)


def parts(vector, shard):
    """What rank `shard` of a worker holds of all parameters: FSDP chunks each along its first dimension."""
    out, at = [], 0
    for p in workers.Transformer().parameters():
        value = vector[at : at + p.numel()].view(p.shape)
        chunks, at = torch.chunk(value, 2), at + p.numel()
        out += [chunks[shard].reshape(-1)] if shard < len(chunks) else []
    return torch.cat(out)


def oracle(kind, schedule):
    """[steps, workers, d]: the network whole, and numpy."""
    model = workers.Transformer().double()
    params = list(model.parameters())
    data = [list(workers.batches(rank)) for rank in range(N)]
    X = np.tile(torch.nn.utils.parameters_to_vector(params).detach().numpy(), (2, 1))
    m, v, path = np.zeros_like(X), np.zeros_like(X), []
    anchor, outer = X, np.zeros_like(X)
    for k in range(workers.STEPS):
        G = np.zeros_like(X)
        for i in range(2):
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(torch.from_numpy(X[i].copy()), params)
            loss = sum(workers.loss_of(model, data[2 * i + j][k]) for j in range(2)) / 2
            g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)]).numpy()
            G[i] = g * min(1.0, workers.CLIP / (np.linalg.norm(g) + 1e-6))
        warm = min(1.0, (k + 1) / 4)
        if kind != "dmsgd":  # as Loshchilov and Hutter state it
            m, v = 0.9 * m + 0.1 * G, 0.999 * v + 0.001 * G * G
            adam = m / (1 - 0.9 ** (k + 1)) / (np.sqrt(v / (1 - 0.999 ** (k + 1))) + 1e-8)
            D = -0.01 * warm * (adam + 0.1 * X)
        else:
            m = 0.9 * m + G
            D = -0.05 * warm * m
        if kind == "rounds":
            X = X + D
            if (k + 1) % workers.OUTER["every"]:
                path.append(X)
                continue
            outer = workers.OUTER["momentum"] * outer + (anchor - X)
            X, D = anchor, -workers.OUTER["lr"] * outer
        W = workers.rests(2).weights(k // workers.OUTER["every"] if kind == "rounds" else k)
        X = W @ X + D if schedule == "awc" else W @ (X + D)
        anchor = X
        path.append(X)
    return torch.from_numpy(np.stack(path))


@pytest.mark.parametrize("case", workers.CASES)
def test_the_loop_follows_the_oracle(ranks, case):
    expected = oracle(*case)
    assert (expected[-1, 0] - expected[-1, 1]).abs().max() > 1e-3, "the workers differ"
    for rank in range(N):
        got = ranks[rank]["trained"][case]
        for k in range(workers.STEPS):
            torch.testing.assert_close(got[k], parts(expected[k, rank // 2], rank % 2), rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", workers.WAYS)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, way):
    for rank in range(N):
        last, resumed, steps = ranks[rank]["saved"][way]
        assert steps == workers.HALF and torch.equal(last, resumed)
    assert not torch.equal(ranks[0]["saved"][way][0], ranks[2]["saved"][way][0])


def test_unlike_numbers_of_batches(ranks):
    assert [rank["uneven"][:2] for rank in ranks] == [(3, 5), (3, 5), (5, 5), (5, 5)]
    assert 0 < ranks[0]["uneven"][2] < 1 and len({rank["uneven"][2] for rank in ranks}) == 1


def test_the_example_runs_and_its_file_is_the_mean(ranks):
    assert (
        len([line for line in workers.example().splitlines() if line and not line.startswith(("#", "import", "from"))])
        <= 30
    )
    for run in range(2):
        results = [rank["page"][run] for rank in ranks]
        assert [r["steps"] for r in results] == [5 * (run + 1)] * N and len({r["loss"] for r in results}) == 1
        for rank in range(N):
            own, other = results[rank]["own"].double(), results[(rank + 2) % N]["own"].double()
            torch.testing.assert_close(parts(results[rank]["mean"], rank % 2).double(), (own + other) / 2)
    assert not torch.equal(ranks[0]["page"][0]["own"], ranks[2]["page"][0]["own"])
    assert ranks[0]["page"][1]["loss"] < ranks[0]["page"][0]["loss"]


def test_what_averages_twice_is_refused(ranks):
    for errors in (rank["refused"] for rank in ranks):
        assert "fully_shard(model, mesh=mesh" in errors["hsdp"]
        assert "exchange their different shards" in errors["no mesh"] and "hierarchical=mesh" in errors["no mesh"]
        assert "exchange their different shards" in errors["fsdp over all"]
        assert "DistributedDataParallel" in errors["ddp"] and "Pass the model unwrapped" in errors["ddp"]
