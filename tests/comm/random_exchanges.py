"""Exchanges drawn at random, each compared with dense float64; run by worker processes in test_random_exchanges.py.

All ranks draw the same: with whom each exchanges, with which weights, and every rank's tensors. So each computes what
it must receive by plain loops over y_i = sum_j M[i][j] x_j; the loss sum_i <c_i, y_i> has the gradients
sum_i M[i][j] c_i.
"""

import random
import warnings
from unittest import mock

import numpy as np
import torch

import fused_dlam
from fused_dlam import neighbor_allreduce, neighbor_exchange, neighbor_gather, pair_average, push_sum
from fused_dlam.comm.transfer import Transfer

#: Of the sum of the absolute values of what is added: 8 roundings of the type in which it is summed; of 16 bits one
#: rounding of the result and one of what was scaled.
TOLERANCE = {
    torch.float64: 8 * 2.0**-53,
    torch.complex128: 16 * 2.0**-53,
    torch.float32: 8 * 2.0**-24,
    torch.complex64: 16 * 2.0**-24,
    torch.bfloat16: 2 * 2.0**-8,
    torch.float16: 2 * 2.0**-11,
}
TYPES = list(TOLERANCE)
ANY_TYPES = [*TYPES, torch.int64, torch.int16, torch.uint8, torch.bool, torch.complex32]
SMALLEST = {torch.float16: 2.0**-24}  # below the smallest normal number roundings are of this size


def wide(t):
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)


def dense(M, X):
    """(sum_j M[i][j] x_j, sum_j |M[i][j]| |x_j|) for each i."""
    n = len(M)
    Y = [sum((M[i][j] * X[j] for j in range(n)), torch.zeros_like(X[0])) for i in range(n)]
    S = [sum((abs(M[i][j]) * X[j].abs() for j in range(n)), torch.zeros_like(X[0].abs())) for i in range(n)]
    return Y, S


class Draw:
    """What is drawn for one exchange: from its number alone."""

    def __init__(self, seed, number, n):
        self.rng, self.n = random.Random(f"{seed} {number}"), n
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(40))

    def shape(self):
        size = self.rng.randint(0, 50)
        return self.rng.choice([(size,), (size,), (size, 1), (2, size // 2), (size // 6, 2, 3), ()])

    def tensor(self, shape, dtype):
        """Contiguous, or a transpose, or every other element of a longer one."""
        kind = torch.complex128 if dtype.is_complex else torch.float64
        form = self.rng.choice(["contiguous", "contiguous", "transposed", "strided"])
        if form == "transposed" and len(shape) > 1:
            return self._numbers(shape[::-1], kind).to(dtype).permute(*range(len(shape))[::-1])
        if form == "strided" and shape:
            return self._numbers((*shape[:-1], 2 * shape[-1]), kind).to(dtype)[..., ::2]
        return self._numbers(shape, kind).to(dtype)

    def _numbers(self, shape, kind):
        return torch.randn(shape, generator=self.generator, dtype=kind) * 3

    def tensors(self, types=TYPES):
        """By rank, each a list of the same form, and whether a lone tensor is passed by itself."""
        count = self.rng.choice([1, 1, 2, 3, 4, 0])
        forms = [(self.shape(), self.rng.choice(types)) for _ in range(count)]
        state = self.rng.getstate()
        each = []
        for _ in range(self.n):
            self.rng.setstate(state)  # one memory layout on all ranks
            each.append([self.tensor(*form) for form in forms])
        return each, count == 1 and self.rng.random() < 0.7

    def graph(self):
        """Edges (j, i) of a random directed graph."""
        share = self.rng.random()
        return [(j, i) for j in range(self.n) for i in range(self.n) if i != j and self.rng.random() < share]

    def weight(self):
        return self.rng.choice([1.0, 0.5, 0.0, -1.0, self.rng.uniform(-2, 2), self.rng.uniform(0, 1)])


def topology(d, sums):
    """A random connected one: a directed ring and a random graph."""
    n = d.n
    A = np.zeros((n, n))
    for j, i in {*d.graph(), *((j, (j + 1) % n) for j in range(n))}:
        A[i, j] = d.rng.uniform(0.1, 1)
    A += np.diag([d.rng.uniform(0.1, 1) for _ in range(n)])
    if sums == "doubly":
        shift = d.rng.randrange(1, n) if n > 1 else 0
        w = d.rng.uniform(0.2, 0.8)
        A = w * np.eye(n) + (1 - w) / 2 * (np.roll(np.eye(n), shift, 0) + np.roll(np.eye(n), 1, 0))
    else:
        A /= A.sum(0 if sums == "columns" else 1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return columns(A) if sums == "columns" else fused_dlam.Topology(A)


def columns(A):
    return fused_dlam.Topology(A, "pushed", sums="columns")


class Player:
    """One rank's calls and what it finds wrong."""

    def __init__(self, rank, n, seed):
        self.rank, self.n, self.seed = rank, n, seed
        self.wrong, self.calls, self.pending = [], 0, []

    def play(self, numbers):
        for number in numbers:
            d, self.number = Draw(self.seed, number, self.n), number
            kind = d.rng.choice(["exchange"] * 6 + ["allreduce"] * 3 + ["push", "gather", "pair"])
            getattr(self, kind)(d)
            self.calls += 1
            while len(self.pending) > 5 or (self.pending and d.rng.random() < 0.3):
                self.settle(self.pending.pop(d.rng.randrange(len(self.pending))), d)
        while self.pending:
            self.settle(self.pending.pop(), d)
        return self.calls, self.wrong[:5]

    def settle(self, waiting, d):
        """Waits for a handle, looks at it before, or lets it go: each rank as its own numbers say."""
        number, handle, check = waiting
        own = random.Random(f"{self.seed} {number} {self.rank}")
        while own.random() < 0.4:
            assert handle.done in (True, False)
        if own.random() < 0.8:
            out = handle.wait()
            assert handle.done and handle.wait() is out
            check(out)

    def hold(self, what, got, expected, size, dtype, factor=1.0):
        bound = factor * (TOLERANCE[dtype] * size + SMALLEST.get(dtype, 0.0) * self.n)
        error = (wide(got) - expected).abs()
        if got.dtype != dtype or got.shape != expected.shape or not bool((error <= bound).all()):
            worst = (error / (bound + 1e-300)).max().item() if error.shape == bound.shape and error.numel() else None
            self.wrong.append(f"exchange {self.number} of seed {self.seed}, rank {self.rank}: {what} {dtype} {worst}")

    def compare(self, what, M, each, out, weights, factor=1.0):
        """y_i = sum_j M[i][j] x_j, where the differences x_j - x_i may be what is summed, times this rank's weights."""
        if len(out) != len(each[0]):
            self.wrong.append(f"exchange {self.number}, rank {self.rank}: {what}: {len(out)} tensors")
        for k, got in enumerate(out):
            X = [wide(x[k]) for x in each]
            Y, S = dense(M, X)
            size = S[self.rank] + sum(map(abs, weights)) * X[self.rank].abs()
            self.hold(f"{what} tensor {k}", got, Y[self.rank], size, each[0][k].dtype, factor)

    def weighted(self, d, what, M, call, asynchronous=True, weights=None):
        """Calls with what is drawn, sometimes with gradients, sometimes with a handle.

        weights: this rank's, where they are not its row of M.
        """
        weights = M[self.rank] if weights is None else weights
        each, lone = d.tensors()
        mine, how = each[self.rank], d.rng.choice(["plain", "plain", "async", "async", "gradient"])
        if how == "gradient" and mine:
            leaves = [t.clone().requires_grad_() for t in mine]
            out = call(leaves[0] if lone else leaves)
            out = [out] if lone else out
            C = [
                [torch.randn(t.shape, generator=d.generator, dtype=wide(t).dtype).to(t.dtype) for t in x] for x in each
            ]
            self.compare(what, M, each, out, weights)
            torch.autograd.backward(list(out), C[self.rank])
            transposed = [[M[i][j] for i in range(self.n)] for j in range(self.n)]
            self.compare(f"gradient of {what}", transposed, C, [t.grad for t in leaves], weights, factor=2.0)
            return
        x = mine[0] if lone else d.rng.choice([list, tuple])(mine)
        if how == "async" and asynchronous:
            each[self.rank] = [t.clone() for t in mine]
            handle = call(x, async_op=True)
            for t in mine:  # while it is under way
                t.fill_(float("nan"))
            self.pending.append(
                (self.number, handle, lambda out: self.compare(what, M, each, [out] if lone else out, weights))
            )
            return
        out = call(x)
        assert isinstance(out, type(x)) or lone
        self.compare(what, M, each, [out] if lone else out, weights)

    def exchange(self, d):
        n, edges = self.n, d.graph()
        plain = d.rng.random() < 0.2  # ranks alone, no weights
        own = [d.weight() if d.rng.random() < 0.6 else None for _ in range(n)]
        sources, destinations = [{} for _ in range(n)], [{} for _ in range(n)]
        for j, i in edges:
            sources[i][j], destinations[j][i] = d.weight(), d.rng.choice([1.0, 1.0, d.weight()])
        if plain:
            sources = [{j: 1 / (len(s) + 1) for j in s} for s in sources]
            destinations = [{i: 1.0 for i in out} for out in destinations]
        M = [[0.0] * n for _ in range(n)]
        for i in range(n):
            M[i][i] = 1 - sum(sources[i].values()) if own[i] is None else own[i]
            for j, w in sources[i].items():
                M[i][j] = w * destinations[j][i]
        s, out = sources[self.rank], destinations[self.rank]
        check = d.rng.random() < 0.5

        def call(x, **more):
            a, b = (list(s), set(out)) if plain else (s, out)
            return neighbor_exchange(x, a, b, own[self.rank], check=check, **more)

        self.weighted(d, "neighbor_exchange", M, call, weights=s.values())

    def allreduce(self, d):
        graph = topology(d, d.rng.choice(["rows", "columns", "doubly"]))
        named = d.rng.choice([None, None, "ring", "full", "one-peer-exponential"])
        step = d.rng.randrange(10)
        used = graph if named is None else fused_dlam.topology.get(named, self.n)
        M = used.weights(step).tolist()
        self.weighted(
            d, f"neighbor_allreduce {named}", M, lambda x, **more: neighbor_allreduce(x, named or used, step, **more)
        )

    def push(self, d):
        graph, step = topology(d, d.rng.choice(["columns", "doubly"])), d.rng.randrange(10)
        masses = [d.rng.uniform(0.1, 3) for _ in range(self.n)]
        M = graph.weights(step).tolist()
        tensor = d.rng.random() < 0.5

        def call(x):
            mass = masses[self.rank]
            x, mass = push_sum(x, torch.tensor(mass, dtype=torch.float64) if tensor else mass, graph, step)
            assert isinstance(mass, torch.Tensor) == tensor
            expected = sum(m * w for m, w in zip(M[self.rank], masses, strict=True))
            if abs(float(mass) - expected) > 8 * 2.0**-53 * self.n * 3:
                self.wrong.append(f"exchange {self.number}, rank {self.rank}: mass {float(mass)} for {expected}")
            return x

        self.weighted(d, "push_sum", M, call, asynchronous=False)

    def gather(self, d):
        graph, step = topology(d, "rows"), d.rng.randrange(10)
        dtype, rest = d.rng.choice(ANY_TYPES), d.rng.choice([(), (2,), (3, 1), (0,)])
        each = [d.tensor((d.rng.randint(0, 20), *rest), torch.float64).to(dtype) for _ in range(self.n)]
        out = neighbor_gather(each[self.rank], graph, step)
        expected = [j for j in range(self.n) if j != self.rank and graph.weights(step)[self.rank, j]]
        if list(out) != expected or not all(out[j].tolist() == each[j].tolist() and out[j].dtype == dtype for j in out):
            self.wrong.append(f"exchange {self.number}, rank {self.rank}: neighbor_gather of {dtype}")

    def pair(self, d):
        ranks = d.rng.sample(range(self.n), self.n)
        pairs = [tuple(ranks[k : k + 2]) for k in range(0, self.n - 1, 2)][: d.rng.randint(0, self.n // 2)]
        partner = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        M = [[0.0] * self.n for _ in range(self.n)]
        for i in range(self.n):
            M[i][i] = 0.5 if i in partner else 1.0
            if i in partner:
                M[i][partner[i]] = 0.5
        self.weighted(d, "pair_average", M, lambda x: pair_average(x, partner.get(self.rank)), asynchronous=False)


def play(rank, n, seed, count, staged=False):
    """staged: as CUDA tensors travel over gloo, copied and posted by the courier's thread."""
    with mock.patch.object(Transfer, "on_device", staticmethod(lambda tensors: staged)):
        return Player(rank, n, seed).play(range(count))
