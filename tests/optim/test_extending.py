"""Promises about what users add, each in one place of their own:

- a layer is a class with `before` or `after`: its buffers are in state and checkpoints, its settings in the groups;
- a topology is a function of the number of workers, and trains as the `Topology` that it returns, bit for bit;
- a rule's hyper-parameter has the bounds that the rule gives it, whatever other methods call theirs, and a method
  takes no hyper-parameter of another one;
- options that have got another form do the same for one release, and a FutureWarning says the new form.
"""

import functools
import warnings

import layers_of_users as mine
import pytest
import torch
import workers

import fused_dlam
from fused_dlam import Gossip, GossipSGD, Rule, SlowMo, rules, topology
from fused_dlam.layers import Lars, Layer
from fused_dlam.tools.launch import run_workers


def parameter(size=5):
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(size, dtype=torch.float64))


def steps(optimizer, p, count, start=0):
    for step in range(start, start + count):
        p.grad = torch.sin(p.detach() * (step + 1))
        optimizer.step()


def test_a_layer_after_the_rule():
    """Lookahead around SGD with momentum, against a loop that says the same with torch.optim.SGD: 1e-12."""
    p, q = parameter(), parameter()
    optimizer = GossipSGD([p], 0.1, layers=[mine.Lookahead(3)])
    sgd, slow = torch.optim.SGD([q], 0.1, momentum=0.9), q.detach().clone()
    for step in range(10):
        steps(optimizer, p, 1, step)
        steps(sgd, q, 1, step)
        if step % 3 == 2:
            slow = torch.lerp(slow, q.detach(), 0.5)
            q.data.copy_(slow)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_layer_before_the_rule():
    """The sign of gradient and weight decay, scaled by a setting that can be changed, as in a loop by hand: 1e-12."""
    p, q = parameter(), parameter()
    optimizer = GossipSGD([p], 0.1, weight_decay=0.3, layers=[mine.SignedGradient(0.2)])
    sgd = torch.optim.SGD([q], 0.1, momentum=0.9)
    for step in range(8):
        strength = optimizer.param_groups[0]["sign_strength"] = 0.2 + 0.1 * step
        steps(optimizer, p, 1, step)
        q.grad = torch.sign(torch.sin(q.detach() * (step + 1)) + 0.3 * q.detach()) * strength
        sgd.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    optimizer.param_groups[0]["sign_strength"] = 0.0
    with pytest.raises(ValueError, match="Invalid sign_strength: -1"):
        GossipSGD([parameter()], layers=[mine.SignedGradient(-1.0)])
    with pytest.raises(ValueError, match="Invalid sign_strength: -2"):
        optimizer.add_param_group({"params": [parameter()], "sign_strength": -2.0})


def test_a_layers_buffers_are_in_checkpoints():
    """A run that goes on from a checkpoint in the middle of a round is the uninterrupted one, bit for bit."""
    p, q = parameter(), parameter()
    whole = GossipSGD([p], 0.1, layers=[mine.Lookahead(4)])
    steps(whole, p, 6)
    saved, weights = whole.state_dict(), p.detach().clone()
    assert "slow_weights" in saved["state"][0]
    steps(whole, p, 5, 6)
    with torch.no_grad():
        q.copy_(weights)
    again = GossipSGD([q], 0.1, layers=[mine.Lookahead(4)])
    again.load_state_dict(saved)
    steps(again, q, 5, 6)
    assert torch.equal(p, q)
    with pytest.raises(ValueError, match="the checkpoint is of layers 'Lookahead.every=4.', this optimizer of ''"):
        GossipSGD([parameter()], 0.1).load_state_dict(saved)


def test_what_is_no_layer_is_refused():
    for wrong in (["lars"], 0.01, [Lars]):
        with pytest.raises(TypeError, match="layers must be a list of fused_dlam.layers.Layer"):
            GossipSGD([parameter()], layers=wrong)
    with pytest.raises(ValueError, match="share buffers: slow_weights"):
        GossipSGD([parameter()], layers=[mine.Lookahead(2), mine.Lookahead(3)])


def test_a_layer_that_does_nothing_changes_nothing():
    """Bit-equal, one worker."""
    p, q = parameter(), parameter()
    steps(GossipSGD([p], 0.1), p, 5)
    steps(GossipSGD([q], 0.1, layers=[Layer()]), q, 5)
    assert torch.equal(p, q)


def test_layers_and_topologies_of_ones_own_with_workers():
    """Real processes: a function of n is the topology that it returns, bit for bit; a layer's runs follow overlap=False
    bit for bit, and its setting may not differ between ranks."""
    graph = functools.partial(mine.spaced, every=2, exact=5)
    cases = [
        ("pc-dmsgd", graph, {}),
        ("pc-dmsgd", graph(3), {}),
        ("pc-dmsgd", "one-peer-exponential", {"layers": [mine.Lookahead(3)]}),
        ("pc-dmsgd", "one-peer-exponential", {"layers": [mine.Lookahead(3)], "overlap": False}),
    ]
    for rank in run_workers(workers.train_each, 3, cases, 12):
        paths = [got["path"] for got in rank]
        assert torch.equal(torch.stack(list(paths[0])), torch.stack(list(paths[1])))
        assert torch.equal(torch.stack(list(paths[2])), torch.stack(list(paths[3])))
        assert not torch.equal(paths[0][-1], paths[2][-1])


def test_a_function_that_returns_no_topology_is_refused():
    for build in (lambda graph: GossipSGD([parameter()], topology=graph), lambda graph: Gossip(sgd(), graph)):
        with pytest.raises(ValueError, match="4 workers"):
            build(lambda n: topology.ring(4))
        with pytest.raises(TypeError, match="topology"):
            build(lambda n: "ring-ish" and 3)


def sgd():
    return torch.optim.SGD([parameter()], 0.1)


def test_a_rules_bounds_are_its_own():
    """Names that other methods use for theirs, with values that those would refuse."""
    optimizer = GossipSGD([parameter()], method=mine.borrowed_names)
    group = optimizer.param_groups[0]
    assert (group["beta2"], group["mu"], group["eps"]) == (2.0, 5.0, -1.0)
    with pytest.raises(ValueError, match="Invalid mu: 3"):
        GossipSGD([parameter()], method=mine.borrowed_names, mu=3.0)
    with pytest.raises(ValueError, match="Invalid mu: 1.5"):
        GossipSGD([parameter()], method="qg-dmsgd", mu=1.5)


def test_no_hyper_parameter_of_another_method_is_taken_in_silence():
    for method in rules.ALL:
        for name in ("correction_gain", "correction_rate", "mu", "beta2", "eps"):
            if name not in rules.ALL[method].hyper:
                with pytest.raises(TypeError, match=f"method {method!r} has no hyper-parameter {name!r}"):
                    GossipSGD([parameter()], method=method, **{name: 0.5})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"nesterov": True}, {"method": "nesterov-mi-dmsgd"}, "method='nesterov-mi-dmsgd'"),
        ({"nesterov": False}, {}, "method='mi-dmsgd'"),
        ({"lars": 0.05}, {"layers": [Lars(0.05)]}, r"layers=\[fused_dlam.layers.Lars\(coefficient=0.05\)\]"),
        ({"slowmo": SlowMo(3)}, {"layers": [SlowMo(3)]}, r"layers=\[fused_dlam.layers.SlowMo\(every=3"),
        ({"communicate_every": 3}, {"topology": functools.partial(mine.spaced, every=3)}, r"\.every\(3\)"),
        ({"global_average_every": 4}, {"topology": functools.partial(mine.spaced, exact=4)}, "with_global_average"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",  # a function's name is its address
)
def test_old_names_do_the_same_and_say_the_new_one(old, new, said):
    """Bit-equal; the warning points at the caller."""
    p, q = parameter(), parameter()
    with pytest.warns(FutureWarning, match=said) as caught:
        before = GossipSGD([p], 0.1, **old)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = GossipSGD([q], 0.1, **new)
    steps(before, p, 7)
    steps(after, q, 7)
    assert torch.equal(p, q)
    assert before.param_groups[0]["topology"] == after.param_groups[0]["topology"]


def test_old_names_of_the_wrapper():
    with pytest.warns(FutureWarning, match=r"\.every\(2\)") as caught:
        optimizer = Gossip(sgd(), communicate_every=2)
    assert caught[0].filename == __file__ and "every 2" in optimizer.param_groups[0]["gossip_topology"]
    with pytest.raises(TypeError, match="Gossip has no nesterov=: it is the inner optimizer's"):
        Gossip(sgd(), nesterov=True)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="'decentlam' has no Nesterov form; these have"):
        fused_dlam.DecentLaM([parameter()], nesterov=True)
    with pytest.raises(TypeError, match="slowmo must be a fused_dlam.SlowMo"):
        GossipSGD([parameter()], slowmo=3)


def test_a_rule_may_have_an_old_names_name():
    """What a rule calls lars is the rule's."""
    rule = Rule("mine", mine.borrowed_names.send, mine.borrowed_names.update, hyper={"beta2": 1.0, "lars": 7.0})
    assert GossipSGD([parameter()], method=rule, lars=8.0).param_groups[0]["lars"] == 8.0


def test_a_rule_cannot_hide_a_setting():
    for name in ("lr", "momentum", "params", "step", "memory", "maximize"):
        with pytest.raises(ValueError, match=name):
            Rule("mine", mine.send, mine.update, hyper={"beta2": 1.0, name: 0.1})
