"""Draws a configuration of the fuzzer from its number: a model, an optimizer, and a script that does odd things.

A configuration is drawn from (number of workers, seed) alone, in one order, so that a failure comes again from its
number. It is the same on all ranks; an `Event` says which of them it is for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

METHODS = (
    "mi-dmsgd", "mi-dmsgd", "mi-dmsgd", "pc-dmsgd", "pc-dmsgd", "dmsgd", "dmsgd", "decentlam", "dsgd", "psgd", "pmsgd",
    "pmsgd", "da-dmsgd", "awc-dmsgd", "qg-dmsgd", "d2-dmsgd", "exact-diffusion", "gradient-tracking",
    "momentum-tracking", "nesterov-pmsgd", "nesterov-dmsgd", "nesterov-awc-dmsgd", "nesterov-qg-dmsgd",
    "nesterov-pc-dmsgd", "nesterov-mi-dmsgd", "adam", "adamw", "mi-adamw",
)  # fmt: skip
AVERAGE_GRADIENTS = ("psgd", "pmsgd", "nesterov-pmsgd")
GRAPHS = (
    "one-peer-exponential", "one-peer-exponential", "ring", "exponential", "symmetric-exponential", "full", "star",
    "random-match", "base-k", "ring every 2", "one-peer-exponential every 3", "ring global 3",
    "one-peer-exponential global 2",
)  # fmt: skip
SHAPES = ((4, 3), (3,), (), (1, 1), (0,), (5, 2), (2, 3, 2, 2), (17,), (0, 4), (7, 5), (1,))
LOW = ("bfloat16", "float16")

# What a script does to gradients, parameters, the optimizer's state and settings. "between": backward pass and step().
GRADIENTS = (
    "g_data_clamp", "g_data_mul", "g_data_zero", "g_numpy", "g_dlpack", "g_view", "g_none", "g_new", "g_mul",
    "g_setitem", "g_inf", "clip_norm", "clip_value",
)  # fmt: skip
WEIGHTS = ("w_data_copy", "w_data_clamp", "w_data_mul", "w_nograd_mul", "w_nograd_copy", "w_numpy")
STATE = ("state_clear", "state_new", "state_replace", "state_zero", "state_delete", "state_mul_data")
LOOKS = ("averaged", "distance", "state_dict", "copy_state", "consensus_state")
EVERYBODY = (
    "g_allreduce", "lr", "lr_tensor", "momentum", "weight_decay", "load_model", "load_both", "load_optimizer",
    "add_group", "synchronize", *LOOKS,
)  # fmt: skip
BACKWARD = (
    "plain", "plain", "plain", "plain", "plain", "plain", "twice", "no_sync", "no_sync_forgotten", "retain_twice",
    "penalty_grad", "penalty_autograd", "closure", "none", "wasted", "wasted_kept", "double_step", "partial",
)  # fmt: skip
ZERO = ("opt", "opt", "opt", "opt", "opt_false", "model", "model_false", "foreach", "keep")


@dataclass(frozen=True)
class Event:
    """`name` is done at each of `steps`, at `where` ("before" the backward pass, "between", "after" the step).

    rank: None, or the only rank that does it; which: a parameter's number, or None for all; amount: a number for it.
    """

    name: str
    where: str
    steps: range
    rank: int | None
    which: int | None
    amount: float

    def __str__(self) -> str:
        last = self.steps.stop - 1
        when = f"@{self.steps.start}" + (f"-{last}" if last > self.steps.start else "")
        rank = "" if self.rank is None else f" rank{self.rank}"
        which = "" if self.which is None else f" p{self.which}"
        return f"{self.name}{when} {self.where}{rank}{which} {self.amount:g}"


@dataclass
class Config:
    n: int
    seed: int
    kind: str = "sgd"  # or "gossip", "gan"
    inner: str = "SGD"
    method: str = "dmsgd"
    graph: str = "ring"
    schedule: str = "auto"
    steps: int = 5
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    maximize: bool = False
    comm_dtype: str | None = None
    bucket_mb: float | None = None
    fused: bool | None = False
    max_grad_norm: float | None = None
    clip: str | None = None
    layers: str = ""
    hierarchical: bool = False
    same: bool = False  # all workers have one set of data, and do the same
    certified: bool = False
    scaler: tuple | None = None  # (class, first step, step of the overflow, its rank, unscale_)
    params: list = field(default_factory=list)  # (shape, type, layout, group, trainable)
    tied: bool = False
    empty_group: bool = False
    hook: str | None = None
    backward: list = field(default_factory=list)  # (kind, rank or None) by step
    zero: list = field(default_factory=list)
    unused: list = field(default_factory=list)  # (step, rank or None, parameter)
    trainable: list = field(default_factory=list)  # (step, rank or None, parameter, to what)
    events: list = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"n={self.n} seed={self.seed} {self.kind} {self.inner if self.kind == 'gossip' else self.method}"]
        parts.append(f"{self.graph} {self.schedule} steps={self.steps} lr={self.lr:g} momentum={self.momentum:g}")
        for name in ("weight_decay", "maximize", "comm_dtype", "bucket_mb", "max_grad_norm", "clip", "layers",
                     "hierarchical",
                     "same", "certified", "scaler", "tied", "empty_group", "hook"):  # fmt: skip
            if getattr(self, name):
                parts.append(f"{name}={getattr(self, name)}")
        parts.append(f"fused={self.fused}")
        parts.append("params=" + " ".join(f"{k}:{list(s)}{d}/{l}/g{g}{'' if t else '/frozen'}"
                                          for k, (s, d, l, g, t) in enumerate(self.params)))  # fmt: skip
        parts.append("backward=" + ",".join(b if r is None else f"{b}@rank{r}" for b, r in self.backward))
        parts.append("zero=" + ",".join(self.zero))
        for name in ("unused", "trainable"):
            if getattr(self, name):
                parts.append(f"{name}={getattr(self, name)}")
        parts.append("events=[" + "; ".join(map(str, self.events)) + "]")
        return " | ".join(parts)

    @property
    def sends_x(self) -> bool:
        """Whether parameters are on their way between steps, and must not be written without synchronize()."""
        return self.schedule == "awc" or (self.kind != "gossip" and "awc" in self.method)

    @property
    def low(self) -> bool:
        return any(p[1] in LOW for p in self.params)


def draw(n: int, seed: int) -> Config:
    r = random.Random(f"{n}/{seed}")
    c = Config(n, seed, steps=r.choice((4, 5, 6, 8, 12)))
    c.kind = r.choice(("sgd",) * 8 + ("gossip", "gan"))
    c.inner = r.choice(("SGD", "AdamW", "RMSprop"))
    c.method = r.choice(METHODS)
    c.graph = r.choice(GRAPHS)
    c.schedule = "auto"
    if c.method not in AVERAGE_GRADIENTS and "awc" not in c.method:
        c.schedule = r.choice(("auto",) * 7 + ("midpoint",) * 2 + ("awc",) * 2)
    c.lr = r.choice((0.05, 0.02, 0.1, 0.0))
    c.momentum = r.choice((0.9, 0.9, 0.5, 0.0))
    c.weight_decay = r.choice((0.0, 0.0, 0.01))
    c.maximize = r.random() < 0.05
    c.comm_dtype = r.choice((None,) * 6 + ("bfloat16", "float64", "float16"))
    c.bucket_mb = r.choice((None, 1e-5, 1e-4, 1e-4, 5e-4))
    c.fused = r.choice((False, False, False, None))
    c.max_grad_norm = 0.5 if r.random() < 0.08 else None
    c.layers = r.choice(("",) * 8 + ("lars", "slowmo", "lars slowmo")) if c.kind != "gossip" else ""
    c.max_grad_norm = None if c.kind == "gossip" else c.max_grad_norm
    plain = c.kind != "gossip" and c.max_grad_norm is None and "lars" not in c.layers
    c.clip = "spikes" if plain and r.random() < 0.2 else None
    c.hierarchical = n == 4 and r.random() < 0.2 and c.method not in AVERAGE_GRADIENTS
    c.same = r.random() < 0.12
    c.certified = r.random() < 0.15 and not c.graph.startswith("random")
    _draw_parameters(c, r)
    _draw_script(c, r)
    _draw_events(c, r)
    return c


def _draw_parameters(c: Config, r: random.Random) -> None:
    kinds = r.choice((["float32"],) * 5 + (["float64"], ["bfloat16"], ["float32", "bfloat16"], ["float16", "float32"],
                     ["float32", "float64", "complex64"], ["float32", "float64", "bfloat16", "complex64"]))  # fmt: skip
    groups = r.choice((1, 1, 2, 3))
    for _ in range(r.randint(1, 7)):
        shape = r.choice(SHAPES)
        layout = r.choice(("c", {2: "t", 4: "channels_last"}.get(len(shape), "c")))
        c.params.append((shape, r.choice(kinds), layout, r.randrange(groups), r.random() > 0.08))
    if not any(p[4] for p in c.params):
        c.params.append(((3, 2), kinds[0], "c", 0, True))
    c.tied = r.random() < 0.2
    c.empty_group = r.random() < 0.08
    complex_ = any(p[1] == "complex64" for p in c.params)
    if c.kind == "sgd" and not complex_ and r.random() < 0.12:
        by_hand = r.random() < 0.4 and not any(p[1] == "float16" for p in c.params)
        c.scaler = (r.choice(("own", "own", "torch")), r.randrange(c.steps), r.choice((None, r.randrange(c.steps))),
                    r.randrange(c.n), by_hand)  # fmt: skip


def _draw_script(c: Config, r: random.Random) -> None:
    odd = r.random()  # how odd this script is
    for _ in range(c.steps):
        kind = r.choice(BACKWARD) if r.random() < odd else "plain"
        if (c.scaler and kind in ("closure", "penalty_grad")) or (
            c.kind == "gossip" and kind == "closure" and c.hierarchical
        ):
            kind = "plain"
        if c.kind == "gossip" and kind.startswith("no_sync"):
            kind = "twice"
        alone = kind in ("twice", "no_sync", "retain_twice", "none", "penalty_autograd", "partial") and r.random() < 0.4
        c.backward.append((kind, r.randrange(c.n) if alone and not c.same else None))
        c.zero.append(r.choice(ZERO) if r.random() < odd else "opt")
    for step in range(c.steps):  # torch itself refuses to accumulate into gradients with a graph that is gone
        if "penalty_grad" in (c.backward[step][0], c.backward[step - 1][0] if step else ""):
            c.zero[step] = "opt" if c.zero[step] != "model" else "model"
    some = range(len(c.params))
    for _ in range(r.choice((0, 0, 1, 2, 4))):
        c.unused.append(
            (r.randrange(c.steps), None if c.same or r.random() < 0.4 else r.randrange(c.n), r.choice(some))
        )
    for k, p in enumerate(c.params):
        if not p[4] and r.random() < 0.7:
            c.trainable.append((r.randrange(c.steps), None, k, True))
    if r.random() < 0.25:
        k, start = r.choice(some), r.randrange(c.steps)
        if c.params[k][4]:
            rank = None if c.same or r.random() < 0.5 else r.randrange(c.n)
            c.trainable.append((start, rank, k, False))
            if r.random() < 0.7:
                c.trainable.append((start + r.randint(1, 3), rank, k, True))
    if r.random() < 0.12:
        c.hook = r.choice(("data", "in place", "replace")) + r.choice((" first", " last"))


def _draw_events(c: Config, r: random.Random) -> None:
    families = (GRADIENTS, GRADIENTS, GRADIENTS, WEIGHTS, WEIGHTS, STATE, EVERYBODY, EVERYBODY, LOOKS)
    adds = False
    for _ in range(r.choice((0, 1, 1, 2, 2, 3, 4))):
        name = r.choice(r.choice(families))
        where = r.choice(("before", "between", "between", "after"))
        if name in GRADIENTS or name == "g_allreduce":
            where = "between" if r.random() < 0.9 else where
        if name == "add_group":
            where = r.choice(("before", "after"))
            if adds or any(e.name.startswith("load") for e in c.events):
                continue
            adds = True
        if name.startswith("load") and adds:
            continue
        if "slowmo" in c.layers and name in ("state_dict", "copy_state", "consensus_state") and where == "between":
            continue  # a message that has left has begun SlowMo's round
        start = r.randrange(c.steps)
        length = r.choice((1, 1, 1, 2, c.steps))
        length = 1 if name == "add_group" or name.startswith("load") else length
        if name == "momentum" and (c.certified or not c.momentum):
            continue  # torch.optim.SGD keeps no buffer at momentum 0, this package does
        if name == "g_allreduce" and c.low:
            continue
        rank = None if c.same or name in EVERYBODY or r.random() < 0.5 else r.randrange(c.n)
        if c.hierarchical and name.startswith(("w_", "state_")):
            rank = None  # the ranks of a machine are one worker
        which = None if r.random() < 0.5 else r.randrange(len(c.params))
        amount = r.choice((0.5, 0.1, 0.02, 0.3, 1.5, 0.0))
        c.events.append(Event(name, where, range(start, min(start + length, c.steps)), rank, which, amount))
