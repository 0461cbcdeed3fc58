"""Promise: on CUDA streams nothing is read before it is written, or written while it is read, in any mode.

Six steps over four buckets run on fake GPUs (`fake_cuda`), and every access of every byte, by the main stream, the
lanes, NCCL, gloo and the host, must come after what it depends on through a chain of waits. That the checker would find
a race is the promise of test_races_are_found.py.
"""

import threading
from functools import partial

import pytest
import torch
from everyday import everyday
from fake_cuda import Machine
from fake_runs import (
    BF16,
    MIXED,
    NCCL,
    STAGED,
    STEPS,
    averaged,
    clipped,
    gossip,
    gossip_sgd,
    measured,
    outer,
    report,
    rescheduled,
    synchronized,
    train,
)
from fake_training import Training, parameters
from fake_transport import Network
from layers_of_users import spaced

from fused_dlam.layers import Lars, SlowMo

MODES = {
    "atc": {},
    "atc, overlap=False": dict(overlap=False),
    "atc, overlap=True": dict(overlap=True),
    "atc, torch passes": dict(fused=False, overlap=True),
    "atc, bf16 messages": dict(comm_dtype=BF16),
    "atc, bf16 messages, torch passes": dict(comm_dtype=BF16, fused=False),
    "atc, bf16 parameters": dict(dtype=BF16),
    "atc, zero_grad(set_to_none=False)": dict(to_none=False),
    "atc, missing gradients": dict(absent=(2, 5)),
    "midpoint": dict(method="mi-dmsgd"),
    "midpoint, bf16 messages, torch passes": dict(method="mi-dmsgd", comm_dtype=BF16, fused=False),
    "spikes": dict(clip="spikes", overlap=True),
    "spikes, bf16 parameters": dict(clip="spikes", method="mi-dmsgd", dtype=BF16),
    "awc, spikes": dict(schedule="awc", clip="spikes"),
    "Gossip, midpoint": dict(make=gossip, schedule="midpoint"),
    "Gossip, midpoint, bf16 messages": dict(make=gossip, schedule="midpoint", comm_dtype=BF16),
    "awc": dict(schedule="awc"),
    "awc, torch passes": dict(schedule="awc", fused=False),
    "awc, bf16 messages": dict(schedule="awc", comm_dtype=BF16),
    "awc, bf16 parameters": dict(schedule="awc", dtype=BF16),
    "awc, missing gradients": dict(schedule="awc", absent=(2, 5)),
    "da-dmsgd": dict(method="da-dmsgd"),
    "qg-dmsgd": dict(method="qg-dmsgd"),
    "pmsgd": dict(method="pmsgd"),
    "pmsgd, missing gradients": dict(method="pmsgd", absent=(2, 5)),
    "max_grad_norm": dict(max_grad_norm=1.0),
    "max_grad_norm, pmsgd": dict(max_grad_norm=1.0, method="pmsgd"),
    "lars": dict(layers=[Lars(0.01)]),
    "lars, bf16 parameters": dict(layers=[Lars(0.01)], dtype=BF16),
    "slowmo": dict(layers=[SlowMo(2)]),
    "slowmo, awc": dict(layers=[SlowMo(2)], schedule="awc"),
    "scaler": dict(scaler=True),
    "scaler, awc": dict(scaler=True, schedule="awc"),
    "local steps": dict(topology=partial(spaced, every=2)),
    "local steps, awc": dict(topology=partial(spaced, every=2), schedule="awc"),
    "global averages": dict(topology=partial(spaced, exact=2), ranks=4),
    "global averages, awc": dict(topology=partial(spaced, exact=2), ranks=4, schedule="awc", comm_dtype=BF16),
    "synchronize between": dict(between=synchronized),
    "synchronize between, awc": dict(between=synchronized, schedule="awc"),
    "averaged between": dict(between=averaged),
    "averaged between, awc": dict(between=averaged, schedule="awc"),
    "consensus_distance between": dict(between=measured),
    "consensus_distance between, awc": dict(between=measured, schedule="awc"),
    "Gossip": dict(make=gossip),
    "Gossip, awc": dict(make=gossip, schedule="awc"),
    "Gossip, awc, bf16 messages": dict(make=gossip, schedule="awc", comm_dtype=BF16),
    "Gossip, bf16 parameters": dict(make=gossip, dtype=BF16),
    "rounds": dict(make=outer),
    "rounds, awc": dict(make=outer, schedule="awc"),
    "rounds, awc, bf16 messages": dict(make=outer, schedule="awc", comm_dtype=BF16),
    "rounds, awc, torch passes": dict(make=outer, schedule="awc", fused=False),
    "rounds, bf16 parameters": dict(make=outer, schedule="awc", dtype=BF16),
    "rounds, all-reduce": dict(make=outer, outer="nesterov-pmsgd"),
    "rounds, averaged between": dict(make=outer, schedule="awc", between=averaged),
    "rounds, synchronize between": dict(make=outer, schedule="awc", between=synchronized),
    "rounds, machines": dict(make=outer, schedule="awc", ranks=4, machine_ranks=2, hierarchical=True),
    "rounds, 8-bit messages": dict(make=outer, compress="int8"),
    "exponential graph": dict(topology="exponential", ranks=8, method="dmsgd"),
    "machines": dict(ranks=4, machine_ranks=2, hierarchical=True),
    "machines, overlap=True": dict(ranks=4, machine_ranks=2, hierarchical=True, overlap=True),
    "machines, awc": dict(ranks=4, machine_ranks=2, hierarchical=True, schedule="awc"),
    "machines, bf16 messages, clip": dict(
        ranks=4, machine_ranks=2, hierarchical=True, comm_dtype=BF16, max_grad_norm=1.0
    ),
    "machines, Gossip": dict(make=gossip, ranks=4, machine_ranks=2, hierarchical=True),
    "atc, 8-bit messages": dict(compress="int8", overlap=True),
    "awc, 4-bit messages": dict(compress="int4", schedule="awc"),
    "machines, 4-bit messages": dict(compress="int4", ranks=4, machine_ranks=2, hierarchical=True),
    "Gossip, awc, largest changes": dict(make=gossip, schedule="awc", compress="topk"),
    "two devices": dict(devices=("cuda:0", "cuda:1"), threads=True),
    "two devices, overlap=True": dict(devices=("cuda:0", "cuda:1"), threads=True, overlap=True),
    "two devices, awc": dict(devices=("cuda:0", "cuda:1"), threads=True, schedule="awc"),
    "gradients on two streams": dict(side_streams=2, overlap=True),
    "gradients on two streams, pmsgd": dict(side_streams=2, method="pmsgd"),
    "gradients on two streams, added up": dict(side_streams=2, overlap=True, to_none=False),
    "one worker": dict(ranks=1),
    "one worker, lars, clip": dict(ranks=1, layers=[Lars(0.01)], max_grad_norm=1.0),
    "group of two backends": dict(config=MIXED),
    "group of two backends, awc": dict(config=MIXED, schedule="awc"),
}
MACHINES = dict(ranks=4, machine_ranks=2, hierarchical=True)
GLOO = {
    "atc": {},
    "atc, 8-bit messages": dict(compress="int8", overlap=True),
    "awc, 4-bit messages": dict(compress="int4", schedule="awc"),
    "atc, overlap=True": dict(overlap=True),
    "atc, bf16 messages": dict(comm_dtype=BF16),
    "awc": dict(schedule="awc"),
    "awc, bf16 parameters": dict(schedule="awc", dtype=BF16),
    "pmsgd": dict(method="pmsgd"),
    "slowmo": dict(layers=[SlowMo(2)]),
    "global averages": dict(topology=partial(spaced, exact=2), ranks=4),
    "averaged between": dict(between=averaged),
    "consensus_distance between, awc": dict(between=measured, schedule="awc"),
    "Gossip, awc": dict(make=gossip, schedule="awc"),
    "machines": dict(ranks=4, machine_ranks=2, hierarchical=True),
    "machines, awc": dict(ranks=4, machine_ranks=2, hierarchical=True, schedule="awc"),
}
# Messages that are recalled, which gloo can do.
RECALLED = {
    "gradients changed": dict(meddle=clipped),
    "gradients changed, overlap=True": dict(meddle=clipped, overlap=True),
    "gradients changed, bf16 messages": dict(meddle=clipped, comm_dtype=BF16, overlap=True),
    "gradients changed, 8-bit messages": dict(meddle=clipped, compress="int8", overlap=True),
    "gradients changed, 4-bit messages": dict(meddle=clipped, compress="int4", overlap=True),
    "gradients changed, two messages": dict(meddle=clipped, method="da-dmsgd", overlap=True),
    "gradients changed, bf16 parameters": dict(meddle=clipped, dtype=BF16, overlap=True),
    "gradients changed, spikes": dict(meddle=clipped, method="mi-dmsgd", clip="spikes", overlap=True),
    "gradients changed, lars": dict(meddle=clipped, layers=[Lars(0.01)], overlap=True),
    "gradients changed, global averages": dict(
        meddle=clipped, topology=partial(spaced, exact=2), ranks=4, overlap=True
    ),
    "lr changed": dict(meddle=rescheduled),
    "lr changed, overlap=True": dict(meddle=rescheduled, overlap=True),
}


KINDS = ("atc", "atc, overlap=True", "atc, bf16 messages, torch passes", "atc, bf16 parameters",
         "atc, zero_grad(set_to_none=False)", "awc", "awc, bf16 messages", "awc, missing gradients", "da-dmsgd",
         "midpoint", "spikes", "Gossip, midpoint",
         "max_grad_norm, pmsgd", "lars, bf16 parameters", "slowmo, awc", "scaler", "local steps, awc",
         "global averages, awc", "synchronize between, awc", "averaged between", "consensus_distance between, awc",
         "Gossip", "Gossip, awc, bf16 messages", "exponential graph", "machines, overlap=True", "machines, awc",
         "two devices, overlap=True", "gradients on two streams, pmsgd", "one worker, lars, clip",
         "group of two backends, awc")  # fmt: skip
THROUGH_HOST = ("atc, overlap=True", "atc, bf16 messages", "awc, bf16 parameters", "pmsgd", "averaged between",
                "Gossip, awc", "machines, awc")  # fmt: skip


@pytest.mark.parametrize("mode", everyday(MODES, KINDS))
def test_no_race_on_nccl(mode):
    run = train(**MODES[mode])
    assert not run.machine.races, report(run.machine)
    assert not run.machine.faults, run.machine.faults


@pytest.mark.parametrize("mode", everyday(GLOO, THROUGH_HOST))
def test_no_race_when_messages_pass_through_the_host(mode):
    run = train(config=STAGED, **GLOO[mode])
    assert not run.machine.races, report(run.machine)
    assert not run.machine.faults, run.machine.faults


@pytest.mark.parametrize("mode", RECALLED)
def test_no_race_when_messages_are_recalled(mode):
    """In one step with "auto", which then sends in step(), in two with True: three of four buckets once more."""
    run = train(config=STAGED, **RECALLED[mode])
    # The script writes gradients while what leaves too early is packed from them: that message nobody believes.
    early = ("_pack_kernel on stream", "copy_ on stream")  # the latter: LARS scales a copy
    script = [race for race in run.machine.races if "| mul_ on main stream" in race and any(e in race for e in early)]
    ours = run.machine.races.keys() - script
    assert not ours, report(run.machine)
    assert not run.machine.faults, run.machine.faults
    if "global" not in mode:
        times = 2 if RECALLED[mode].get("overlap") else 1
        assert run.optimizer.messages_sent == 4 * STEPS + 3 * times


@pytest.mark.parametrize("meddle", [clipped, rescheduled])
@pytest.mark.parametrize("options", [{}, dict(method="pmsgd"), MACHINES], ids=["gossip", "all-reduce", "machines"])
def test_what_left_too_early_over_nccl_is_an_error(meddle, options):
    with pytest.raises(RuntimeError, match=r"between the backward pass and step\(\), but its message left"):
        train(meddle=meddle, **options)
    train(meddle=meddle, overlap=False, **options)


@pytest.mark.parametrize("mode", ["atc", "atc, bf16 messages", "da-dmsgd", "awc", "exponential graph", "Gossip"])
def test_what_neighbors_say_over_nccl_is_read_a_step_later(mode):
    """On a GPU that has done its work when the host asks: headers come, without a race, and all fit."""
    run = train(machine=Machine(prompt=True), **MODES[mode])
    assert not run.machine.races, report(run.machine)
    hearing = run.optimizer._engine.hearing
    assert len(hearing._later) == 1, "the last step's"
    neighbors = len(run.optimizer._engine.peers(0).sources)
    reads = [launch for launch in run.machine.launches if launch.where.startswith("hearing.py")]
    assert len(reads) == neighbors * STEPS
    waits = [wait for wait in run.machine.waits if wait.where.startswith(("hearing.py", "header.py", "observed.py"))]
    assert not waits


def test_headers_of_another_step_over_nccl_are_an_error_a_step_later():
    from fused_dlam.comm.errors import ExchangeError

    def meddle(params, optimizer, k):
        if k == 2:
            ((host, *_),) = optimizer._engine.hearing._later
            memory = machine.memory(host)
            memory.said = [memory.said[0] + 7, *memory.said[1:]]

    machine = Machine(prompt=True)
    with pytest.raises(ExchangeError, match="rank 0 at step 1: the message of rank 0 is of step 8"):
        train(machine=machine, meddle=meddle)


def test_over_nccl_messages_leave_early_from_the_fourth_step_on_but_where_values_are_watched():
    early = []

    def count(params, optimizer, k):
        early.append(optimizer._engine.sent)

    train(meddle=count)
    assert early == [0, 0, 0, 3, 0, 3]  # of four: the last one waits for step()


def test_the_modes_do_what_they_say():
    """A checker that sees nothing finds no race either."""
    run = train(overlap=True)
    assert len([s for s in run.network.sent if s.what == "send"]) == 4 * STEPS
    packs = [launch for launch in run.machine.launches if launch.what == "_pack_kernel"]
    assert sum(launch.count for launch in packs) == 4 * STEPS


@pytest.mark.parametrize("config", [NCCL, STAGED], ids=["nccl", "gloo"])
def test_a_model_on_the_second_device_touches_no_other(config):
    """ "cuda" by itself is device 0, on every rank of a machine: they would all meet there."""
    run = train(config=config, devices=("cuda:1",), threads=True)
    assert not run.machine.races, report(run.machine)
    assert not run.machine.faults, run.machine.faults
    assert {str(s.device) for s in run.network.sent} == {"cuda:1" if config is NCCL else "cpu"}
    assert {str(memory.device) for memory in run.machine.memories if memory.device.type == "cuda"} == {"cuda:1"}


def test_hooks_of_two_threads_send_each_bucket_once_and_in_order(monkeypatch):
    """While one autograd thread sends a bucket, the other's gradient arrives.

    The second hook must wait (a lock) or leave the sending to the first; either way every bucket leaves once, in the
    one order of all ranks.
    """
    machine = Machine()
    with machine, Network(machine) as network:
        params = parameters(devices=("cuda:0", "cuda:1"))
        optimizer = gossip_sgd(params, overlap=True)
        training = Training(machine, params, optimizer)
        training.step()  # the first step agrees on the order of buckets
        reference = [s.address for s in network.sent if s.what == "send"]
        optimizer.zero_grad()
        training.forward()
        on_first = [k for k in reversed(range(8)) if params[k].device.index == 0]
        on_second = [k for k in reversed(range(8)) if params[k].device.index == 1]
        entered, finished = threading.Event(), threading.Event()
        errors, calls = [], []
        send = network.batch_isend_irecv

        def slow(ops):
            calls.append(ops)
            if len(calls) == 2:  # the last bucket of the first thread: now the other one's turn has come
                entered.set()
                finished.wait(1.5)  # which it is only if nothing keeps the other one
            return send(ops)

        for module in (torch.distributed, torch.distributed.distributed_c10d):
            monkeypatch.setattr(module, "batch_isend_irecv", slow)
        network.sent.clear()

        def backward(numbers):
            try:
                for k in numbers:
                    training.accumulate(k)
            except BaseException as error:  # noqa: BLE001 -- a thread's error would be lost
                errors.append(error)
            if numbers is on_first:
                finished.set()

        threads = [threading.Thread(target=backward, args=(n,)) for n in (on_second, on_first)]
        threads[0].start()
        assert entered.wait(5), "nothing left in the backward pass"
        threads[1].start()
        for thread in threads:
            thread.join()
        optimizer.step()
        assert not errors, errors
        sent = [s.address for s in network.sent if s.what == "send"]
        assert len(sent) == 4, f"{len(sent)} messages of 4 buckets left"
        assert sent == reference
        batches = [s.batch for s in network.sent]
        assert len(set(batches)) == 4
