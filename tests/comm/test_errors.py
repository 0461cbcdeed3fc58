"""Promises about what is told of an exchange that fails, with real processes over gloo:

- global ranks, the peer, the step and the user's call; whether the peer has gone, was silent, or left in consequence of
  another rank, which is named on all ranks that depend on it;
- what is said of parameters is true of that call;
- waits that take long are told of a few times, and never once they are over.
"""

import threading

import ending_workers
import pytest
import torch
import torch.distributed as dist
from workers import run_together

from fused_dlam.comm import errors, transfer
from fused_dlam.comm import watch as watching
from fused_dlam.comm.ledger import Ledger
from fused_dlam.topology.topology import Peers


class End:
    """One rank's end of a group that is not there."""

    rank, ranks, timeout, backend, generation, broken = 1, [4, 6], 2.0, "gloo", "", False
    stages, process_group, ledger, numbers = False, None, Ledger(), ()
    host_waits, gone, lookout, interrupted = True, None, None, ""

    def reach(self, device):
        pass

    def count(self, message, receivers):
        pass

    def watched(self, what, step, peer=None, counts=True):
        return watching.Watched(self, what, step, peer, counts)


@pytest.fixture(scope="module", params=["ends", "raises", "called"])
def dead(request):
    return request.param, run_together(4, {"deaths": (ending_workers.deaths, request.param)})["deaths"]


def test_the_first_to_go_is_named_by_all(dead):
    """On the one-way ring 0 -> 1 -> 2 -> 3 -> 0: rank 2 waits for rank 1, rank 3 for rank 2, rank 0 for rank 3."""
    how, told = dead
    assert told[1] is None
    for rank in (0, 2, 3):
        text, seconds, (me, peer, step, call) = told[rank]
        assert me == rank and step in (2, 3) and seconds < 12.0
        assert call == ("trainer.fit()" if how == "called" else "step()") and call in text
        assert text.startswith(f"rank {rank} in {call} at step {step}: "), text
        assert "rank 1" in text, text
        assert "intact" not in text and "none is damaged" not in text
        assert ("from a checkpoint" in text) == (how != "called")


def test_of_a_collective_all_that_take_part_are_named():
    for rank, text in enumerate(run_together(3, {"x": (ending_workers.collective,)})["x"]):
        if rank != 2:
            assert text.startswith(f"rank {rank} in optimizer.averaged(): all-reduce failed"), text
            assert "ranks 0, 1, 2" in text or "gave up" in text
            assert "checkpoint" not in text and "join" not in text


@pytest.mark.parametrize("staged", [False, True])
def test_messages_again(staged):
    for rank, (seen, messages, sent, (left, right)) in enumerate(
        run_together(3, {"x": (ending_workers.again, staged)})["x"]
    ):
        assert seen[0] == [left, right] and seen[1] == seen[2] == [10.0 + left, 10.0 + right]
        assert seen[3] == [20.0 + left, 10.0 + right]
        assert messages == 5 and sent == 5 * 20, rank


def test_means():
    results = run_together(3, {"x": (ending_workers.means,)})["x"]
    for rank, out in enumerate(results):
        assert out["full"] == 30000.0 and abs(out["apart"]) in (0.0, 60000.0)
        kept = float("nan") if rank == 0 else 5.0
        assert out["finite"][0] == out["finite"][3] == 1.0
        assert out["finite"][1] == kept or rank == 0 and out["finite"][1] != out["finite"][1]
        assert out["finite"][2] == (float("inf") if rank == 2 else 5.0)
        for name in ("float8", "integers", "list", "float8 of a neighbor"):
            assert out[name].startswith("TypeError"), out
        for name, other in (("shape", 1), ("type", 2), ("topology", 1)):
            assert out[name].startswith("ValueError") and f"rank {other} has" in out[name], out
            assert out[name] == results[0][name]
        assert out["after"] == 1.0


def test_a_call_is_named_by_its_outermost_name():
    @errors.calling("averaged()")
    def averaged():
        with errors.calling("synchronize()"):
            return errors.current_call()

    assert (averaged(), averaged(), errors.current_call()) == ("averaged()", "averaged()", "step()")
    names = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda g: names.append(errors.current_call()))
    x.sum().backward()
    assert names == ["backward()"]


@pytest.mark.parametrize(
    "words, kind, said",
    [
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:2", "closed", "rank 4 closed its connection"),
        ("[unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation", "late", "nothing came of it in 2 s"),
        ("Application timeout caused pair closure", "closed", "closed its connection"),
        ("something else", "other", "died, was cut off"),
    ],
)
def test_the_transports_words_tell(words, kind, said):
    assert errors.kind_of(words) == kind
    error = errors.failure(watching.Watched(End(), "waiting for a message from", 5, 0), RuntimeError(words))
    assert str(error).startswith("rank 6 in step() at step 5: waiting for a message from rank 4 failed: ")
    assert said in str(error) and ("optimizer.join()" in str(error)) == (kind != "other")


def test_a_dead_peer_over_nccl_is_an_exchange_error(monkeypatch):
    """Where torch raises (TORCH_NCCL_BLOCKING_WAIT=1, or a communicator that was aborted) it is named, and not called
    harmless: by then the GPU may have combined what never came."""

    class Lost:
        def wait(self):
            raise dist.DistBackendError("NCCL communicator was aborted on rank 1.")

    end = End()
    end.backend, end.host_waits = "nccl", False
    monkeypatch.setattr(dist, "P2POp", lambda *arguments: arguments)
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda ops: [Lost()])
    flight = transfer.Transfer(end, [torch.zeros(3)], Peers((0,), (0.5,), (0,)), step=7)
    flight.send(torch.zeros(3))
    with pytest.raises(watching.ExchangeError, match="rank 6 in .* at step 7: .* from a checkpoint.*was aborted"):
        flight.wait_received()
    assert flight.readable is None and end.broken


def test_waits_of_two_threads_are_told_apart():
    """Main in, courier in, main out, courier out: nothing waits any more, and nothing is reported later."""
    main, courier = (watching.Watched(End(), what, 5, 1) for what in ("waiting for a message from", "sending to"))
    entered, leave = threading.Event(), threading.Event()

    def other():
        with courier:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with main:
        thread.start()
        entered.wait()
        assert {main, courier} <= set(watching._current.values())
        with watching.Watched(End(), "inner", 5, 1):
            assert main not in watching._current.values()
        assert main in watching._current.values()
    leave.set()
    thread.join()
    assert not {main, courier} & set(watching._current.values())


def test_a_long_wait_is_told_of_a_few_times(caplog):
    with errors.calling("optimizer.averaged()"), watching.Watched(End(), "waiting for a message from", 5, 0) as _:
        (wait,) = [w for w in watching._current.values() if isinstance(w.group, End)]
        for hundredth in range(201):
            watching.remind(wait.since + hundredth / 100)
    lines = [record.getMessage() for record in caplog.records]
    assert 3 <= len(lines) <= 5
    assert "rank 6 in optimizer.averaged() at step 5: waiting for a message from rank 4: still waiting" in lines[0]


def test_where_ranks_have_changed_waits_name_workers(caplog):
    end = End()
    end.numbers = [0, 1, 3, 4, 5, 7, 9]
    with watching.Watched(end, "waiting for a message from", 5, 0) as _:
        (wait,) = [w for w in watching._current.values() if w.group is end]
        watching.remind(wait.since + end.timeout / 2)
    (record,) = caplog.records
    assert record.getMessage().startswith("worker 9 in step() at step 5: waiting for a message from worker 5: still")


def test_groups_that_are_formed_anew():
    """No optimizer is built then, and no step is torn."""
    for rank, (text, lost) in enumerate(run_together(2, {"x": (ending_workers.formed_anew,)})["x"]):
        assert text.startswith(f"rank {rank} in forming generation 3: building the groups of generation 3 failed: ")
        assert lost and "optimizer" not in text and "step" not in text, text
