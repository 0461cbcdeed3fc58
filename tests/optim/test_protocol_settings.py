"""The protocol of torch.optim.Optimizer: groups and their settings (rows 1 to 3, 15 to 19, and 33).

Each row of protocol_table.md works, or is refused by an error that says what to do; what it promises is said where it
is tested. One worker unless said otherwise; three gloo workers run protocol_workers.py.
"""

import warnings

import pytest
import torch
from protocol_network import backward, error_of, follow, network
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dlam import GossipSGD, rules, topology
from fused_dlam.layers import Lars, SlowMo
from fused_dlam.optim import certificate
from fused_dlam.rules import scalars
from fused_dlam.rules.scalars import Scalars
from fused_dlam.theory.stability import growth


def test_construction(table):
    model = network()
    for params in (model.parameters(), [{"params": model.parameters(), "lr": 1.0}], model.named_parameters()):
        optimizer = GossipSGD(params, lr=0.1)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
    table.works(1, "equal to `torch.optim.SGD` step for step: test_optimizer.py")
    table.refused(1, error_of(GossipSGD, model.parameters(), lr=-1.0, kind=ValueError))
    table.refused(1, error_of(GossipSGD, model.parameters(), lr=torch.ones(2), kind=ValueError))


def test_late_groups(table, ranks):
    """Bit-equal to the run whose messages leave in step(), also where some had left: they are sent again."""
    for rank in ranks:
        early, late, awc, awc_late, *_ = rank["late_group"]
        assert torch.equal(early, late) and torch.equal(awc, awc_late) and not torch.equal(early, awc)
    table.works(2, "with several workers on all ranks before the same step, whose parameters are then rank 0's")
    optimizer = GossipSGD(network().parameters())
    for bad in (torch.ones(2, dtype=torch.int64), torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        table.refused(2, error_of(optimizer.add_param_group, {"params": [bad]}, kind=TypeError))
        assert len(optimizer.param_groups) == 1


def test_hyper_parameters_live_in_groups(table):
    def change(optimizer):
        def then(step, go):
            group = optimizer.param_groups[0]
            group.update(lr=0.1 / (step + 1), momentum=0.5 + step / 20, weight_decay=step / 100, maximize=step == 5)
            go()

        return then

    follow(change)
    table.works(3, "all four of `torch.optim.SGD`'s may change at every step, before the backward pass")


def test_schedulers(table):
    """Within 1e-6 of torch.optim.SGD, without torch's warning that the scheduler came first."""
    for make in (
        lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=10, cycle_momentum=False),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
        ),
    ):

        def change(optimizer, make=make):
            scheduler = make(optimizer)

            def then(step, go):
                go()
                scheduler.step()

            return then

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            follow(change)
    table.works(15, "`step` is an ordinary method; a change between backward pass and step() counts for the next step")


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: tensors read as numbers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{"method": name} for name in sorted(rules.ALL)]
    + [{"max_grad_norm": 0.05}, {"layers": [Lars(0.01)], "max_grad_norm": 0.05}, {"layers": [SlowMo(every=3)]}],
    ids=str,
)
def test_a_learning_rate_on_a_device_is_not_read(options, monkeypatch):
    """CPU tensors that count as a device's: one read per step, by passes that need numbers, and the same values."""

    def run(tensor):
        model = network(torch.float64)
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
        optimizer = GossipSGD(model.parameters(), lr=lr, weight_decay=0.01, **options)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
        reads = 0
        for step in range(8):
            optimizer.zero_grad()
            backward(model, step)
            with HostReads() as mode:
                optimizer.step()
            reads += mode.count
            scheduler.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), reads

    plain, _ = run(tensor=False)
    assert run(tensor=True)[1] > 0  # on the host it is read, for nothing waits: the count counts
    asked = []

    def numbers(self, original=Scalars.numbers):
        asked.append(sum(isinstance(v, torch.Tensor) for v in (self.grad_scale, *self.h)))
        return original(self)

    monkeypatch.setattr(scalars, "on_host", lambda value: False)
    monkeypatch.setattr(Scalars, "numbers", numbers)
    on_device, reads = run(tensor=True)
    assert reads == 0 and len(asked) == 8 and min(asked) >= 1
    torch.testing.assert_close(
        on_device, plain, rtol=1e-12 if options.keys() & {"max_grad_norm", "layers"} else 0, atol=0
    )


def test_tensor_learning_rate(table):
    """Every rule derives its scalars of a learning rate on a (simulated) GPU there: a read would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        lr = torch.tensor(0.1, device="cuda")
        error_of(float, lr)
        for rule in rules.ALL.values():
            memory = {}
            for _ in range(2):
                h = rule.scalars(scalars.scalar(lr), 0.9, 0.0, 0.5, {}, memory)
            assert h.lr.device.type == "cuda"
            assert all(v.device.type == "cuda" for name, v in memory.items() if name.startswith("lr"))
    table.works(16, "rules derive their scalars on the device, and the Triton kernels read them there; other passes on"
                    " a GPU take numbers and wait for it once per step")  # fmt: skip


def test_cyclic_momentum(table, ranks):
    """Within 1e-6 of torch.optim.SGD; a momentum at which disagreement grows is refused on all ranks at one step."""

    def cyclic(optimizer):
        scheduler = lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.9)
        return lambda step, go: (go(), scheduler.step())

    def one_cycle(optimizer):
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9)
        return lambda step, go: (go(), scheduler.step())

    follow(cyclic)
    follow(one_cycle)
    taken, left, message = ranks[0]["cycle"]
    assert (
        all(rank["cycle"] == ranks[0]["cycle"] for rank in ranks) and taken == 2 and left == 0
    )  # it grows from 0.5 on
    table.works(17, "`momentum` is read at every step, and certified again where it is new")
    table.refused(17, message)


def test_a_cycle_of_momenta_costs_a_few_certificates(monkeypatch, caplog):
    """1,000 momenta from 0.85 to 0.95: 20 beside the constructor's 0.9. Random graphs, which take seconds: none."""
    group = {"momentum": 0.9, "correction_rate": "auto", "correction_gain": 10.0}
    asked = []
    monkeypatch.setattr(certificate, "growth", lambda *args, **hyper: asked.append(args[2]) or growth(*args, **hyper))
    for graph, cost in ((topology.one_peer_exponential(8), 20), (topology.get("random-match", 8), 0)):
        asked.clear()
        one = certificate.Certificate(rules.pc_dmsgd, graph, allow_unstable=False)
        one.check({**group})
        for k in range(1000):
            one.recheck({**group, "momentum": 0.85 + 0.1 * k / 999})
        assert len(asked) == cost + 1
    assert caplog.text.count("takes too long to certify") == 1


def test_maximize(table):
    follow(lambda optimizer: lambda step, go: go(), maximize=True)
    table.works(18, "per group")


def test_flags(table):
    for name in ("foreach", "differentiable", "capturable"):
        error = error_of(GossipSGD, network().parameters(), **{name: True}, kind=TypeError)
    GossipSGD(network().parameters(), fused=False)
    table.works(19, "`fused` alone: None takes the best passes available")
    table.refused(19, error)


def test_repr(table):
    text = repr(GossipSGD(network().parameters(), lr=torch.tensor(0.5)))
    assert "momentum: 0.9" in text and "method: mi-dmsgd" in text
    table.works(33, "keys are text, values numbers, text and tensors")
