"""Promises about parameters, groups and loaded states, of one worker:

- parameters of any shape, type and layout are trained as torch.optim.SGD trains copies of them, with missing, strided
  and expanded gradients, frozen ones, duplicates and groups of their own settings, or are refused in words;
- what `params` and `add_param_group` cannot be is refused in words, and the optimizer is then as it was;
- a state that was changed loads, and a step can be taken, or is refused in words with nothing loaded.
"""

import copy

import numpy as np
import torch
from api_examples import fuzzed, refused
from hypothesis import assume
from hypothesis import strategies as st
from test_api_options import ODD
from torch.nn import Parameter

from fused_dlam import Gossip, GossipSGD
from fused_dlam.layers import SlowMo

SHAPE = st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (1, 3, 2)])
TYPE = st.sampled_from(
    [torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64]
)
LAYOUT = st.sampled_from(["plain"] * 4 + ["transposed", "strided", "expanded", "sparse", "meta"])
PIECE = st.tuples(SHAPE, TYPE, LAYOUT, st.sampled_from([True, True, True, False]), st.integers(0, 99))
GRADIENT = st.sampled_from(["dense"] * 5 + ["none", "zero", "transposed", "expanded", "sparse"])
LOW = (torch.bfloat16, torch.float16)


def numbers(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def parameter(shape, dtype, layout, trainable, seed):
    value = numbers(shape, dtype, seed)
    if layout == "transposed":
        value = value.mT.contiguous().mT if value.dim() > 1 else value
    elif layout == "strided":
        value = torch.stack([value, value], -1)[..., 0]
    elif layout == "expanded":
        value = value.expand(2, *value.shape)
    elif layout == "sparse" and value.dim():
        value = value.to_sparse()
    elif layout == "meta":
        value = value.to("meta")
    return Parameter(value, requires_grad=trainable and dtype is not torch.int64)


def gradient(kind, p, seed):
    g = numbers(p.shape, p.dtype, seed)
    if kind == "none":
        return None
    if kind == "zero":
        return torch.zeros_like(g)
    if kind == "transposed" and g.dim() > 1:
        return g.mT.contiguous().mT
    if kind == "expanded":
        return torch.ones((), dtype=p.dtype).expand(p.shape)
    if kind == "sparse" and g.dim():
        return g.to_sparse()
    return g


SETTINGS = st.fixed_dictionaries({}, optional={
    "lr": st.sampled_from([0.0, 0.05, 0.1]), "momentum": st.sampled_from([0.0, 0.5, 0.9]),
    "weight_decay": st.sampled_from([0.0, 0.1]), "maximize": st.booleans(), "name": st.just("mine"),
})  # fmt: skip


@fuzzed(80, 0.1, groups=st.lists(st.tuples(st.lists(PIECE, min_size=1, max_size=4), SETTINGS), min_size=1, max_size=3),
        kinds=st.lists(GRADIENT, min_size=3, max_size=9), twice=st.booleans(), later=st.booleans(),
        form=st.sampled_from(["groups", "generator", "named"]), bucket_mb=st.sampled_from([None, 1e-5]))  # fmt: skip
def test_parameters_of_every_kind(groups, kinds, twice, later, form, bucket_mb):
    built = [{"params": [parameter(*piece) for piece in pieces], **settings} for pieces, settings in groups]
    everything = [p for group in built for p in group["params"]]
    pieces = [piece for group, _ in groups for piece in group]
    if twice and form != "named":
        built[0]["params"] = [*built[0]["params"], built[0]["params"][0]]
    elif form == "named":
        built = [{**g, "params": [(f"{i}.{j}", p) for j, p in enumerate(g["params"])]} for i, g in enumerate(built)]
    last = built.pop() if later and len(built) > 1 else None
    given = (group for group in built) if form == "generator" else built

    def build():
        optimizer = GossipSGD(given, lr=0.1, bucket_mb=bucket_mb)
        if last is not None:
            optimizer.add_param_group(last)
        return optimizer

    optimizer, error = refused(build)
    odd = any(
        dtype is torch.int64 or layout in ("meta", "expanded") or (layout == "sparse" and shape)
        for shape, dtype, layout, *_ in pieces
    )
    if error is not None:
        assert odd, error
        return
    assume(not any(layout == "meta" for _, _, layout, *_ in pieces))
    twins = [Parameter(p.detach().to(torch.float32 if p.dtype in LOW else p.dtype).clone()) for p in everything]
    by_parameter = {id(p): twin for p, twin in zip(everything, twins, strict=True)}
    names = ("lr", "momentum", "weight_decay", "maximize")
    reference = torch.optim.SGD(
        [{"params": [by_parameter[id(p)] for p in dict.fromkeys(g["params"])], **{k: g[k] for k in names}}
         for g in optimizer.param_groups]
    )  # fmt: skip
    for step in range(3):
        for i, (p, twin) in enumerate(zip(everything, twins, strict=True)):
            g = (
                gradient(kinds[(step * len(everything) + i) % len(kinds)], p, 10 * step + i)
                if p.requires_grad
                else None
            )
            p.grad = g
            twin.grad = None if g is None or g.layout != torch.strided else g.to(twin.dtype).clone()
        sparse = any(p.grad is not None and p.grad.layout != torch.strided for p in everything)
        _, error = refused(optimizer.step, RuntimeError)
        if error is not None:
            assert sparse and "sparse gradients" in str(error), error
            return
        assert not sparse
        reference.step()
        for p, twin in zip(everything, twins, strict=True):
            eps = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}.get(p.dtype, 1e-5)
            torch.testing.assert_close(p.detach().to(twin.dtype), twin.detach(), rtol=eps, atol=eps)


def plain():
    return [Parameter(numbers(shape, torch.float32, 1)) for shape in ((3, 2), (4,))]


ODD_PARAMS = ODD | st.sampled_from(
    [[None], [1], ["x"], [torch.nn.Linear(2, 2)], torch.nn.Linear(2, 2), [[]], {"params": []}, [{}], [{"params": None}],
     [{"params": 3}], [{"params": {1}}], set(), {1}, iter(()), (x for x in [1]), [("a",)], [("a", "b")], [(1, 2, 3)],
     [{"lr": 0.1}], [{"params": []}, {}], torch.ones(3), Parameter(torch.ones(3)), [torch.ones(3)],
     [torch.ones(2, requires_grad=True) * 2], range(3), "params", [np.ones(3)]]
)  # fmt: skip


@fuzzed(60, 0.05, wrong=ODD_PARAMS, inside=st.booleans(), settings=st.dictionaries(
        st.sampled_from(["lr", "momentum", "weight_decay", "maximize", "step", "layers", "method", "lars"]),
        ODD, max_size=2), kind=st.sampled_from(["mi", "slowmo", "gossip"]))  # fmt: skip
def test_groups_that_make_no_sense(wrong, inside, settings, kind):
    params = plain()
    refused(lambda: GossipSGD(copy.copy(wrong) if isinstance(wrong, list) else wrong))
    if kind == "gossip":
        optimizer = Gossip(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    else:
        optimizer = GossipSGD(params, lr=0.1, layers=[SlowMo(2)] if kind == "slowmo" else ())
    group = {"params": wrong, **settings} if inside else wrong
    if not inside and settings:
        group = {"params": [Parameter(torch.ones(2))], **settings}
    before = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    _, error = refused(lambda: optimizer.add_param_group(group))
    if error is not None:
        assert len(optimizer.param_groups) == 1
        assert before == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


VALUES = ODD | st.sampled_from(
    [torch.ones(3, 2), torch.ones(2, 3), torch.ones(()), torch.full((3, 2), float("nan")), torch.ones(3, 2).bool(),
     torch.ones(3, 2, dtype=torch.complex64), torch.ones(3, 2).double(), torch.ones(3, 2).to_sparse(),
     torch.ones(3, 2, device="meta"), {"a": torch.ones(3, 2)}, [[1.0] * 2] * 3, np.ones((3, 2))]
)  # fmt: skip


def everything(params, optimizer):
    state = [v for p in params for _, v in sorted(optimizer.state[p].items()) if isinstance(v, torch.Tensor)]
    groups = repr([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    return [t.detach().numpy().tobytes() for t in (*params, *state)], groups


def trained(kind):
    params = plain()
    if kind in ("sgd", "adamw"):
        inner = torch.optim.SGD(params, lr=0.1, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(params, lr=0.1)
        optimizer = Gossip(inner)
    else:
        optimizer = GossipSGD(params, lr=0.1, method=kind.partition(" ")[0], layers=[SlowMo(2)] if " " in kind else ())
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params, optimizer


KINDS = ("mi-dmsgd", "adam", "mi-dmsgd slowmo", "sgd", "adamw")


def spoiled(saved, draw, other):
    where = draw(st.sampled_from(["group", "group", "state", "state", "parameter", "top", "other", "key"]))
    value, drop = draw(VALUES), draw(st.booleans())
    group, state = saved["param_groups"][0], saved["state"]
    entries = state.get(0, {})
    if where == "group":
        name = draw(
            st.sampled_from([*sorted(group), "gossip_step", "betas", "dampening", "nesterov", "lars", "slowmo"])
        )
        target = group
    elif where == "state" and entries:
        target, name = entries, draw(st.sampled_from([*sorted(entries), "momentum_buffer", "gossip_master", "new"]))
    elif where == "parameter":
        target, name = state, draw(st.sampled_from([0, 1, 2, "0"]))
    elif where == "top":
        target, name = saved, draw(st.sampled_from(["state", "param_groups", "new"]))
    elif where == "key":
        target, name = state, draw(st.sampled_from([None, -1, "x", 1.5, (1,)]))
    else:
        return other
    inner = "gossip_step" in group and target is not saved and target is not state
    assume(not inner or name == "lr" or str(name).startswith("gossip_"))  # the rest is the inner optimizer's own
    if drop:
        target.pop(name, None)
    else:
        target[name] = value
    return saved


@fuzzed(100, 0.1, kind=st.sampled_from(KINDS), other=st.sampled_from(KINDS), data=st.data())
def test_states_that_were_changed(kind, other, data):
    params, optimizer = trained(kind)
    saved = spoiled(copy.deepcopy(optimizer.state_dict()), data.draw, trained(other)[1].state_dict())
    before = everything(params, optimizer)
    _, error = refused(lambda: optimizer.load_state_dict(saved))
    if error is not None:
        assert everything(params, optimizer) == before, f"something was loaded although: {error}"
    for p in params:
        p.grad = torch.ones_like(p)
    if kind not in ("sgd", "adamw"):
        refused(optimizer.step)
