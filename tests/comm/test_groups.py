"""Promises about process groups, with real processes over gloo:

- ranks that have belonged to different numbers of groups find each other, and what they train is bit-equal to what they
  train without that history; also after a group was destroyed, in a group of some ranks, and with machines;
- the backend is the one that serves the parameters' device, whatever the group is called;
- a mean of float16 values is exact where their sum would overflow;
- hooks of two threads send every bucket once, in order.
"""

import group_workers
import pytest
import torch
import torch.distributed as dist
from workers import Tied, run_together

from fused_dlam import GossipSGD
from fused_dlam.comm import process_group as groups
from fused_dlam.tools.launch import run_workers


@pytest.fixture(scope="module")
def pairs():
    """What two ranks do that leaves nothing behind."""
    return run_together(2, {"plain": (group_workers.train,), "two threads": (group_workers.two_threads,)})


@pytest.fixture(scope="module")
def triples():
    """What three ranks do, in the end that which leaves them with unlike groups."""
    return run_together(3, {"means": (group_workers.means,), "histories": (group_workers.histories,)})


def test_histories_do_not_matter(triples):
    for paths in triples["histories"]:
        for what, path in paths.items():
            assert torch.equal(path, paths["none"]), what


def test_some_of_the_ranks_train():
    paths = run_workers(group_workers.some_of_the_ranks, 4)
    assert paths[1] is None
    assert all(torch.isfinite(path).all() for rank, path in enumerate(paths) if rank != 1)
    assert not torch.equal(paths[0], paths[2])


def test_machines_after_a_group_of_some():
    with_history, without = zip(*run_workers(group_workers.machines, 6), strict=True)
    assert all(map(torch.equal, with_history, without))
    assert torch.equal(without[0], without[1]) and not torch.equal(without[0], without[2])


@pytest.mark.parametrize("backend", [None, "cpu:gloo,cuda:gloo", "cpu:gloo"])
def test_groups_under_other_names(backend, pairs, tmp_path):
    for rank, (name, found, path) in enumerate(run_workers(group_workers.named, 2, backend, str(tmp_path))):
        assert name != "gloo" and found == "gloo"
        assert torch.equal(path, pairs["plain"][rank])


def test_a_job_that_starts_anew_with_a_fresh_process(tmp_path):
    for first, second in run_workers(group_workers.again, 2, str(tmp_path)):
        assert torch.equal(first, second)


def test_a_mesh_that_makes_its_own_group(tmp_path):
    results = run_workers(group_workers.mesh, 4, str(tmp_path))
    assert all(name == "undefined" for name, _ in results)
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    "config, device, expected",
    [
        ("cpu:gloo,cuda:nccl", "cuda", "nccl"),
        ("cuda:nccl", "cuda", "nccl"),
        ("cpu:gloo,cuda:gloo", "cuda", "gloo"),
        ("cpu:gloo,cuda:nccl", "cpu", "gloo"),
        ("cpu:fake,cuda:fake,hpu:fake", "cuda", "fake"),
        ("cuda:nccl", "cpu", "has no backend for tensors on cpu"),
        ("cpu:gloo", "cuda", "has no backend for tensors on cuda"),
        ("cpu:mpi,cuda:mpi", "cpu", "carries them by 'mpi'"),
    ],
)
def test_the_backend_is_the_devices(monkeypatch, config, device, expected):
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: config)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            groups.transport(None, torch.device(device))
    else:
        assert groups.transport(None, torch.device(device)) == expected


def test_eager_nccl_needs_all_ranks(monkeypatch):
    """`init_process_group(device_id=)` splits communicators with the help of all ranks: some alone would hang."""

    class World:
        bound_device_id = torch.device("cuda:0")

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(type(dist.group), "WORLD", property(lambda _: World))
    with pytest.raises(ValueError, match="leave device_id out, or pass hierarchical=mesh"):
        groups.build([0, 1], "nccl", 10.0, [[0, 1]], "name")


def test_means_of_float16_do_not_overflow(triples):
    for rank in triples["means"]:
        for mean in rank:
            assert torch.equal(mean.float(), torch.full((3,), 30000.0)), rank


def test_two_threads_send_every_bucket_once(pairs):
    for rounds in pairs["two threads"]:
        assert len(rounds) == 20 and all(rounds)


def test_a_captured_backward_pass_counts():
    """A CUDA graph's replay writes gradients and moves no version counter: torch's SGD steps, and so does this."""
    moved = []
    for make in (torch.optim.SGD, GossipSGD):
        torch.manual_seed(0)
        model = Tied()
        optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
        model.loss(torch.ones(2, 7)).backward()
        optimizer.step()
        if make is GossipSGD:  # what a hook does while a capture is under way
            for b in optimizer._engine.buckets:
                for slot in b.slots:
                    if slot.p.grad is not None:
                        optimizer._arrivals._captured(b, slot)
        optimizer.zero_grad(set_to_none=False)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.data.fill_(1.0)  # as graph.replay() does
        optimizer.step()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-6)
