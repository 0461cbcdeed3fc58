"""Promise: the checker of test_streams.py finds every kind of race that it is there for.

Each kind of mistake is made on purpose, on fake GPUs (`fake_cuda`), and must be found.
"""

import pytest
import torch
from fake_cuda import Machine
from fake_runs import BF16, STAGED, report, train
from fake_transport import Network


def is_main(stream) -> bool:
    return stream.agent.name.startswith("main")


@pytest.mark.parametrize("options", [dict(overlap=True), dict(schedule="awc", comm_dtype=BF16)], ids=["atc", "awc"])
def test_a_lane_that_does_not_wait_for_the_main_stream_is_found(options):
    run = train(machine=Machine(ignore=lambda waiter, source: not is_main(waiter) and is_main(source)), **options)
    assert run.machine.races


@pytest.mark.parametrize("options", [dict(overlap=True), dict(schedule="awc"), dict(method="pmsgd")], ids=str)
def test_a_main_stream_that_does_not_join_the_lane_is_found(options):
    run = train(machine=Machine(ignore=lambda waiter, source: is_main(waiter) and not is_main(source)), **options)
    assert run.machine.races


@pytest.mark.parametrize("options", [dict(overlap=True), dict(schedule="awc"), dict(method="pmsgd")], ids=str)
def test_an_operation_of_nccl_that_nobody_waits_for_is_found(options):
    assert train(waits_work=False, **options).machine.races


def test_a_bucket_that_waits_for_its_last_gradient_alone_is_found():
    """Biases come first and on side stream 1, which is then waited for at the end of the backward pass only."""
    machine = Machine(ignore=lambda waiter, source: not is_main(waiter) and source.agent.name == "side stream 1")
    assert train(machine=machine, side_streams=2, overlap=True).machine.races


def test_a_pinned_buffer_used_again_while_a_copy_from_it_is_queued_is_found():
    """A neighbor that is ahead overwrites the message that this device has not fetched yet."""
    run = train(config=STAGED, schedule="awc", machine=Machine(careless=True))
    assert any("recv" in race and "copy_" in race for race in run.machine.races), report(run.machine)


def test_the_host_allocator_gives_pinned_memory_out_again_in_time_and_a_kept_buffer_does_not_wait():
    """The rule by which a fresh pinned buffer per message is right, and one that is kept is wrong, by itself."""

    def receive_twice(fresh: bool, careless: bool = False):
        with Machine(careless=careless) as machine, Network(machine, 2, *STAGED) as network:
            rows = [torch.zeros(8, device="cuda:0") for _ in range(2)]
            host = torch.empty(8, pin_memory=True)
            for row in rows:
                if fresh:
                    host = None  # as a transfer that has ended lets go of it
                    host = torch.empty(8, pin_memory=True)
                network.irecv(host).wait()
                row.copy_(host, non_blocking=True)
            return machine.races

    assert not receive_twice(fresh=True)
    assert receive_twice(fresh=False)
    assert receive_twice(fresh=True, careless=True)


def test_device_memory_that_is_freed_while_another_stream_reads_it_is_found():
    with Machine() as machine:
        lane = torch.cuda.Stream()
        for recorded in (True, False):
            machine.races.clear()
            x = torch.zeros(8, device="cuda")
            lane.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(lane):
                x + 1
            if recorded:
                x.record_stream(lane)
            del x
            torch.zeros(8, device="cuda")
            assert bool(machine.races) != recorded
