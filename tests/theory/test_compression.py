"""Codecs, and what simulated workers remember of their messages, against plain loops.

Promises:

- `Int8` and `Int4` give every number that was nearest, ties to even, of the multiples of its block's largest over 127
  or 7; `TopK` gives the largest of every 1,024, rounded to bfloat16, and zeros. For any length, empty ones included;
- what is not finite costs nobody else a digit: `Int8` tells of it by NaN;
- a simulated method with compressed messages is the one written here from the equations, W and loops, to 1e-12, on
  directed, static and changing graphs, with exact averages between; its mean is that of the method without, to 1e-12,
  where the gradients do not depend on x, for any n and codec, also one that sends nothing but zeros;
- with references what 4 bits leave out is gone in the end: workers come as near to each other as with full messages.
"""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from everyday import everyday

import fused_dlam
from fused_dlam import Simulation, simulate, topology
from fused_dlam.layers import Codec, Int4, Int8, TopK, compression
from fused_dlam.layers.compression import damping, get, progress
from fused_dlam.theory.regression import Regression
from fused_dlam.theory.remembered import through

SIZES = (0, 1, 2, 3, 17, 255, 256, 257, 1024, 1500, 4099)


def single(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def whole_numbers(v, block, most):
    """Python's `round` goes to even at ties. Products as float32 has them where v is float32."""
    size = single if v.dtype == torch.float32 else float
    out = []
    for start in range(0, len(v), block):
        part = [float(value) for value in v[start : start + block]]
        scale = single(single(max(abs(value) for value in part)) * single(1 / most))
        inverse = single(1 / scale) if scale >= 2**-126 else 0.0
        codes = [max(-most, min(most, round(size(value * inverse)))) for value in part]
        out += [size(code * (scale if inverse else 0.0)) for code in codes]
    return torch.tensor(out, dtype=v.dtype)


def largest(v, share):
    out = torch.zeros_like(v)
    for start in range(0, len(v), 1024):
        part = v[start : start + 1024]
        order = sorted(range(len(part)), key=lambda i: -abs(float(part[i])))
        for i in order[: max(1, round(len(part) * share))]:
            out[start + i] = part[i].bfloat16()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", SIZES)
def test_codecs_against_loops(n, dtype):
    v = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)
    v[n // 2 :] *= 1e-3
    assert torch.equal(through(Int8(), v), whole_numbers(v, 256, 127))
    assert torch.equal(through(Int8(16), v), whole_numbers(v, 16, 127))
    assert torch.equal(through(Int4(), v), whole_numbers(v, 256, 7))
    for share in (0.125, 0.3, 1.0):
        assert torch.equal(through(TopK(share), v), largest(v, share))


def test_ties_zeros_and_extremes():
    scale = 2.0**-3  # 127 times it is the largest, and halves of it are ties
    v = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0, -127.0], dtype=torch.float64) * scale
    v = torch.cat([v, torch.zeros(8), torch.full((16,), 1e-40)]).double()
    # 127 * float32(1/127) may be off by a rounding: then these are ties no more, but stay within one of it.
    assert torch.equal(through(Int8(16), v), whole_numbers(v, 16, 127))
    assert not through(Int8(16), v)[16:].any(), "a block without a scale is zeros"
    huge = torch.full((16,), 3.4e38)
    assert through(Int8(16), huge).isfinite().all() and through(Int4(16), huge).isfinite().all()
    assert through(TopK(), huge).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_where_it_is(bad):
    v = torch.randn(512, generator=torch.Generator().manual_seed(1))
    clean = v.clone()
    clean[7] = 0.0
    v[7] = bad
    got, want = through(Int8(), v), through(Int8(), clean)
    assert got[7].isnan()
    got[7] = 0.0
    assert torch.equal(got, want)
    assert through(Int8(), torch.full((300,), bad)).isnan().all()


def test_bytes():
    n = 1 << 20
    assert 4 * n / Int8().bytes(n) > 3.93 and 4 * n / Int8(1024).bytes(n) > 3.98
    assert 4 * n / Int4().bytes(n) > 7.7 and 4 * n / TopK().bytes(n) == 8.0
    for codec in (Int8(), Int4(), TopK(), TopK(0.001)):
        assert codec.bytes(0) == 0 or codec.bytes(0) < 16


def test_names_and_refusals():
    assert repr(get("int8")) == "Int8(block=256)" and get(None) is None and repr(get("topk")) == "TopK(share=0.125)"
    for wrong, error in (("int3", ValueError), (8, TypeError), (Int8, TypeError)):
        with pytest.raises(error, match="compress"):
            get(wrong)
    for build in (lambda: Int8(0), lambda: Int8(2.5), lambda: TopK(0.0), lambda: TopK(1.5), lambda: Int4(True)):
        with pytest.raises(ValueError, match="Invalid"):
            build()
    with pytest.raises(ValueError, match="period"):
        Simulation("dmsgd", fused_dlam.topology.random_match(8, seed=1), np.zeros((8, 3)), compress="int4")


def test_the_codec_of_the_page():
    page = (Path(fused_dlam.__file__).parent / "layers" / "README.md").read_text()
    code = next(part for part in page.split("```python\n") if "class Float8" in part).split("```")[0]
    names = {}
    exec(code.split("optimizer = ")[0], names)
    codec, v = names["Float8"](), torch.tensor([0.5, -1.0, 448.0, 0.0, math.nan, 1.1])
    assert torch.equal(through(codec, v).nan_to_num(-7.0), torch.tensor([0.5, -1.0, 448.0, 0.0, -7.0, 1.125]))
    x = Simulation("dmsgd", "ring", np.ones((4, 5)), compress=codec)
    assert np.isfinite(x.step(np.arange(20.0).reshape(4, 5).view(type(x.x)), 0.1)).all()


class Nothing(Codec):
    """The worst of all codecs."""

    name = "nothing"

    def bytes(self, n):
        return 0

    def encode(self, v, data):
        pass

    def decode(self, data, out):
        out.zero_()


class Third(Nothing):
    """What changed, times a third: no rounding, so that loops have the same numbers."""

    references = True

    def bytes(self, n):
        return 8 * n

    def encode(self, v, data):
        data.view(torch.float64).copy_(v / 3)

    def decode(self, data, out):
        out.copy_(data.view(torch.float64))


def dense(codec, graph, grad, x0, steps, lr, beta=0.9):
    """DmSGD with compressed messages, from the two equations at the head of layers/compression.py."""
    n = graph.n
    x, m = [row.copy() for row in x0], [0 * row for row in x0]
    e, h = [0 * row for row in x0], {}
    code = lambda v: through(codec, torch.from_numpy(v)).numpy()  # noqa: E731
    gamma, path = damping(codec, graph.phases), []
    for k in range(steps):
        W, g = graph.weights(k), grad(k, np.stack(x))
        m = [beta * m[i] + g[i] for i in range(n)]
        y = [x[i] - lr * m[i] for i in range(n)]
        if n > 2 and np.allclose(W, 1 / n):
            said, factor = y, 1.0
        elif codec.references:
            known = h.setdefault(k % graph.period, [x0[i].copy() for i in range(n)])
            for i in range(n):
                if any((W[i, j] or W[j, i]) and i != j for j in range(n)):
                    known[i] = known[i] + code(y[i] - known[i])
            said, factor = known, gamma
        else:
            said, factor = [0 * row for row in y], 1.0
            for i in range(n):
                if any((W[i, j] or W[j, i]) and i != j for j in range(n)):
                    v = y[i] + e[i]
                    said[i] = code(v)
                    e[i] = v - said[i]
        x = [y[i] + factor * sum(W[i, j] * (said[j] - said[i]) for j in range(n)) for i in range(n)]
        path.append(np.stack(x))
    return np.stack(path)


GRAPHS = {
    "one-peer": lambda n: topology.get("one-peer-exponential", n),
    "directed": lambda n: topology.get("exponential", n),
    "ring": lambda n: topology.get("ring", n),
    "changing": lambda n: topology.get("one-peer-exponential", n).every(2).with_global_average(5),
}


@pytest.mark.parametrize("codec", [Int8(16), Int4(16), TopK(0.25), Third(), Nothing()], ids=lambda c: c.name + repr(c))
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_simulation_is_the_equations(graph, codec):
    for n in (1, 2, 3, 5, 8) if graph == "changing" else (3, 8):
        top, problem, x0 = GRAPHS[graph](n), Regression(n, d=19), np.random.default_rng(n).standard_normal(19)
        found = simulate("dmsgd", top, lambda k, x: problem.grad(x), x0, 12, 0.01, compress=codec)  # noqa: B023
        want = dense(codec, top, lambda k, x: problem.grad(x), np.tile(x0, (n, 1)), 12, 0.01)  # noqa: B023
        assert np.abs(found[1:] - want).max() < 1e-12


@pytest.mark.parametrize("codec", [Int8(), Int4(), TopK(), Nothing()], ids=lambda c: c.name)
@pytest.mark.parametrize("method", everyday(["mi-dmsgd", "da-dmsgd"], ["mi-dmsgd"]))
def test_the_mean_is_kept(method, codec):
    random = np.random.default_rng(0)
    for graph in ("one-peer-exponential", "exponential"):
        g = random.standard_normal((40, 5, 33)) * 0.1
        x0 = random.standard_normal(33)
        paths = [
            simulate(method, topology.get(graph, 5), lambda k, x: g[k % 40], x0, 200, 0.02, compress=c)  # noqa: B023
            for c in (codec, None)
        ]
        means = [path.mean(1) for path in paths]
        scale = np.abs(paths[0]).max()
        assert np.abs(means[0] - means[1]).max() < 1e-12 * max(1.0, scale)
        assert np.abs(paths[0] - paths[1]).max() > 1e-4, "or nothing was compressed"


def test_four_bits_leave_nothing_out_in_the_end():
    n = 8
    graph, problem = topology.get("one-peer-exponential", n), Regression(n)
    ends = {}
    for compress in (None, "int8", "int4"):
        path = simulate("mi-dmsgd", graph, lambda k, x: problem.grad(x), np.zeros(10), 600, 2e-3, compress=compress)
        ends[compress] = problem.error(path[-60:]).mean()
    assert ends["int4"] < 1.01 * ends[None] < 1e-6 < ends["int8"] < 1e-3


def test_repeated_pulls_are_damped(monkeypatch):
    exponential, one_peer = (topology.get(name, 8).phases for name in ("exponential", "one-peer-exponential"))
    assert damping(Int4(), exponential) == damping(Int8(), exponential) == 1.0 == progress(None, exponential)
    assert damping(TopK(1 / 8), exponential) == 0.5 and progress(TopK(1 / 8), exponential) == 0.25
    assert damping(TopK(1 / 8), one_peer) == 0.75
    random = np.random.default_rng(1)
    t, c = random.standard_normal((8, 1024)), 0.5 + random.random((8, 1024))
    best = (c * t).mean(0) / c.mean(0)

    def far():
        graph = topology.get("exponential", 8)
        x = simulate("mi-dmsgd", graph, lambda k, x: c * (x - t), np.zeros(1024), 200, 0.1, compress="topk")[-1]
        return np.abs(x - best).max()

    assert far() < 0.3
    monkeypatch.setattr(compression, "REPEATED", math.inf)
    assert far() > 3.0, "the control: they are not"
