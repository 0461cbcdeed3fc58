"""Promises about what `GossipSGD`, `DecentLaM` and `Gossip` are given, with one worker:

- options, settings and hyper-parameters of any kind are taken or refused in words, by the constructor, before a
  parameter has moved;
- what is taken trains: three steps are those of the method in float64 (tests/oracle.py; `Gossip`: its inner optimizer),
  also through `state_dict` into a new optimizer, bit for bit.
"""

import copy
import warnings
from fractions import Fraction

import numpy as np
import oracle
import torch
from api_examples import fuzzed, refused
from hypothesis import assume
from hypothesis import strategies as st

from fused_dlam import DecentLaM, Gossip, GossipSGD, rules, topology
from fused_dlam.layers import Lars, SlowMo

ODD = st.sampled_from(
    [-1, 0, 1, 2, 0.5, True, False, None, "0.1", "auto", "", b"1", float("nan"), float("inf"), -float("inf"), 10**400,
     1j, np.float32(0.5), np.int64(1), np.bool_(True), np.array([0.5]), np.array(0.5), Fraction(1, 2),
     torch.tensor(0.5),
     torch.tensor([0.5]), torch.tensor([0.5, 0.5]), torch.tensor(float("nan")), torch.bfloat16, torch.int8, [], [0.1],
     (0.1,), {}, {"a": 1}, object, object(), print, SlowMo(2), [Lars(0.1)], topology.ring(1), topology.ring(2)]
)  # fmt: skip
SOUND = {
    "lr": st.sampled_from([0.0, 1e-3, 0.05, 0.3, np.float32(0.1), Fraction(1, 10)]),
    "momentum": st.sampled_from([0.0, 0.5, 0.9, 0.99]) | st.floats(0, 0.999),
    "weight_decay": st.sampled_from([0.0, 1e-2, 0.5]),
    "method": st.sampled_from(sorted(rules.ALL)),
    "topology": st.sampled_from([*topology.FAMILY, topology.ring(1), topology.ring]),
    "schedule": st.sampled_from(["auto", "atc", "midpoint", "awc"]),
    "overlap": st.sampled_from(["auto", True, False]),
    "maximize": st.booleans(),
    "layers": st.sampled_from([(), [SlowMo(2)], [SlowMo(1, 0.3, 0.7)], SlowMo(3, 0.0)]),
    "comm_dtype": st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]),
    "fused": st.sampled_from([None, False]),
    "bucket_mb": st.sampled_from([None, 1e-5, 1, 1e3]),
    "timeout": st.sampled_from([1.0, 600, 1e9]),
    "nonfinite": st.sampled_from(["skip", "raise"]),
    "max_grad_norm": st.sampled_from([None, 0.01, 1.0, 1e6]),
    "clip": st.sampled_from([None, "spikes"]),
    "allow_unstable": st.booleans(),
    "mu": st.floats(0, 1, exclude_max=True), "correction_rate": st.just("auto") | st.floats(0.01, 0.5),
    "correction_gain": st.floats(2, 1000), "beta2": st.floats(0.5, 0.9999), "eps": st.floats(1e-8, 0.1),
}  # fmt: skip
OTHERS = ["group", "hierarchical", "params", "nesterov", "lars", "slowmo", "communicate_every", "global_average_every",
          "learning_rate", "betas", "dampening", "foreach", "self", "defaults"]  # fmt: skip
SHAPES = [(3, 2), (4,), (), (1, 3)]
STEPS = 3


def parameters(dtype):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def flat(tensors):
    return torch.cat([t.detach().double().reshape(-1) for t in tensors]).numpy()


CURVATURE = np.linspace(0.5, 2.0, 14)
TARGET = np.linspace(-1.0, 1.0, 14)


def train(optimizer, params, steps):
    """On a quadratic; returns the parameters after each step."""
    parts = zip(np.split(CURVATURE, [6, 10, 11]), np.split(TARGET, [6, 10, 11]), params, strict=True)
    terms = [(torch.tensor(a).reshape(p.shape).to(p), torch.tensor(c).reshape(p.shape).to(p)) for a, c, p in parts]
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum((a * (p - c).square()).sum() / 2 for (a, c), p in zip(terms, params, strict=True)).backward()
        optimizer.step()
        path.append(flat(params))
    return np.stack(path)


def stated(options, start):
    """The method's equations in float64, for one worker."""
    method, momentum = options.get("method", "mi-dmsgd"), float(options.get("momentum", 0.9))
    sign, limit = (-1 if options.get("maximize") else 1), options.get("max_grad_norm")

    def grad(k, x):
        g = sign * CURVATURE * (x - TARGET)
        return g if limit is None else g * min(1.0, limit / (np.linalg.norm(g) + 1e-6))

    hyper = {k: v for k, v in options.items() if k in rules.ALL[method].hyper}
    if "correction_rate" in rules.ALL[method].hyper and hyper.get("correction_rate", "auto") == "auto":
        hyper["correction_rate"] = 0.1  # one worker hears nothing to integrate
    layers = options.get("layers", ())
    slow = next(iter(layers), None) if isinstance(layers, (list, tuple)) else layers
    return oracle.run(
        method, lambda k: np.eye(1), grad, start[None], lambda k: float(options.get("lr", 1e-3)), momentum,
        float(options.get("weight_decay", 0.0)), steps=STEPS, schedule=options.get("schedule", "auto"),
        slowmo=None if slow is None else (slow.every, slow.momentum, slow.lr),
        spikes=[slice(0, 14)] if options.get("clip") else None, **hyper,
    )[1:, 0]  # fmt: skip


@fuzzed(30, 0.12, chosen=st.fixed_dictionaries({}, optional={k: v for k, v in SOUND.items() if k not in
        ("mu", "correction_rate", "correction_gain", "beta2", "eps")}), data=st.data(),
        dtype=st.sampled_from([torch.float64, torch.float32]))  # fmt: skip
def test_sound_choices_train(chosen, data, dtype):
    own = [name for name in rules.ALL[chosen.get("method", "mi-dmsgd")].hyper if name in SOUND]
    chosen = {**chosen, **data.draw(st.fixed_dictionaries({}, optional={k: SOUND[k] for k in own}))}
    assume(not (chosen.get("clip") and chosen.get("bucket_mb") == 1e-5))  # the oracle has one bucket
    params = parameters(dtype)
    start = flat(params)
    optimizer, error = refused(lambda: GossipSGD(params, **chosen))
    if error is not None:
        assert "schedule" in str(error) or "clip" in str(error), error
        return
    path, wanted = train(optimizer, params, STEPS), stated(chosen, start)
    scale = np.maximum.accumulate(abs(wanted).max(axis=1, keepdims=True))
    assert (abs(path - wanted) <= (1e-8 if dtype == torch.float64 else 2e-5) * scale).all(), abs(path - wanted).max()
    again = parameters(dtype)
    with torch.no_grad():
        for p, q in zip(again, params, strict=True):
            p.copy_(q)
    other = GossipSGD(again, **chosen)
    other.load_state_dict(optimizer.state_dict())
    assert np.array_equal(train(optimizer, params, 2), train(other, again, 2))


@fuzzed(50, 0.12, wrong=st.dictionaries(st.sampled_from([*SOUND, *OTHERS]), ODD, min_size=1, max_size=2),
        kind=st.sampled_from([GossipSGD, DecentLaM, "mi", "adam"]))  # fmt: skip
def test_odd_choices(wrong, kind):
    params = parameters(torch.float64)
    before = flat(params)
    options = dict(wrong)
    assume(not {"self"} & set(options) and options.get("topology") is not object)  # what it raises is its own
    if kind in ("mi", "adam"):
        options.setdefault("method", {"mi": "mi-dmsgd", "adam": "adamw"}[kind])
    given = options.pop("params", params)
    build = DecentLaM if kind is DecentLaM else GossipSGD
    optimizer, error = refused(lambda: build(given, **options))
    if error is not None:
        assert np.array_equal(before, flat(params)) and all(p.grad is None for p in params)
        return
    path = train(optimizer, params, STEPS)
    rates = [float(options.get(k, 0) or 0) for k in ("lr", "weight_decay")]
    assert np.isfinite(path).all() or max(rates) > 10, options


INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01), "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}  # fmt: skip
GOSSIPS = ["topology", "schedule", "comm_dtype", "fused", "bucket_mb", "timeout"]


@fuzzed(15, 0.06, inner=st.sampled_from(sorted(INNER)), chosen=st.fixed_dictionaries({}, optional={
        k: SOUND[k] for k in GOSSIPS}), wrong=st.dictionaries(st.sampled_from([*GOSSIPS, *OTHERS, "overlap"]), ODD,
        max_size=1), optimizer=st.none() | ODD)  # fmt: skip
def test_gossip(inner, chosen, wrong, optimizer):
    assume(not {"self", "params"} & set(wrong) and wrong.get("topology") is not object)
    if optimizer is not None:
        refused(lambda: Gossip(optimizer))
    params, twin = parameters(torch.float64), parameters(torch.float64)
    made, error = refused(lambda: Gossip(INNER[inner](params), **{**chosen, **wrong}))
    if error is not None:
        assert wrong and np.array_equal(flat(params), flat(twin))
        return
    np.testing.assert_allclose(
        train(made, params, STEPS), train(INNER[inner](twin), twin, STEPS), rtol=1e-9, atol=1e-12
    )
    again = parameters(torch.float64)
    other = Gossip(INNER[inner](again), **{**chosen, **wrong})
    with torch.no_grad():
        for p, q in zip(again, params, strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(made.state_dict()))  # whose tensors are the inner optimizer's own, as in torch
    assert np.array_equal(train(made, params, 2), train(other, again, 2))


@fuzzed(25, 0.06, name=st.sampled_from(["lr", "momentum", "weight_decay", "maximize", "method", "topology", "step",
        "memory", "layers", "correction_rate", "correction_gain", "lars", "params", "weight_decy"]), value=ODD,
        method=st.sampled_from(["mi-dmsgd", "pc-dmsgd", "adam", "qg-dmsgd"]), early=st.booleans())  # fmt: skip
def test_settings_that_are_set_between_steps(name, value, method, early):
    """A step takes them or refuses them in words, and then a sound value lets it go on."""
    params = parameters(torch.float64)
    optimizer = GossipSGD(params, method=method, lr=0.1, layers=[Lars(0.1)] if name == "lars" else ())
    assume(name in ("lr", "momentum", "weight_decay", "maximize", "correction_rate", "correction_gain", "lars",
                    "weight_decy") and (name in optimizer.param_groups[0] or name == "weight_decy"))  # fmt: skip
    train(optimizer, params, 1)
    before, sound = flat(params), optimizer.param_groups[0].get(name)
    optimizer.param_groups[0][name] = value
    path, error = refused(lambda: train(optimizer, params, 1))
    if error is not None:
        assert np.array_equal(before, flat(params))
        optimizer.param_groups[0][name] = sound
        assert np.isfinite(train(optimizer, params, 1)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.state_dict()
