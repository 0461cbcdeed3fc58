"""The protocol of torch.optim.Optimizer: what else torch puts around an optimizer (rows 28 to 32, and 34).

Each row of protocol_table.md works, or is refused by an error that says what to do; what it promises is said where it
is tested. One worker unless said otherwise; three gloo workers run protocol_workers.py.
"""

import re

import torch
from protocol_network import error_of, network

from fused_dlam import GossipSGD
from fused_dlam.engine import step_allowed


def test_sharded_parameters(table, ranks):
    """Here over the ranks that would gossip; sharded inside machines, test_inside.py trains them."""
    assert all("would exchange their different shards" in str(rank["sharded"]) for rank in ranks)
    table.works(28, "FSDP2's inside a machine gossip with the same shards of other machines: test_inside.py")
    table.refused(28, ranks[0]["sharded"])


def test_compiled(table, ranks):
    """Bit-equal to no compilation, overlapped and awc; messages leave in compiled backward passes as in others."""
    for rank in ranks:
        (plain, early), (compiled, early_too), (awc, _), (awc_compiled, _) = rank["compiled"]
        assert torch.equal(plain, compiled) and early == early_too > 0 and torch.equal(awc, awc_compiled)
    table.works(29, "the graph breaks at `step`; messages leave in compiled backward passes")


def test_optimizers_within_the_backward_pass(table, ranks):
    table.refused(30, ranks[0]["per_parameter"])
    assert all("one optimizer over all parameters" in str(rank["per_parameter"]) for rank in ranks)


def test_wrappers(table, ranks):
    assert all("agree" in str(rank["zero_redundancy"]) and "moved" in str(rank["post_local"]) for rank in ranks)
    text = re.sub(r"(rank \d has) .*?(?=, rank|\. Build)", r"\1 ...", str(ranks[0]["zero_redundancy"]))
    table.refused(31, ValueError(text))
    table.refused(31, ranks[0]["post_local"])


def test_profile(table, ranks):
    """In a real trace of every rank: a message is on its way before the backward pass ends, or (awc) through all of it;
    the parts of each exchange lie in order."""
    for rank in ranks:
        spans = {}
        for name, begin, end in rank["trace"]["atc"]:
            spans.setdefault(name, []).append((begin, end))
        buckets, steps = rank["trace"]["atc buckets"], spans["Optimizer.step#GossipSGD.step"]
        passes = [s for name, all_ in spans.items() if name.startswith("autograd::engine") for s in all_]
        hidden = 0
        for k, step in enumerate(range(2, 5)):
            for b in range(buckets):
                parts = ("pack", "send", "exchange", "wait", "combine")
                found = {part: spans[f"fused_dlam::{part} bucket {b} step {step}"] for part in parts}
                assert all(len(s) == 1 for s in found.values())
                pack, send, exchange, wait, combine = (s[0] for s in found.values())
                assert pack[1] <= exchange[0] <= send[0] <= send[1] <= wait[0] <= exchange[1] <= wait[1] <= combine[0]
                assert steps[k][0] <= wait[0] and combine[1] <= steps[k][1]
                hidden += any(begin < exchange[0] < end for begin, end in passes)
        assert hidden >= 3 and buckets >= 2  # at least one bucket's in every step
        awc = {name: (begin, end) for name, begin, end in rank["trace"]["awc"] if name.startswith("fused_dlam")}
        backward_of_4 = [s for s in rank["trace"]["awc"] if s[0].startswith("autograd::engine")][-1]
        begin, end = awc["fused_dlam::exchange bucket 0 step 4"]
        assert begin < backward_of_4[1] and backward_of_4[2] < end
    table.works(32, "`fused_dlam::pack bucket 3 step 7`, and so on; `exchange` lasts from sent to received, so hidden"
                    " communication lies beside the backward pass")  # fmt: skip


def test_capture(table, monkeypatch):
    """No GPU needed: the engine is told that it has parameters on one, and torch that a capture is under way."""
    optimizer = GossipSGD(network().parameters())
    step_allowed.check_step_allowed(optimizer._engine, averaging=False)
    optimizer._engine.lanes[torch.device("cuda")] = None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    step_allowed.check_step_allowed(optimizer._engine, averaging=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    table.refused(34, error_of(optimizer.step, kind=RuntimeError))
